"""Number grids by the book, and rounding to them: with Fractions, and in exact float64."""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

F32 = np.float32
# m, e_min, largest, overflow: the table of the literature (OCP FP8 and MX, IEEE 754).
_TABLE = {
    "tf32": (10, -126, (2 - 2.0**-10) * 2.0**127, "inf"),
    "bf16": (7, -126, (2 - 2.0**-7) * 2.0**127, "inf"),
    "fp16": (10, -14, 65504.0, "inf"),
    "e5m2": (2, -14, 57344.0, "inf"),
    "e4m3": (3, -6, 448.0, "nan"),
    "e4m3ieee": (3, -6, 240.0, "inf"),
    "e3m4": (4, -2, 15.5, "inf"),
    "e3m2": (2, -2, 28.0, "saturate"),
    "e2m3": (3, 0, 7.5, "saturate"),
    "e2m1": (1, 0, 6.0, "saturate"),
    "int8": (7, 7, 127.0, "saturate"),
    "int4": (3, 3, 7.0, "saturate"),
}


@dataclass(frozen=True)
class Grid:
    """m mantissa bits, exponent e_min of the smallest normal, largest value, overflow rule."""

    m: int
    e_min: int
    largest: float
    overflow: str

    @property
    def wide(self) -> bool:
        """Whether the exponent range is that of fp32."""
        return self.e_min == -126

    @property
    def beyond(self) -> float:
        return {"inf": math.inf, "nan": math.nan, "saturate": self.largest}[self.overflow]


def grid(name: str) -> Grid:
    """The grid of a named format, of `eXmY`, `eXmYfn`, `eXmYfinite`, `eXmYieee` or `intN`."""
    if name in _TABLE:
        return Grid(*_TABLE[name])
    if match := re.fullmatch(r"int(\d+)", name):
        bits = int(match[1])
        return Grid(bits - 1, bits - 1, 2.0 ** (bits - 1) - 1, "saturate")
    x, y, specials = _split(name)
    overflow = {"fn": "nan", "finite": "saturate"}.get(specials, "inf")
    return Grid(y, 2 - 2 ** (x - 1), float(_decode(_last_code(x, y, specials), x, y)), overflow)


def values(name: str) -> np.ndarray:
    """Every nonnegative finite value of a format of at most 16 bits, ascending, decoded by code."""
    if name.startswith("int"):
        return np.arange(2 ** (int(name[3:]) - 1), dtype=np.float64)
    named = {"bf16": (8, 7, "ieee"), "fp16": (5, 10, "ieee"), "e4m3": (4, 3, "fn")}
    finite = {n: (int(n[1]), int(n[3]), "finite") for n in ("e3m2", "e2m3", "e2m1")}
    x, y, specials = (named | finite).get(name) or _split(name)
    last = _last_code(x, y, specials)
    return np.array([float(_decode(code, x, y)) for code in range(last + 1)])


def _split(name: str) -> tuple[int, int, str]:
    match = re.fullmatch(r"e(\d+)m(\d+)(ieee|fn|finite|)", name)
    assert match is not None
    return int(match[1]), int(match[2]), match[3]


def _last_code(x: int, y: int, specials: str) -> int:
    """The largest finite code: IEEE reserves the last exponent, fn only the last code."""
    return {"fn": 2 ** (x + y) - 2, "finite": 2 ** (x + y) - 1}.get(specials, (2**x - 1) * 2**y - 1)


def _decode(code: int, x: int, y: int) -> Fraction:
    field, mantissa = divmod(code, 2**y)
    bias = 2 ** (x - 1) - 1
    significand = mantissa if field == 0 else 2**y + mantissa
    return significand * Fraction(2) ** (max(field, 1) - bias - y)


def floor_log2(value: Fraction) -> int:
    """floor(log2(value)) of a positive Fraction, by integers."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if Fraction(2) ** e <= value else e - 1


def round_exact(
    x: float, g: Grid, rounding: str = "nearest", saturate: bool = False, word: int = 0
) -> float:
    """`x` on the grid, with Fractions; `word` is the 32-bit random word of stochastic rounding."""
    beyond = g.largest if saturate else g.beyond
    if math.isnan(x):
        return x
    if math.isinf(x):
        return math.copysign(beyond, x)
    magnitude = Fraction(abs(x))
    e = max(floor_log2(magnitude), g.e_min) if magnitude else g.e_min
    step = Fraction(2) ** (e - g.m)
    k, rest = divmod(magnitude, step)
    value = (k + _goes_up(k, rest / step, g, rounding, word)) * step
    if value > g.largest:
        return math.copysign(g.largest if rounding == "truncate" else beyond, x)
    return math.copysign(float(value), x)


def _goes_up(k: int, share: Fraction, g: Grid, rounding: str, word: int) -> bool:
    nearest = share > Fraction(1, 2) or (share == Fraction(1, 2) and k % 2 == 1)
    if rounding == "nearest":
        return nearest
    if rounding == "truncate":
        return False
    if g.wide:  # carry out of an addition of the discarded bits
        bits = 23 - g.m
        return share + Fraction(word % 2**bits, 2**bits) >= 1
    threshold = Fraction(2 * (word >> 10) + 1, 2**23)  # 22 centered bits
    return nearest != (abs(share - nearest) > threshold)


def round_array(
    x: np.ndarray,
    g: Grid,
    rounding: str = "nearest",
    saturate: bool = False,
    words: np.ndarray | None = None,
) -> np.ndarray:
    """`round_exact` on a float64 array: every operation below is exact."""
    x = double(x)
    finite = np.isfinite(x)
    magnitude = np.where(finite, np.abs(x), 0.0)
    e = np.maximum(np.frexp(np.where(magnitude == 0, 1.0, magnitude))[1] - 1, g.e_min)
    step = np.ldexp(1.0, np.where(magnitude == 0, g.e_min, e) - g.m)
    k = np.floor(magnitude / step)
    share = magnitude / step - k
    up = (share > 0.5) | ((share == 0.5) & (k % 2 == 1))
    if rounding == "truncate":
        up = np.zeros_like(up)
    if rounding == "stochastic":
        assert words is not None
        up = _moves(share, up, g, words.astype(np.int64))
    value = (k + up) * step
    beyond = g.largest if saturate else g.beyond
    value = np.where(value > g.largest, g.largest if rounding == "truncate" else beyond, value)
    value = np.where(finite, value, np.where(np.isnan(x), np.nan, beyond))
    return np.copysign(value, x)


def double(x: np.ndarray) -> np.ndarray:
    """`x` in float64, without numpy's warning about signaling NaNs."""
    with np.errstate(invalid="ignore"):
        return np.asarray(x, np.float64)


def _moves(share: np.ndarray, nearest: np.ndarray, g: Grid, words: np.ndarray) -> np.ndarray:
    if g.wide:
        bits = 23 - g.m
        return share + (words % 2**bits) * 2.0**-bits >= 1
    threshold = (2 * (words >> 10) + 1) * 2.0**-23
    return nearest != (np.abs(share - nearest) > threshold)
