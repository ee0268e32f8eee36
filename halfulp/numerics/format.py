"""Number formats: what values a low-precision tensor can hold, and what happens beyond them."""

import difflib
import re
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Format:
    """A grid of numbers: sign, exponent, mantissa, and the rule beyond the largest value.

    The grid is { ±k · 2^(e − mantissa_bits) : e ≥ smallest_exponent, k < 2^(mantissa_bits + 1) }
    up to `largest`; values below 2^smallest_exponent are subnormal and keep the last step. Integers
    are formats whose whole range is subnormal (smallest_exponent = mantissa_bits: step 1).

    `overflow` is what a finite value that rounds beyond `largest` becomes when the cast does not
    saturate: "inf", "nan", or "saturate" for formats that have neither. When the cast saturates
    (the default of formats of at most 8 bits) ±inf becomes ±largest too. NaN stays NaN, also in
    formats without a NaN code: the fp32 carrier keeps it visible. −0 stays −0.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int
    smallest_exponent: int
    largest: float
    overflow: str
    is_int: bool = False

    @property
    def unit_roundoff(self) -> float:
        """Half the spacing of 1: the largest relative error of round-to-nearest on normals."""
        return 0.0 if self.is_int else 2.0 ** -(self.mantissa_bits + 1)

    @property
    def smallest_normal(self) -> float:
        return 1.0 if self.is_int else 2.0**self.smallest_exponent

    @property
    def smallest_subnormal(self) -> float:
        return 2.0 ** (self.smallest_exponent - self.mantissa_bits)

    @property
    def largest_exponent(self) -> int:
        """floor(log2(largest))."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bits == 8 else _log2(self.largest)

    @property
    def saturates(self) -> bool:
        """Whether a cast saturates unless told otherwise (formats of at most 8 bits do)."""
        return self.bits <= 8 or self.overflow == "saturate"

    @property
    def is_identity(self) -> bool:
        """True for fp32: rounding an fp32 tensor to it changes nothing."""
        return self.exponent_bits == 8 and self.mantissa_bits == 23

    def __str__(self) -> str:
        return self.name

    # The name decides the rest, and formats are keys of caches on hot paths.
    def __hash__(self) -> int:
        return hash(self.name)


def _log2(value: float) -> int:
    return int(value).bit_length() - 1 if value >= 1 else -1


def _float_format(name: str, exponent_bits: int, mantissa_bits: int, specials: str) -> Format:
    """`specials`: "ieee" (inf and NaN), "fn" (NaN only, in the top code), "finite" (neither)."""
    bias = 2 ** (exponent_bits - 1) - 1
    top = 2**exponent_bits - 1 - bias  # exponent of the all-ones field, if it holds numbers
    top_mantissa = 2.0 - 2.0**-mantissa_bits
    largest, overflow = {
        "ieee": (top_mantissa * 2.0 ** (top - 1), "inf"),
        "fn": ((top_mantissa - 2.0**-mantissa_bits) * 2.0**top, "nan"),
        "finite": (top_mantissa * 2.0**top if exponent_bits < 8 else 0.0, "saturate"),
    }[specials]
    return Format(
        name=name,
        bits=1 + exponent_bits + mantissa_bits,
        exponent_bits=exponent_bits,
        mantissa_bits=mantissa_bits,
        smallest_exponent=1 - bias,
        largest=largest,
        overflow=overflow,
    )


def _int_format(bits: int) -> Format:
    """Symmetric two's complement without its most negative code: ±(2^(bits−1) − 1), step 1."""
    return Format(
        name=f"int{bits}",
        bits=bits,
        exponent_bits=0,
        mantissa_bits=bits - 1,
        smallest_exponent=bits - 1,
        largest=2.0 ** (bits - 1) - 1,
        overflow="saturate",
        is_int=True,
    )


FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        _float_format("fp32", 8, 23, "ieee"),
        _float_format("tf32", 8, 10, "ieee"),
        _float_format("bf16", 8, 7, "ieee"),
        _float_format("fp16", 5, 10, "ieee"),
        _float_format("e5m2", 5, 2, "ieee"),
        _float_format("e4m3", 4, 3, "fn"),
        _float_format("e3m4", 3, 4, "ieee"),
        _float_format("e3m2", 3, 2, "finite"),
        _float_format("e2m3", 2, 3, "finite"),
        _float_format("e2m1", 2, 1, "finite"),
        _int_format(8),
        _int_format(4),
    )
}
_ALIASES = {"e8m23": "fp32", "e8m10": "tf32", "e8m7": "bf16", "e5m10": "fp16"}
_ALIASES |= {"e4m3fn": "e4m3", "e2m1fn": "e2m1", "e2m3fn": "e2m3", "e3m2fn": "e3m2"}
MEANT = {"fp8": ["e4m3", "e5m2"], "fp6": ["e2m3", "e3m2"], "fp4": ["e2m1"]}
"""Words for a size, and the formats that have it."""
_SUFFIXES = {"": "ieee", "ieee": "ieee", "fn": "fn", "finite": "finite"}


@cache
def get_format(name: str) -> Format:
    """The format called `name`.

    * a name of `FORMATS`;
    * `eXmY`: X exponent bits (2–8), Y mantissa bits (1–22), IEEE style with inf and NaN;
      `eXmYfn` has NaN but no inf, `eXmYfinite` neither (both need X ≤ 7);
    * `intN`, N from 2 to 16, symmetric.

    `e4m3`, `e3m2`, `e2m3` and `e2m1` are OCP's (finite); `e4m3ieee` is the variant with inf.

    Raises FormatError naming the nearest valid names.
    """
    name = _ALIASES.get(name, name)
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"e(\d+)m(\d+)(ieee|fn|finite|)", name):
        exponent, mantissa, specials = int(match[1]), int(match[2]), _SUFFIXES[match[3]]
        if 2 <= exponent <= 8 and 1 <= mantissa <= 22 and (exponent < 8 or specials == "ieee"):
            return _float_format(name, exponent, mantissa, specials)
        raise _unknown(name, "eXmY needs 2 <= X <= 8 and 1 <= Y <= 22, and X <= 7 without inf")
    if (match := re.fullmatch(r"int(\d+)", name)) and 2 <= int(match[1]) <= 16:
        return _int_format(int(match[1]))
    raise _unknown(name, "no such format")


def _unknown(name: str, why: str) -> Exception:
    from halfulp.errors import FormatError

    if "@" in name or ":" in name:
        return FormatError(
            f"format {name!r}: a format has no scale and no rounding. With them it is a quantizer, "
            "which halfulp.apply_quantizer takes."
        )
    near = MEANT.get(name) or difflib.get_close_matches(name, [*FORMATS, *_ALIASES], cutoff=0.3)
    near = near or list(FORMATS)
    return FormatError(
        f"format {name!r}: {why}. Nearest names: {', '.join(near)}. "
        "Any eXmY (for example e5m3) and intN also work; `halfulp formats` lists them."
    )
