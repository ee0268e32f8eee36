"""The loss that a recipe costs at equal tokens, paired with the reference by seed.

Arrays are [learning rates, seeds], nan where a run has no known outcome; a pair shares
initialization, data order and tokens.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from halfulp.sweep.interval import LEVEL, Interval, bootstrap, mean_interval


@dataclass(frozen=True, kw_only=True)
class Gap(Interval):
    """Nats above the reference; `bootstrap`: ends of the plain percentile bootstrap at 95 %.

    With few seeds that one is too short (see halfulp.sweep.interval); `low` and `high` hold.
    """

    bootstrap: tuple[float, float]


def best_rate(losses_LS: np.ndarray) -> int | None:
    """The index of the smallest mean over the known seeds; None where no outcome is known."""
    means = mean_losses(losses_LS)
    return None if np.isnan(means).all() else int(np.nanargmin(means))


def mean_losses(losses_LS: np.ndarray) -> np.ndarray:
    """Means over the known seeds, the last axis; nan where none is known."""
    counts = (~np.isnan(losses_LS)).sum(axis=-1)
    return np.where(counts, np.nansum(losses_LS, axis=-1), np.nan) / np.maximum(counts, 1)


def gap_at(
    losses_LS: np.ndarray, reference_LS: np.ndarray, rate: int, level: float = LEVEL
) -> Gap | None:
    """The gap with both at the learning rate `rate`; None without a pair.

    At the reference's best rate it is chosen in the reference's favor, on the same seeds: the gap
    is on the high side by what that selection is worth.
    """
    return _gap(losses_LS[rate] - reference_LS[rate], level)


def gap_at_best(
    losses_LS: np.ndarray, reference_LS: np.ndarray, level: float = LEVEL
) -> Gap | None:
    """The gap with each at its own best learning rate; None without a pair.

    The smallest of several noisy means is too small. So the rates of each seed are chosen on the
    other seeds (cross-fitting), and no seed takes part in a choice that it is judged at. Where the
    seeds do not all choose the same, their differences share noise through the choices, and the
    interval is wider by √(1 + n / (n − 1)): the variance of a mean over held-out parts, here one
    seed of n (Nadeau and Bengio 2003).
    """
    seeds = range(losses_LS.shape[1])
    chosen = [(_choice(losses_LS, s), _choice(reference_LS, s)) for s in seeds]
    pairs = zip(seeds, chosen, strict=True)
    found = [_at(losses_LS, a, s) - _at(reference_LS, b, s) for s, (a, b) in pairs]
    gap = _gap(np.array(found), level)
    known = {c for c, difference in zip(chosen, found, strict=True) if not math.isnan(difference)}
    return gap if gap is None or len(known) < 2 else _wider(gap, math.sqrt(1 + gap.n / (gap.n - 1)))


def _choice(losses_LS: np.ndarray, seed: int) -> int | None:
    """The rate that is best on the seeds other than `seed`."""
    return best_rate(np.delete(losses_LS, seed, axis=1))


def _at(losses_LS: np.ndarray, rate: int | None, seed: int) -> float:
    return math.nan if rate is None else float(losses_LS[rate, seed])


def _wider(gap: Gap, factor: float) -> Gap:
    low, high = (gap.value + factor * (end - gap.value) for end in (gap.low, gap.high))
    return replace(gap, low=low, high=high)


def _gap(differences: np.ndarray, level: float) -> Gap | None:
    interval = mean_interval(differences, level)
    if interval is None:
        return None
    plain = bootstrap(differences[~np.isnan(differences)])
    return Gap(**vars(interval), bootstrap=(plain.low, plain.high))
