"""A quantizer: format + scaling + rounding (+ transform), written as one short string."""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, cached_property

from halfulp.errors import FormatError
from halfulp.numerics.format import Format, get_format

_SCALES = ("current", "delayed", "static", "e8m0_up", "e8m0_floor", "nvfp4")
_ROUNDINGS = ("nearest", "stochastic", "truncate")
GRAMMAR = (
    "FORMAT[@GRANULARITY][:word]*, e.g. bf16, e4m3@tensor:current, e5m2@tensor:delayed(16):p2, "
    "e4m3@1x32:e8m0_up, e2m1@1x16:nvfp4:stochastic:hadamard(16). Granularities: tensor, row, 1xN, "
    "RxC. Words: current, delayed(H), static(S), e8m0_up, e8m0_floor, nvfp4, p2, margin(K), "
    "nearest, stochastic, truncate, hadamard(N), saturate, overflow"
)


@dataclass(frozen=True)
class Quantizer:
    """How one operand is rounded. Blocks, rows and transforms run along the last axis (K).

    `granularity` says who shares a scale: "element" (no scale), "tensor", "row", "1x32" (blocks
    along K), "16x16" (2-D tiles). `scale` says how it is chosen; see halfulp.numerics.scaling.
    """

    format: Format
    granularity: str = "element"
    scale: str = "none"
    power_of_two: bool = False
    history: int = 0
    margin: int = 0
    static_scale: float = 1.0
    rounding: str = "nearest"
    hadamard: int = 0
    saturate: bool = False

    def __post_init__(self) -> None:
        # Dynamo reads a cached property, and cannot trace its first computation.
        _ = self.is_identity, self.is_one_pass, self.stochastic, self.unscaled

    @cached_property
    def is_identity(self) -> bool:
        """True when an fp32 tensor passes through unchanged."""
        return self.format.is_identity and self.scale == "none" and not self.hadamard

    @cached_property
    def is_one_pass(self) -> bool:
        """True when the result follows from the tensor: no transform, no scale from elsewhere."""
        return not (self.format.is_identity or self.hadamard) and self.scale not in (
            "delayed",
            "static",
        )

    @cached_property
    def stochastic(self) -> bool:
        return self.rounding == "stochastic"

    @cached_property
    def unscaled(self) -> "Quantizer":
        """The rounding of values that its scale was applied to."""
        plain = self.scale == "none" and not self.hadamard
        return self if plain else Quantizer(self.format, rounding=self.rounding, saturate=True)

    @property
    def tile(self) -> tuple[int, int]:
        """(rows, columns) that share a scale; 0 stands for the whole extent."""
        if self.granularity in ("element", "tensor"):
            return 0, 0
        if self.granularity == "row":
            return 1, 0
        rows, columns = self.granularity.split("x")
        return int(rows), int(columns)

    @property
    def one_copy(self) -> bool:
        """Whether one quantized copy of a tensor serves its transpose too.

        Not so for rows, 1-D blocks and transforms, which follow K. With stochastic rounding both
        uses then see the same draw, as hardware that casts once and transposes does.
        """
        rows, columns = self.tile
        return rows == columns and not self.hadamard

    def __str__(self) -> str:
        words = [str(self.format)]
        if self.granularity != "element":
            words[0] += f"@{self.granularity}"
            number = repr(self.static_scale).removesuffix(".0")
            argument = {"delayed": self.history, "static": number}.get(self.scale)
            words.append(self.scale if argument is None else f"{self.scale}({argument})")
        words += ["p2"] * self.power_of_two
        words += [f"margin({self.margin})"] * bool(self.margin)
        words += [self.rounding] * (self.rounding != "nearest")
        words += [f"hadamard({self.hadamard})"] * bool(self.hadamard)
        if self.saturate != (self.format.saturates or self.scale != "none"):
            words.append("saturate" if self.saturate else "overflow")
        return ":".join(words)


@cache
def parse_quantizer(text: str) -> Quantizer:
    """The quantizer that `text` describes; `str()` of the result is its canonical spelling.

    Raises FormatError quoting the word that does not fit and the grammar.
    """
    head, *words = text.replace(" ", "").split(":")
    name, at, granularity = head.partition("@")
    _require(granularity or not at, text, head)
    fmt = get_format(name)
    fields: dict = {"format": fmt, "saturate": fmt.saturates or bool(granularity)}
    if granularity:
        _require(re.fullmatch(r"tensor|row|[1-9]\d*x[1-9]\d*", granularity), text, granularity)
        fields |= {"granularity": granularity, "scale": "current"}
    given: set[str] = set()
    for word in words:
        said = _parse_word(text, word)
        _require(not given & said.keys(), text, word)
        given |= said.keys() - {"history", "static_scale"}
        fields |= said
    quantizer = Quantizer(**fields)
    _check(quantizer, text)
    return quantizer


