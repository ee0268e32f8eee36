"""Loss and compute of training in few bits: Kumar et al. 2024, arXiv:2411.04330.

The shifts n_x stand in the paper's appendix K and not in its main text; without them the same
constants give an optimum of 3.5 bits instead of the paper's 7 to 8.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import chinchilla
from halfulp.plan.laws import load_law
from halfulp.plan.search import minimize_log

PARTS = ("w", "a", "kv")  # weights, activations, keys and values of attention


@dataclass(frozen=True)
class Bits:
    """Integer bits of weights, activations, and keys and values, in the forward pass."""

    w: float = math.inf
    a: float = math.inf
    kv: float = math.inf


def parameter_share(bits: Bits, *, shifted: bool = True) -> float:
    """N_eff / N: the share of the parameters that still count.

    Raises PlanError, "unstable", for so few bits that a factor is not positive.
    """
    values = load_law("precision").coefficients
    share = 1.0
    for part in PARTS:
        factor = _factor(getattr(bits, part), part, values, shifted=shifted)
        if factor <= 0:
            raise PlanError(
                f"unstable: {getattr(bits, part):g} bits of {part} leave no effective parameters "
                f"(the law needs more than {least_bits(part):.2f}). Give more bits."
            )
        share *= factor
    return share


def _factor(bits: float, part: str, values: Mapping[str, float], *, shifted: bool) -> float:
    shift = values[f"n_{part}"] if shifted else 0.0
    return -math.expm1(-bits / values[f"gamma_{part}"] + shift)


def least_bits(part: str) -> float:
    """The bits of `part` (w, a or kv) at and below which training is unstable by the law."""
    values = load_law("precision").coefficients
    return values[f"gamma_{part}"] * values[f"n_{part}"]


def precision_loss(n: float, d: float, bits: Bits) -> float:
    """The loss in nats/token of `n` parameters (without embeddings) after `d` tokens."""
    return chinchilla("precision").loss(n * parameter_share(bits), d)


def optimal_bits(*, shifted: bool = True) -> float:
    """The bits of all three parts with the most effective parameters for the compute.

    Compute is taken as proportional to N P, so that the optimum maximizes N_eff / (N P); it does
    not depend on the exponents of the law.
    """
    values = load_law("precision").coefficients
    least = max(least_bits(part) for part in PARTS) if shifted else 0.0

    def waste(bits: float) -> float:
        factors = [_factor(bits, part, values, shifted=shifted) for part in PARTS]
        return bits / math.prod(factors)

    return minimize_log(waste, least + 0.05, 32.0)


def ptq_loss(n: float, d: float, bits: float) -> float:
    """Loss in nats/token added by quantizing the weights of a BF16 model to `bits` after training.

    Grows with the tokens: models that were trained for longer are harder to quantize.
    """
    c = load_law("ptq").coefficients
    size = c["C_T"] * d ** c["gamma_D"] / n ** c["gamma_N"]
    return size * math.exp(-bits / c["gamma_post"] + c["b"])
