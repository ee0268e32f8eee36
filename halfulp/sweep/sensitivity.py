"""How much a wrong learning rate costs: the sensitivity of Wortsman et al. (arXiv:2309.14322)."""

from dataclasses import dataclass

import numpy as np

from halfulp.sweep.gap import best_rate
from halfulp.sweep.interval import LEVEL, Interval, mean_interval


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """Mean excess loss in nats over learning rates spread evenly in log η.

    `own` is above the recipe's own best loss: a recipe that is equally bad everywhere looks
    insensitive. `reference` is above the best loss of the reference, and does not.
    """

    own: Interval
    reference: Interval


def sensitivity(
    losses_LS: np.ndarray, reference_LS: np.ndarray, lrs: np.ndarray, level: float = LEVEL
) -> Sensitivity | None:
    """E over η in [first, last] of ℓ(η) − ℓ*, by seed, ℓ linear in log η between the rates.

    Losses [learning rates, seeds] are those of `halfulp.sweep.divergence.score_nats`: min(ℓ, ℓ_0),
    and ℓ_0 for a run without a loss. ℓ* is at the rate of the smallest mean over seeds. Seeds
    without a known outcome at every rate are left out (a mean over fewer rates is another
    quantity); None where none remains, or for a single rate.
    """
    own, reference = best_rate(losses_LS), best_rate(reference_LS)
    if own is None or reference is None or len(lrs) < 2:
        return None
    x = np.log2(lrs)
    mean_S = np.trapezoid(losses_LS, x, axis=0) / (x[-1] - x[0])
    above_own = mean_interval(mean_S - losses_LS[own], level)
    above_reference = mean_interval(mean_S - reference_LS[reference], level)
    if above_own is None or above_reference is None:
        return None
    return Sensitivity(own=above_own, reference=above_reference)