def check_stored(q: Quantizer, what: str, *, refused: Collection[str] = (), cure: str = "") -> None:
    """Refuse words without a meaning for `what`, a tensor that is no operand of a GEMM.

    Raises FormatError for transforms, delayed scales and the roundings `refused`, where `cure` says
    what to do instead.
    """
    problems = {
        "only operands of GEMMs are transformed, where the other one undoes it": q.hadamard,
        "only operands of GEMMs have delayed scales": q.scale == "delayed",
        f"its rounding is not said here. {cure}": q.rounding in refused,
    }
    for problem, holds in problems.items():
        if holds:
            raise FormatError(f"quantizer '{q}' of the {what}: {problem.removesuffix('.')}.")


def _parse_word(text: str, word: str) -> dict:
    match = re.fullmatch(r"(\w+?)(?:\((\d[\d.]*(?:e[+-]?\d+)?)\))?", word)
    _require(match, text, word)
    assert match is not None
    name, argument = match[1], match[2]
    _require((argument is not None) == (name in _WITH_ARGUMENT), text, word)
    if name in _WITH_ARGUMENT:
        try:
            return _WITH_ARGUMENT[name](argument)
        except ValueError:
            _require(False, text, word)
    if name in _SCALES:
        return {"scale": name}
    if name in _ROUNDINGS:
        return {"rounding": name}
    _require(name in _FLAGS, text, word)
    return _FLAGS[name]


_WITH_ARGUMENT = {
    "delayed": lambda a: {"scale": "delayed", "history": int(a)},
    "static": lambda a: {"scale": "static", "static_scale": float(a)},
    "margin": lambda a: {"margin": int(a)},
    "hadamard": lambda a: {"hadamard": int(a) or -1},  # 0 is no size; the check refuses it
}
_FLAGS = {
    "p2": {"power_of_two": True},
    "saturate": {"saturate": True},
    "overflow": {"saturate": False},
}


def _check(q: Quantizer, text: str) -> None:
    """Refuse combinations that no rule defines, rather than ignore a word."""
    scaled = q.scale != "none"
    if scaled and q.granularity == "element":
        raise FormatError(f"quantizer {text!r}: {q.scale} needs a granularity. Grammar: {GRAMMAR}")
    problems = {
        "p2 and margin shape a current or delayed scale; there is none": (
            (q.power_of_two or q.margin) and q.scale not in ("current", "delayed")
        ),
        "delayed and static scales are per tensor": (
            q.scale in ("delayed", "static") and q.granularity != "tensor"
        ),
        "margin(K) needs 0 <= K <= 64": not 0 <= q.margin <= 64,
        "delayed(H) needs H >= 1": q.scale == "delayed" and q.history < 1,
        "static(S) needs 2^-126 <= S <= 2^126": (
            q.scale == "static" and not 2.0**-126 <= q.static_scale <= 2.0**126
        ),
        "nvfp4 is e2m1 in 1x16 or 16x16 blocks": (
            q.scale == "nvfp4"
            and (q.format.name != "e2m1" or q.granularity not in ("1x16", "16x16"))
        ),
        "e8m0 scales belong to 1xN or RxC blocks": (
            q.scale.startswith("e8m0") and "x" not in q.granularity
        ),
        "a scaled format saturates": scaled and not q.saturate,
        "8-bit exponents need no scale": scaled and q.format.exponent_bits == 8,
        "hadamard(N) needs a power of two from 2 to 128": (
            q.hadamard != 0 and q.hadamard not in (2, 4, 8, 16, 32, 64, 128)
        ),
    }
    for problem, holds in problems.items():
        if holds:
            raise FormatError(f"quantizer {text!r}: {problem}. Grammar: {GRAMMAR}")


def _require(condition: object, text: str, word: str) -> None:
    if not condition:
        raise FormatError(f"quantizer {text!r}: {word!r} is not understood. Grammar: {GRAMMAR}")
