"""Smaller models for longer, when they will be served: Sardana et al. 2023, arXiv:2401.00448."""

import math
from collections.abc import Callable

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN, Chinchilla
from halfulp.plan.search import minimize_log, root_log

SERVING_FLOPS = 2.0  # per parameter and token served
_STEP = 1e-4  # of the logarithm, in numerical derivatives

Loss = Callable[[float, float], float]


def total_flops(n: float, d: float, served: float) -> float:
    """Training and serving: 6 N D + 2 N T."""
    return n * (FLOPS_PER_PARAMETER_AND_TOKEN * d + SERVING_FLOPS * served)


def cheapest(law: Chinchilla, loss_nats: float, served: float) -> tuple[float, float]:
    """Parameters and tokens that reach `loss_nats` with the least compute for both.

    `served` are the tokens of inference. PlanError for a loss that the law does not reach.
    """
    n, _ = law.allocate(law.flops_for(loss_nats))
    least = (law.A / (loss_nats - law.E)) ** (1 / law.alpha)

    def tokens(m: float) -> float:
        left = loss_nats - law.E - law.A / m**law.alpha
        return (law.B / left) ** (1 / law.beta) if left > 0 else math.inf

    low = least * (1 + 1e-9)
    best = minimize_log(lambda m: total_flops(m, tokens(m), served), low, 1.001 * n)
    return best, tokens(best)


def serve_optimal(loss: Loss, flops: float, served: float, around: float) -> tuple[float, float]:
    """Parameters and tokens with 6 N D = `flops` that no cheaper pair beats once served.

    Of all pairs that reach a loss with the least 6 N D + 2 N T, the one whose training costs
    `flops`. There the loss falls as fast per FLOP through N as through D, which for the
    derivatives by the logarithms of N and D reads L_N = L_D (1 + T / (3 D)).
    `around`: the parameters without serving, from which the search goes down.
    """
    product = flops / FLOPS_PER_PARAMETER_AND_TOKEN

    def excess(n: float) -> float:
        d = product / n
        by_d = _slope(lambda x: loss(n, d * x))
        return _slope(lambda x: loss(n * x, d)) - by_d * (1 + served / (3 * d))

    found = root_log(excess, around * 1e-5, around * 1.5)
    if found is None:
        raise PlanError(
            f"no model of 6 N D = {flops:.3g} FLOPs balances {served:.3g} served tokens. "
            "Give fewer served tokens or a larger budget."
        )
    return found, product / found


def _slope(f: Callable[[float], float]) -> float:
    return (f(math.exp(_STEP)) - f(math.exp(-_STEP))) / (2 * _STEP)
