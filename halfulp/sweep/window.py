"""The learning rates at which a recipe trains nearly as well as the reference at its best."""

import math
from dataclasses import dataclass

import numpy as np

from halfulp.sweep.gap import best_rate, mean_losses
from halfulp.sweep.interval import FEW, LEVEL, expanded_tail, outer_quantiles, resamples

SHARE = 0.02  # of the reference's best loss: the tolerance δ


@dataclass(frozen=True, kw_only=True)
class Window:
    """A range of learning rates of `octaves` = log2(lr_high / lr_low), and its interval.

    0 octaves, and rates nan, where the recipe never comes within `delta_nats` of the reference's
    best loss. `open_low`, `open_high`: the range reaches the edge of the grid, or a rate without
    a known run. `octaves` is then a lower bound, and `high` is inf.
    """

    octaves: float
    low: float
    high: float
    lr_low: float
    lr_high: float
    open_low: bool
    open_high: bool
    delta_nats: float
    n: int
    method: str  # "Student" | "bootstrap"

    @property
    def open_ended(self) -> bool:
        return self.open_low or self.open_high

    def __str__(self) -> str:
        """ "4.2 octaves [3.1, 5.0]", "at least 4.2 octaves"."""
        bound = "at least " if self.open_ended else ""
        high = "∞" if math.isinf(self.high) else f"{self.high:.1f}"
        return f"{bound}{self.octaves:.1f} octaves [{self.low:.1f}, {high}]"


def window(
    losses_LS: np.ndarray,
    reference_LS: np.ndarray,
    lrs: np.ndarray,
    *,
    delta_nats: float | None = None,
    level: float = LEVEL,
) -> Window | None:
    """The largest contiguous range around the recipe's best rate with ℓ(η) ≤ ℓ*_ref + δ.

    Losses [learning rates, seeds] are averaged over seeds, nan where unknown; crossings are
    interpolated linearly in log2 η. `lrs` ascend. `delta_nats` None: 2 % of the reference's best
    loss ℓ*_ref. None where the recipe or the reference has no known run.

    With `FEW` seeds or more the interval is the bootstrap over seeds, the recipe's and the
    reference's drawn together, its percentiles expanded for small n. Fewer never leave their own
    range (halfulp.sweep.interval), so there the curve is moved up and down by its band at `level`
    (Student's, of the paired differences from the reference's best) and read off again; failed
    runs widen it.
    """
    best, star = best_rate(losses_LS), best_rate(reference_LS)
    if best is None or star is None:
        return None
    if delta_nats is None:
        delta_nats = SHARE * float(mean_losses(reference_LS)[star])
    x, n = np.log2(lrs), int((~np.isnan(losses_LS)).sum(axis=1).max())
    span = _span(_excess(losses_LS, reference_LS, delta_nats), x, best)
    if n < FEW:
        low, high = _band(losses_LS - reference_LS[star] - delta_nats, x, best, level)
    else:
        low, high = _bootstrap(losses_LS, reference_LS, x, delta_nats, level)
    return Window(
        octaves=span.octaves,
        low=min(low, span.octaves),
        high=max(high, span.most),
        lr_low=2.0**span.low,
        lr_high=2.0**span.high,
        open_low=span.open_low,
        open_high=span.open_high,
        delta_nats=delta_nats,
        n=n,
        method="Student" if n < FEW else "bootstrap",
    )


def rates_within(reference_LS: np.ndarray, *, delta_nats: float | None = None) -> range:
    """Indices of the rates in the reference's own window; empty without a known run."""
    star = best_rate(reference_LS)
    if star is None:
        return range(0)
    means = mean_losses(reference_LS)
    delta = SHARE * means[star] if delta_nats is None else delta_nats
    return _inside(means - means[star] - delta, star)


@dataclass(frozen=True)
class _Span:
    """Rates as log2; nan and 0 octaves for none."""

    low: float = math.nan
    high: float = math.nan
    open_low: bool = False
    open_high: bool = False

    @property
    def octaves(self) -> float:
        return 0.0 if math.isnan(self.low) else self.high - self.low

    @property
    def most(self) -> float:
        return math.inf if self.open_low or self.open_high else self.octaves


def _excess(losses_LS: np.ndarray, reference_LS: np.ndarray, delta_nats: float) -> np.ndarray:
    """Mean loss above the threshold, for each rate; over the last axis."""
    star = np.fmin.reduce(mean_losses(reference_LS), axis=0)  # the smallest known one, if any
    return mean_losses(losses_LS) - star - delta_nats


def _span(excess_L: np.ndarray, x: np.ndarray, best: int) -> _Span:
    """The contiguous range around the rate `best` in which the excess is ≤ 0."""
    inside = _inside(excess_L, best)
    if not inside:
        return _Span()
    low, open_low = _edge(excess_L, x, inside[0], -1)
    high, open_high = _edge(excess_L, x, inside[-1], +1)
    return _Span(low, high, open_low, open_high)


def _inside(excess_L: np.ndarray, best: int) -> range:
    if not excess_L[best] <= 0:
        return range(0)
    first = last = best
    while first > 0 and excess_L[first - 1] <= 0:
        first -= 1
    while last + 1 < len(excess_L) and excess_L[last + 1] <= 0:
        last += 1
    return range(first, last + 1)


def _edge(excess_L: np.ndarray, x: np.ndarray, inner: int, step: int) -> tuple[float, bool]:
    """log2 of the rate at which the excess crosses 0 beside `inner`, and whether that is open."""
    outer = inner + step
    if not 0 <= outer < len(x) or np.isnan(excess_L[outer]):
        return float(x[inner]), True
    below, above = excess_L[inner], excess_L[outer]
    share = 1.0 if math.isinf(below) else -below / (above - below)
    return float(x[inner] + (x[outer] - x[inner]) * share), False


def _band(
    differences_LS: np.ndarray, x: np.ndarray, best: int, level: float
) -> tuple[float, float]:
    """Octaves at the upper and at the lower end of the band of the mean difference."""
    from scipy import stats

    means = mean_losses(differences_LS)
    count = (~np.isnan(differences_LS)).sum(axis=1)
    freedom = np.maximum(count - 1, 1)
    squares = np.nansum((differences_LS - means[:, None]) ** 2, axis=1)
    error = np.sqrt(squares / freedom / np.maximum(count, 1))
    half = np.where(count > 1, stats.t.ppf((1 + level) / 2, freedom) * error, np.inf)
    return _span(means + half, x, best).octaves, _span(means - half, x, best).most


def _bootstrap(
    losses_LS: np.ndarray,
    reference_LS: np.ndarray,
    x: np.ndarray,
    delta_nats: float,
    level: float,
) -> tuple[float, float]:
    drawn = resamples(losses_LS.shape[1])
    # [rates, draws, seeds] → [rates, draws]
    excess_LD = _excess(losses_LS[:, drawn], reference_LS[:, drawn], delta_nats)
    excess_LD = excess_LD[:, ~np.isnan(excess_LD).all(axis=0)]
    spans = [_span(column, x, int(np.nanargmin(column))) for column in excess_LD.T]
    tail = expanded_tail(drawn.shape[1], level)
    low, _ = outer_quantiles(np.array([span.octaves for span in spans]), tail)
    _, high = outer_quantiles(np.array([span.most for span in spans]), tail)
    return low, high
