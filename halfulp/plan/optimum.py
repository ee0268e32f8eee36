"""The parameters and tokens of a budget or a target, with all that shifts them."""

import math
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import FLOPS_PER_PARAMETER_AND_TOKEN
from halfulp.plan.floating import Layout, penalty
from halfulp.plan.in_use import LawInUse
from halfulp.plan.inference import serve_optimal
from halfulp.plan.search import minimize_log, root_log

_DOUBLINGS = 20  # how far above the plain law's compute a target is looked for


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A law, how many tokens are different, how many will be served, and the format."""

    law: LawInUse
    unique: float = math.inf
    served: float = 0.0
    layout: Layout | None = None

    def penalty(self, n: float, d: float) -> float:
        """Nats per token that the format adds."""
        return 0.0 if self.layout is None else penalty(n, d, self.layout)

    def loss(self, n: float, d: float) -> float:
        """Nats per token with everything."""
        return self.law.loss(n, d, self.unique) + self.penalty(n, d)

    def optimum(self, flops: float) -> tuple[float, float]:
        """Parameters and tokens with 6 N D = `flops`: of the least loss, or, with served tokens,
        those that no pair of the same loss undercuts in training and serving together."""
        n, d = self.law.plain.allocate(flops)
        product = flops / FLOPS_PER_PARAMETER_AND_TOKEN
        if math.isfinite(self.unique) or self.layout is not None:
            n = minimize_log(lambda m: self.loss(m, product / m), n / 1e4, n * 1e3)
            d = product / n
        if self.served:
            return serve_optimal(self.loss, flops, self.served, around=n)
        return n, d

    def least_loss(self, flops: float) -> float:
        """The loss of `optimum`."""
        return self.loss(*self.optimum(flops))

    def flops_for(self, loss_nats: float) -> float:
        """The least training FLOPs whose optimum reaches `loss_nats`.

        Raises PlanError for a loss that is not reached, whatever is spent.
        """
        low = self.law.plain.flops_for(loss_nats)
        if self.least_loss(low) <= loss_nats * (1 + 1e-12):
            return low
        high = low
        for _ in range(_DOUBLINGS):
            high *= 2
            if self.least_loss(high) <= loss_nats:
                break
        else:
            raise PlanError(self._out_of_reach(loss_nats))
        found = root_log(lambda c: self.least_loss(c) - loss_nats, high / 2, high)
        return high if found is None else found

    def _out_of_reach(self, loss_nats: float) -> str:
        causes = []
        if math.isfinite(self.unique):
            causes.append(f"{self.unique:.3g} unique tokens")
        if self.layout is not None:
            causes.append("this format")
        return (
            f"a loss of {loss_nats:g} nats/token is out of reach with {' and '.join(causes)}: not "
            f"even {2**_DOUBLINGS:.0e} times the compute of the plain law suffices. "
            "Give a larger target, more unique tokens or a wider format."
        )
