"""The loss as a sum of powers, L = E + A/N^alpha + B/D^beta, and its closed forms at C = 6 N D.

Hoffmann et al. 2022, arXiv:2203.15556, equations 2 and 4.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

from halfulp.errors import PlanError
from halfulp.plan.laws import law_names, load_law

if TYPE_CHECKING:
    import numpy as np

FLOPS_PER_PARAMETER_AND_TOKEN = 6.0


@dataclass(frozen=True)
class Chinchilla:
    """N in parameters, D in tokens, losses in nats per token."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float

    @overload
    def loss(self, n: float, d: float) -> float: ...
    @overload
    def loss(self, n: "np.ndarray", d: "np.ndarray") -> "np.ndarray": ...
    def loss(self, n, d):
        """The loss of `n` parameters after `d` tokens; numbers, or arrays of one shape."""
        return self.E + self.A / n**self.alpha + self.B / d**self.beta

    @property
    def exponent(self) -> float:
        """a in N* ∝ C^a."""
        return self.beta / (self.alpha + self.beta)

    @property
    def balance(self) -> float:
        """G of Hoffmann's equation 4."""
        return (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))

    def allocate(self, flops: float) -> tuple[float, float]:
        """The parameters and tokens of the least loss with 6 N D = `flops`.

        Raises PlanError for a budget that is no positive number.
        """
        if not (math.isfinite(flops) and flops > 0):
            raise PlanError(f"{flops:g} FLOPs cannot be spent. Give a positive number.")
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        n = self.balance * product**self.exponent
        return n, product / n

    def flops_for(self, loss: float) -> float:
        """The least FLOPs that reach `loss`.

        Along the optimum N = G P^a and D = P^(1-a)/G with P = C/6, so that both terms fall with the
        same power of P and the loss has an exact inverse.
        Raises PlanError for a loss at or below E, which no budget reaches.
        """
        if not (math.isfinite(loss) and loss > self.E):
            raise PlanError(
                f"a loss of {loss:g} nats/token is out of reach: this law ends at {self.E:.4g} "
                "however much is spent. Give a larger target."
            )
        power = self.alpha * self.exponent
        scale = self.A / self.balance**self.alpha + self.B * self.balance**self.beta
        return FLOPS_PER_PARAMETER_AND_TOKEN * (scale / (loss - self.E)) ** (1 / power)

    def parameters_for(self, tokens: float) -> float:
        """The parameters for which `tokens` are the compute-optimal number of tokens."""
        return self.balance * (tokens * self.balance) ** (self.exponent / (1 - self.exponent))


def chinchilla(name: str = "epoch") -> Chinchilla:
    """The law `name` of laws.toml that has this form; PlanError for one that has not."""
    law = load_law(name)
    values = dict(law.coefficients)
    for symbol in ("E", "A", "B"):
        if f"ln_{symbol}" in values:
            values[symbol] = math.exp(values[f"ln_{symbol}"])
    symbols = ("E", "A", "B", "alpha", "beta")
    if not all(symbol in values for symbol in symbols):
        known = [n for n in law_names() if {"alpha", "beta"} <= load_law(n).coefficients.keys()]
        raise PlanError(
            f"law {name!r} is no sum of powers of N and D. Those are: {', '.join(known)}."
        )
    return Chinchilla(*(values[symbol] for symbol in symbols))
