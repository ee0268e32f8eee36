"""How many distinct sequences a larger corpus of the same kind would hold.

Up to twice the corpus: the smoothed estimator of Good and Toulmin (1956) with the binomial
weights of Efron and Thisted (1976, Biometrika 63), from f_1 … f_12. Beyond: a quadratic in
log–log coordinates that ends in the corpus with the slope f_1 / U.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from halfulp.corpus.growth import FREQUENCIES, Part, Record, jackknife
from halfulp.corpus.tally import Tally
from halfulp.errors import DataError

FARTHEST = 8.0
FARTHEST_ALLOWED = 1e6
_LEAST_UNITS = 8
_NORMAL_80 = 1.2816  # the 10 % and 90 % points of a normal distribution
_CURVATURE_RANGE = 16.0  # the last factor of the corpus to which the quadratic is fitted
# Errors of both methods over n = 2 … 32 on a shuffled corpus of 969 MB: log2 of the factor, the
# least and the largest of forecast / truth − 1, with 0 included.
_KNOWN_ERRORS = np.array([[0, 0.0, 0.0], [1, -0.028, 0.025], [2, -0.028, 0.09], [3, -0.11, 0.15]])


@dataclass(frozen=True)
class Forecast:
    """Distinct sequences in a corpus of `factor` times the size, with an 80 % band.

    `backtest`: forecast / truth − 1 when the random 1 / `factor` of this corpus is asked for the
    whole; None where that part is too small to say.
    """

    factor: float
    distinct: float
    low: float
    high: float
    method: str
    backtest: float | None


def forecast(tally: Tally, factor: float, *, allow_far: bool = False) -> Forecast:
    """The distinct sequences of `factor` times the corpus, if more text is like this text.

    The band joins the jackknife over documents, the error of the sample, the known errors of the
    method, and the backtest.
    Raises DataError for a factor below 1 or, unless `allow_far`, above FARTHEST, for an empty
    corpus, and for one that is not `forecastable`.
    """
    check_factor(factor, allow_far=allow_far)
    record = Record(tally)
    whole = record.part()
    if not whole.distinct:
        raise DataError("there is nothing to forecast: the corpus holds no such sequence.")
    if not forecastable(tally):
        raise DataError(
            f"a forecast needs {_LEAST_UNITS} documents or pieces with such sequences at least. "
            "Count more text."
        )
    expected = whole.distinct * grown(whole, factor)
    spread = jackknife(record, lambda part: math.log(grown(part, factor))) or 0.0
    spread = math.hypot(spread, tally.sample.rel_std)
    back = _backtest(record, whole, factor)
    least, largest = _errors(factor, back)
    # Each further part of the same size brings as many sequences as the first one at most.
    most = factor * whole.distinct * math.exp(_NORMAL_80 * tally.sample.rel_std)
    return Forecast(
        factor,
        expected,
        max(whole.distinct, expected / (1 + largest) * math.exp(-_NORMAL_80 * spread)),
        max(expected, min(most, expected / (1 + least) * math.exp(_NORMAL_80 * spread))),
        "Good-Toulmin" if factor <= 2 else "quadratic",
        back,
    )


def forecastable(tally: Tally) -> bool:
    """Whether there are documents or pieces enough to draw a curve and its error from."""
    # Units in different cells are different, and few share one.
    return bool(np.count_nonzero(tally.steps) >= _LEAST_UNITS)


def grown(part: Part, factor: float) -> float:
    """Distinct sequences in `factor` times the part, over those in it."""
    if factor <= 2:
        return 1 + good_toulmin(part.frequencies, factor - 1) / part.distinct
    return math.exp(_quadratic(part, math.log(factor)))


def good_toulmin(frequencies: ArrayLike, more: float) -> float:
    """Sequences not seen so far in `more` times the text seen, 0 ≤ `more` ≤ 1.

    −Σ_j (−more)^j P(Bin(12, 1 / (1 + more)) ≥ j) f_j, from `frequencies` f_1 … f_12.
    """
    from scipy.stats import binom

    j = np.arange(1, FREQUENCIES + 1)
    weights = binom.sf(j - 1, FREQUENCIES, 1 / (1 + more))
    return max(0.0, float(-((-more) ** j * weights * np.asarray(frequencies)).sum()))


def _quadratic(part: Part, x: float) -> float:
    """log of the growth at log factor `x`; the slope stays between 0 and 1."""
    curve = part.curve[part.curve[:, 1] > 0]  # of a small share the sample may hold nothing
    t, u = np.log(curve[:, 0] / part.occurrences), np.log(curve[:, 1] / part.distinct)
    near = (t < 0) & (t > -math.log(_CURVATURE_RANGE))
    t, u = t[near], u[near]
    curvature = float((t**2 * (u - part.slope * t)).sum() / (t**4).sum()) if len(t) else 0.0
    places = np.linspace(0, x, 257)
    slopes = np.clip(part.slope + 2 * curvature * places, 0, 1)
    return float(np.trapezoid(slopes, places))


def _backtest(record: Record, whole: Part, factor: float) -> float | None:
    small = record.part(from_step=round(2 * math.log2(factor)))
    if not small.distinct or small.occurrences == whole.occurrences or len(small.curve) < 2:
        return None
    share = whole.occurrences / small.occurrences
    return small.distinct * grown(small, share) / whole.distinct - 1


def _errors(factor: float, backtest: float | None) -> tuple[float, float]:
    """The least and the largest forecast / truth − 1 to be expected."""
    x, (ends, least, largest) = math.log2(factor), _KNOWN_ERRORS.T
    low, high = float(np.interp(x, ends, least)), float(np.interp(x, ends, largest))
    if x > ends[-1]:
        low, high = max(-0.9, low * x / ends[-1]), high * x / ends[-1]
    seen = backtest or 0.0
    return min(low, seen), max(high, seen)


def check_factor(factor: float, *, allow_far: bool) -> None:
    """DataError for a factor that `forecast` refuses."""
    if not 1 <= factor <= FARTHEST_ALLOWED:
        raise DataError(
            f"a corpus of {factor:g} times the size was asked for; give 1 to "
            f"{FARTHEST_ALLOWED:,.0f}."
        )
    if factor > FARTHEST and not allow_far:
        raise DataError(
            f"a corpus of {factor:g} times the size was asked for, and the forecast has been tried "
            f"out to {FARTHEST:g} times only, where it errs by −11 … +15 %. Ask for less, count "
            "more text, or allow it with --allow-far."
        )
