"""The share of steps whose loss or gradient norm leaps out of the steps before it."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np


class Convention(NamedTuple):
    """`k` standard deviations above the mean of the `window` steps before."""

    k: float
    window: int


# OLMo 2 (arXiv:2501.00656, section 3.1) counts values 7 standard deviations away from the average
# of the last 1000; OLMo-core's StabilityMonitorCallback takes 6 above that of the last 128.
CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {"olmo2": Convention(7.0, 1000), "olmo_core": Convention(6.0, 128)}
)


def spike_score(series: Sequence[float] | np.ndarray, k: float, window: int) -> float:
    """Share of the steps with a full window before them that exceed its mean by k σ.

    σ is the population's. Only leaps upward count. A value that is not finite is a spike, and
    stays out of the windows after it. nan where no step has a full window before it, so that a run
    too short for a convention does not score 0. A window without any spread has no spikes.
    """
    spikes = is_spike(series, k, window)
    return float(spikes.mean()) if len(spikes) else float("nan")


def spike_scores(loss_nats: np.ndarray, grad_norm: np.ndarray) -> dict[str, float]:
    """convention → share of steps at which the loss or the gradient norm is a spike."""
    return {
        name: float(either.mean()) if len(either) else float("nan")
        for name, (k, window) in CONVENTIONS.items()
        for either in [is_spike(loss_nats, k, window) | is_spike(grad_norm, k, window)]
    }


def is_spike(series: Sequence[float] | np.ndarray, k: float, window: int) -> np.ndarray:
    """Whether each step from `window` on is a spike, [steps − window] (empty for a short run)."""
    values = np.asarray(series, dtype=float)
    if len(values) <= window:
        return np.zeros(0, dtype=bool)
    before = np.lib.stride_tricks.sliding_window_view(_filled(values), window)[:-1]
    mean, spread = before.mean(axis=1), before.std(axis=1)
    after = values[window:]
    # Rounding gives equal values a spread of about 1e-16 of their size.
    spread = np.where(spread > 1e-12 * np.abs(mean), spread, np.inf)
    return (after > mean + k * spread) | ~np.isfinite(after)


def _filled(values: np.ndarray) -> np.ndarray:
    """Values with the last finite one in place of what is not finite (0 before the first)."""
    finite = np.isfinite(values)
    last = np.maximum.accumulate(np.where(finite, np.arange(len(values)), -1))
    return np.where(last >= 0, values[last], 0.0)
