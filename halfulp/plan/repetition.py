"""What repeated tokens are worth: Muennighoff et al. 2023, arXiv:2305.16264, equations 5 and 6."""

import math
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN, Chinchilla, chinchilla
from halfulp.plan.laws import load_law
from halfulp.plan.search import minimize_log

FEW_EPOCHS = 16  # above, what the law promises has not been seen often enough


@dataclass(frozen=True)
class Repetition:
    """A law of the loss whose tokens beyond the unique ones, and parameters with them, fade.

    `tokens_decay` and `parameters_decay` are the numbers of repetitions after which the value of
    another one has fallen to 1/e.
    """

    law: Chinchilla
    tokens_decay: float
    parameters_decay: float

    def loss(self, n: float, d: float, unique: float = math.inf) -> float:
        """The loss of `n` parameters after `d` tokens of which `unique` are different."""
        return self.law.loss(*self.effective(n, d, unique))

    def effective(self, n: float, d: float, unique: float) -> tuple[float, float]:
        """Parameters and tokens of the same loss in a run that repeats nothing.

        Tokens are worth at most `unique` * (1 + tokens_decay), however often they are repeated.
        Raises PlanError where `unique` is not positive.
        """
        if not unique > 0:
            raise PlanError(f"{unique:g} unique tokens train nothing. Give a positive number.")
        if math.isinf(unique):
            return n, d
        useful = min(n, self.law.parameters_for(unique))
        return (
            _faded(n, useful, self.parameters_decay),
            _faded(d, min(d, unique), self.tokens_decay),
        )

    def allocate(self, flops: float, unique: float = math.inf) -> tuple[float, float]:
        """The parameters and tokens of the least loss with 6 N D = `flops`."""
        n, d = self.law.allocate(flops)
        if math.isinf(unique):
            return n, d
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        best = minimize_log(lambda m: self.loss(m, product / m, unique), n / 1e4, n * 1e3)
        return best, product / best


def _faded(total: float, first: float, decay: float) -> float:
    return first + first * decay * -math.expm1(-(total / first - 1) / decay)


def repetition(law: Chinchilla | None = None) -> Repetition:
    """The published decay of repetitions, with the paper's own law of the loss or with `law`."""
    values = load_law("muennighoff").coefficients
    return Repetition(law or chinchilla("muennighoff"), values["R_D"], values["R_N"])
