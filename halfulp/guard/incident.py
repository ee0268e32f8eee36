"""An incident: a trigger, the verdict on it, what the guard did, and what it cost."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfulp.guard.attribute import Verdict
from halfulp.guard.budget import Exceeded
from halfulp.guard.detect import Trigger

RETRY, SKIP, BACK, RAISE, LOWER, STOP = "retry", "skip", "roll back", "raise", "lower", "stop"


@dataclass(frozen=True)
class Incident:
    """One trigger, the verdict on it, what was done, and what it cost (in steps' worth).

    `action` is retry, skip, roll back, raise, lower or stop; `done` says it in words.
    """

    trigger: Trigger
    verdict: Verdict
    level: int
    action: str
    step: int  # finished steps of the run after the action
    done: tuple[str, ...] = ()
    raised: Mapping[str, str] = field(default_factory=dict)  # unit → recipe
    cost: Mapping[str, float] = field(default_factory=dict)
    exceeded: Exceeded | None = None  # the budget that made it stop

    def fields(self) -> dict[str, Any]:
        """The incident as fields of an event."""
        verdict = self.verdict
        return {
            "step": self.trigger.step,
            "trigger": self.trigger.kind,
            "onset": self.trigger.onset,
            "signals": dict(self.trigger.evidence),
            "verdict": verdict.kind,
            "units": list(verdict.units),
            "evidence": dict(verdict.evidence),
            "rows": [dict(row) for row in verdict.rows],
            "margin": verdict.margin,
            "level": self.level,
            "action": self.action,
            "to": self.step,
            "done": list(self.done),
            "raised": dict(self.raised),
            "cost": dict(self.cost),
        }
