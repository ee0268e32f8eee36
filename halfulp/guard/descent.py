"""The way down the ladder: a raised unit comes down a rung where its gradient shows that it may."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfulp.guard.attribute import PRECISION, Verdict
from halfulp.guard.host import Host
from halfulp.guard.ladder import Ladder
from halfulp.policy import Policy

PROBATION = 200  # steps after a descent
TRUSTED_ERROR, TRUSTED_COSINE, SHADOWS = 0.5, 0.9, 3


@dataclass(frozen=True)
class Descent:
    """What shadow runs say about a unit; `lowered` is its new recipe if it came down."""

    verdict: Verdict
    words: str
    lowered: Mapping[str, str] = field(default_factory=dict)


def due(ladder: Ladder, step: int, last_loud: int) -> str | None:
    """The first unit whose lock has run out, after as many quiet steps; None if there is none."""
    for unit, stand in ladder.stands.items():
        free = stand.climbs and not stand.permanent and step >= stand.lock_until
        if free and step - last_loud >= stand.lock and not ladder.fallback:
            return unit
    return None


def try_lower(host: Host, ladder: Ladder, unit: str, step: int) -> Descent:
    """One rung down if gradients of the lower rung agree with those of the present one."""
    stand, before = ladder.stands[unit], ladder.recipe_of(unit)
    last = ladder.descend(unit)
    lower = ladder.policy()
    stand.climbs = [*stand.climbs, last]
    higher = ladder.policy()
    rows = tuple(_shadow(host, unit, lower, higher, turn) for turn in range(SHADOWS))
    verdict = Verdict(PRECISION, (unit,), rows=rows, passes=2.0 * SHADOWS)
    if not all(r["gradient_error"] < TRUSTED_ERROR and r["cosine"] > TRUSTED_COSINE for r in rows):
        stand.lock_until = step + stand.lock
        words = f"{unit} stays on {before}: its gradient at the lower rung is not good enough"
        return Descent(verdict, words)
    ladder.descend(unit)
    stand.probation_until = step + PROBATION
    host.apply(lower)
    now = ladder.recipe_of(unit)
    words = f"{unit} brought down from {before} to {now}, {PROBATION} steps on probation"
    return Descent(verdict, words, {unit: now})


def _shadow(host: Host, unit: str, lower: Policy, higher: Policy, turn: int) -> dict[str, Any]:
    """A batch ahead in both precisions: how far the unit's gradients are apart."""
    host.apply(lower)
    host.replay(fresh=turn + 1, keep=True)
    host.apply(higher)
    found = host.replay(fresh=turn + 1, compare=True)
    norm = found.units.get(unit, 0.0)
    error = found.differences[unit] / norm if norm else 0.0
    return {"unit": unit, "gradient_error": error, "cosine": found.cosines[unit]}
