"""How well runs predict a larger one: fit without the largest, and compare."""

import math
from dataclasses import dataclass

import numpy as np

from halfulp.errors import PlanError
from halfulp.plan.fit import Fit, Floats, fit

LARGEST = 0.4  # share of the largest compute from which on runs are left out,
TENTH = 0.9  # and a tenth of the runs at least


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """The largest runs, predicted by the others.

    * `errors` [left out]: ln(measured loss / predicted loss).
    * `reach`: their compute over the largest that was fitted.
    """

    errors: Floats
    fitted: int
    reach: float

    @property
    def error(self) -> float:
        """Root mean square of `errors`."""
        return math.sqrt(float(self.errors @ self.errors) / len(self.errors))

    @property
    def bias(self) -> float:
        """Mean of `errors`: above 0, the large runs were worse than predicted."""
        return float(self.errors.mean())


def leave_largest_out(whole: Fit) -> LeftOut:
    """The error on the runs of the largest compute, seeds and neighbors of it included.

    PlanError where the rest cannot tell five coefficients.
    """
    runs = whole.runs
    largest = runs.flops >= min(LARGEST * runs.flops.max(), np.quantile(runs.flops, TENTH))
    rest, held = runs.where(~largest), runs.where(largest)
    try:
        law = fit(rest).law
    except PlanError as error:
        raise PlanError(f"without the {len(held)} largest of {len(runs)} runs: {error}") from error
    return LeftOut(
        errors=np.log(held.loss_nats / law.loss(held.parameters, held.tokens)),
        fitted=len(rest),
        reach=float(held.flops.max() / rest.flops.max()),
    )
