"""Figures between two ends, and draws from them."""

import math
from dataclasses import dataclass

import numpy as np

from halfulp.sweep.interval import LEVEL


@dataclass(frozen=True, kw_only=True)
class Range:
    """A figure and the ends between which it lies; all three are equal for a given number."""

    value: float
    low: float
    high: float

    def triangular(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draws [n] for ends that are the lowest and highest figure known."""
        if self.low == self.high:
            return np.full(n, self.value)
        return rng.triangular(self.low, self.value, self.high, n)

    def normal(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Draws [n] ≥ 0 for ends of a 95 % interval: a normal distribution on either side."""
        z = rng.standard_normal(n)
        side = np.where(z > 0, self.high - self.value, self.value - self.low)
        return np.maximum(self.value + z * side / 1.959964, 0.0)


def exactly(value: float) -> Range:
    """A number without doubt."""
    return Range(value=value, low=value, high=value)


def between(low: float, high: float) -> Range:
    """The middle of two figures."""
    return Range(value=(low + high) / 2, low=low, high=high)


def spanned(draws: np.ndarray, level: float = LEVEL) -> Range:
    """Of draws [known, best, worst case; n]: the median, and the ends of the interval at `level`.

    The low end is that of the best case, the high end that of the worst. All may be inf.
    """
    known, best, worst = draws
    low, high = _quantile(best, (1 - level) / 2), _quantile(worst, (1 + level) / 2)
    return Range(value=_quantile(known, 0.5), low=low, high=high)


def _quantile(draws: np.ndarray, q: float) -> float:
    draws = draws[~np.isnan(draws)]
    # A quantile between two draws is undefined where one of them is infinite.
    return float(np.quantile(draws, q, method="inverted_cdf")) if len(draws) else math.nan
