"""Numbers as a reader wants them in a sentence or a table."""

import math
from collections.abc import Sequence

_SMALL = [
    *("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
]

OPERANDS = {"x": "activations", "w": "weights", "g": "output gradients"}


def count(n: int) -> str:
    """0 … 10 as a word, more as digits."""
    return _SMALL[n] if n <= 10 else f"{n:,}"


def nats(value: float, *, signed: bool = False) -> str:
    """Three decimals, more for tiny values; a true minus sign; "–" for what is not finite."""
    if not math.isfinite(value):
        return "–"
    digits = 3 if abs(value) >= 0.0005 or value == 0 else 5
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", "−")


def interval(value: float, half_width: float) -> tuple[str, str]:
    """A difference in nats without its sign, and its half-width rounded up to the same digits."""
    digits = _digits(value, half_width)
    if not math.isfinite(half_width):
        return f"{abs(value):.{digits}f}", "?"
    return f"{abs(value):.{digits}f}", f"{_up(half_width, digits):.{digits}f}"


def most(value: float, half_width: float) -> str:
    """The upper end of `interval` to three digits, at least 0.001: no run resolves less."""
    return f"{max(0.001, round(value, 3) + _up(half_width, 3)):.3f}"


def _digits(value: float, half_width: float) -> int:
    return 3 if max(abs(value), half_width) >= 0.0005 else 5


def _up(half_width: float, digits: int) -> float:
    return math.ceil(half_width * 10**digits - 1e-9) / 10**digits


def share(value: float) -> str:
    """A share as percent with two significant digits: 62 %, 4.1 %, 0.003 %; zero is "0".

    The space does not break.
    """
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    percent = 100 * value
    if percent >= 9.95:
        return f"{percent:.0f}\u00a0%"
    if percent < 1e-4:
        return f"{percent:.0e}\u00a0%".replace("e-0", "e-")
    digits = 1 - math.floor(math.log10(percent) + 1e-9)
    return f"{percent:.{digits}f}\u00a0%"


def perplexity(value: float) -> str:
    """A difference in nats as a change of perplexity: "+23 % perplexity"."""
    if not math.isfinite(value):
        return "–"
    change = 100 * math.expm1(min(value, 50.0))
    digits = 0 if abs(change) >= 9.95 else 1
    return f"{change:+.{digits}f}\u00a0% perplexity".replace("-", "−")


def number(value: float) -> str:
    """A large count with separators; "–" for what is not finite."""
    return f"{value:,.0f}" if math.isfinite(value) else "–"


def kind(operand: str) -> str:
    """ "wgrad.g" in words: "output gradients"."""
    return OPERANDS.get(operand.rpartition(".")[2], operand)


def operand(name: str) -> str:
    """ "wgrad.g" in words, and as it is: "output gradients (wgrad.g)"."""
    return name if kind(name) == name else f"{kind(name)} ({name})"


def listing(names: Sequence[str], *, most: int = 6) -> str:
    """ "a, b and c"; the tail of a long list is counted, not named."""
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)


def sentence(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]
