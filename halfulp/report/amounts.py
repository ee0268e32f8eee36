"""Large amounts as people say them: "3.8 billion", "38億"; money, hours, factors."""

import math

_ENGLISH = ((1e12, "trillion"), (1e9, "billion"), (1e6, "million"), (1e3, "thousand"))
_JAPANESE = ((1e12, "兆"), (1e8, "億"), (1e4, "万"))


def amount(value: float, language: str = "en") -> str:
    """Three digits and a word for the size; the plain number below the smallest word."""
    steps, gap = (_ENGLISH, " ") if language == "en" else (_JAPANESE, "")
    for size, word in steps:
        if value >= size * 0.9995:
            return f"{digits(value / size)}{gap}{word}"
    return digits(value)


def digits(value: float) -> str:
    """Three significant digits without an exponent, thousands separated."""
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value)) + 1e-12))
    step = 10.0 ** max(0, math.floor(math.log10(abs(value))) - 2)
    text = f"{round(value / step) * step:,.{places}f}" if places == 0 else f"{value:,.{places}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def dollars(value: float) -> str:
    """Dollars with three significant digits: $3,500; below $100 with cents."""
    return f"${value:,.2f}" if value < 99.995 else f"${digits(value)}"
