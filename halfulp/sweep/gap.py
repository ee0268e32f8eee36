"""The loss that a recipe costs at equal tokens, paired with the reference by seed.

Arrays are [learning rates, seeds], nan where a run has no known outcome; a pair shares
initialization, data order and tokens.
"""

from dataclasses import dataclass

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
    other seeds (cross-fitting), and no seed takes part in a choice that it is judged at.
    """
    seeds = range(losses_LS.shape[1])
    pairs = [_held_out(losses_LS, s) - _held_out(reference_LS, s) for s in seeds]
    return _gap(np.array(pairs), level)


def _held_out(losses_LS: np.ndarray, seed: int) -> float:
    """The loss of `seed` at the rate that is best on the other seeds; nan where there is none."""
    rate = best_rate(np.delete(losses_LS, seed, axis=1))
    return float("nan") if rate is None else float(losses_LS[rate, seed])


def _gap(differences: np.ndarray, level: float) -> Gap | None:
    interval = mean_interval(differences, level)
    if interval is None:
        return None
    plain = bootstrap(differences[~np.isnan(differences)])
    return Gap(**vars(interval), bootstrap=(plain.low, plain.high))
