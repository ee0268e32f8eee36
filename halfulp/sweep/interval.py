"""Intervals of means over seeds, honest with few of them; at 95 % unless another level is asked.

The percentile bootstrap of a mean of n values never leaves their range: with 3 values it misses
the mean whenever all lie on one side of it, one time in four for symmetric noise. Student's t is
exact for normal noise at any n. From `FEW` values on there is enough to see a skewed distribution,
and the studentized bootstrap (Efron and Tibshirani 1993, section 12.5) takes over.
tests/sweep/test_interval.py measures the coverage of all three.
"""

import math
from dataclasses import dataclass

import numpy as np

FEW = 8
LEVEL = 0.95  # of every interval that is not said to have another
_DRAWS = 2000


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A value and its two-sided interval; `n` independent values (seeds) behind it.

    With one value the interval is infinite: nothing is known about its spread.
    """

    value: float
    low: float
    high: float
    n: int
    method: str  # "Student" | "bootstrap-t" | "bootstrap"

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def mean_interval(values: np.ndarray, level: float = LEVEL) -> Interval | None:
    """The mean of independent values [n] with its interval; nan are left out, None if all are."""
    known = np.asarray(values, dtype=float)
    known = known[~np.isnan(known)]
    if not len(known):
        return None
    return student(known, level) if len(known) < FEW else bootstrap_t(known, level)


def student(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Student's interval of the mean of values [n ≥ 1]."""
    from scipy import stats

    n, mean = len(values), float(values.mean())
    half = math.inf
    if n > 1:
        half = float(stats.t.ppf((1 + level) / 2, n - 1)) * float(stats.sem(values))
    return Interval(value=mean, low=mean - half, high=mean + half, n=n, method="Student")


def bootstrap_t(values: np.ndarray, level: float = LEVEL) -> Interval:
    """Studentized bootstrap interval of the mean of values [n ≥ 2]."""
    n, mean = len(values), float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(n)
    drawn = values[resamples(n)]
    errors = drawn.std(axis=1, ddof=1) / math.sqrt(n)
    # A draw of one value n times has no error of its own, and says nothing.
    kept = errors > 0
    pivots = (drawn.mean(axis=1) - mean)[kept] / errors[kept]
    ends = [(1 - level) / 2, (1 + level) / 2]
    first, last = np.quantile(pivots, ends) if kept.any() else (0.0, 0.0)
    low, high = mean - last * error, mean - first * error
    return Interval(value=mean, low=float(low), high=float(high), n=n, method="bootstrap-t")


def bootstrap(values: np.ndarray) -> Interval:
    """Percentile bootstrap interval of the mean of values [n ≥ 1]: too short for small n."""
    low, high = outer_quantiles(values[resamples(len(values))].mean(axis=1))
    mean = float(values.mean())
    return Interval(value=mean, low=low, high=high, n=len(values), method="bootstrap")


def outer_quantiles(draws: np.ndarray, tail: float = 0.025) -> tuple[float, float]:
    """The points with a share `tail` of the draws beyond, outward to the next draw.

    Few seeds give few distinct draws, and interpolation would cut off the ends.
    """
    low = np.quantile(draws, tail, method="lower")
    return float(low), float(np.quantile(draws, 1 - tail, method="higher"))


def expanded_tail(n: int, level: float = LEVEL) -> float:
    """The tail of draws that leaves out (1 − level) / 2 of the truth, for a statistic of n values.

    A bootstrap draws with the variance (n − 1) / n of the sample's and as if it were known; this
    is Φ(−√(n / (n − 1)) t), Hesterberg (arXiv:1411.5279).
    """
    from scipy import stats

    return float(stats.norm.cdf(math.sqrt(n / (n - 1)) * stats.t.ppf((1 - level) / 2, n - 1)))


def resamples(n: int) -> np.ndarray:
    """Indices [draws, n] with replacement: all n^n of them while they are few, else the same 2000.

    Whatever shares its seeds is drawn with the same indices, which keeps pairs together.
    """
    if n**n <= _DRAWS * 2:
        return np.stack(np.meshgrid(*[np.arange(n)] * n, indexing="ij"), axis=-1).reshape(-1, n)
    return np.random.default_rng(0).integers(0, n, (_DRAWS, n))
