"""What the guard may spend, and what it has spent: counted in steps' worth of tokens."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

HORIZON = 10_000  # steps over which rollbacks are counted
LEAST_WITHHELD = 20  # steps that may be withheld of any run, however short


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that may be spent before the guard stops the run, or falls back.

    Shares are of the steps planned. One rollback and its attribution are always affordable, so
    that short runs have a guard too.
    """

    rollbacks: int = 8  # within 10 000 steps
    wasted: float = 0.05  # steps withheld or rolled back
    raised: float = 0.3  # units raised to 16 bits or more; above it the whole model falls back
    attribution: float = 0.02  # passes of attribution


@dataclass(frozen=True)
class Exceeded:
    """A budget that is used up: its name, why, and a value with which the run could go on.

    None where the whole run would not be enough.
    """

    budget: str
    why: str
    enough: float | None

    def __str__(self) -> str:
        return self.why


@dataclass
class Spent:
    """Costs so far, in steps: `withheld`, `replayed` after rollbacks, `passes` of attribution.

    `shadows` are passes that compare gradients with those of the reference, at regular steps. A
    pass is one forward and backward pass over a batch; an update costs nothing beside it.
    """

    withheld: float = 0.0
    replayed: float = 0.0
    passes: float = 0.0
    shadows: float = 0.0
    skipped: int = 0  # batches that are never trained on
    rollbacks: list[int] = field(default_factory=list)  # steps at which the run was

    def exceeded(self, budget: Budget, steps: int) -> Exceeded | None:
        """The budget of withheld steps, if it is used up."""
        if self.withheld <= max(LEAST_WITHHELD, budget.wasted * steps):
            return None
        why = f"{self.withheld:.0f} steps were withheld, and guard.wasted = {budget.wasted:g}"
        return Exceeded("wasted", why, _twice(self.withheld, steps))

    def cannot_replay(self, budget: Budget, steps: int, step: int, more: int) -> Exceeded | None:
        """The budget that keeps the run at `step` from going back `more` steps."""
        recent = [s for s in self.rollbacks if step - s < HORIZON]
        if len(recent) >= budget.rollbacks:
            why = f"it has rolled back {len(recent)} times (guard.rollbacks = {budget.rollbacks})"
            return Exceeded("rollbacks", why, 2 * budget.rollbacks)
        wasted = self.withheld + self.replayed + more
        if recent and wasted > budget.wasted * steps:
            why = (
                f"{wasted:.0f} of {steps} steps would be wasted (guard.wasted = {budget.wasted:g})"
            )
            return Exceeded("wasted", why, _twice(wasted, steps))
        return None

    def may_attribute(self, budget: Budget, steps: int) -> bool:
        """Whether another attribution is affordable; the first always are."""
        return self.passes <= max(50.0, budget.attribution * steps)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return asdict(self)

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for key, value in state.items():
            setattr(self, key, list(value) if isinstance(value, list) else value)


def _twice(wasted: float, steps: int) -> float | None:
    """Twice the share of the run that is wasted, as a budget of at most 1; None if 1 is too low."""
    return min(1.0, math.ceil(200 * wasted / steps) / 100) if wasted <= steps else None
