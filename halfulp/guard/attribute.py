"""Who is to blame: the withheld batch again, in the same and in the reference arithmetic.

Another result from the same batch is the hardware; a reference pass that is as bad is the data, or
where fresh data is as bad too, the state; the rest is precision, and switching one unit at a time
to fp32 tells which.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from halfulp.guard.detect import Detector, Trigger
from halfulp.guard.host import ALL, Host, Pass

PRECISION, DATA, STATE, HARDWARE, UNKNOWN = (
    "precision",
    "data",
    "state or learning rate",
    "hardware",
    "could not tell",
)
CANDIDATES = 4  # units that are switched to fp32 one at a time
EXPLAINED = 0.8  # share of the excess that the guilty units must explain
APART = 2.0  # times the growth of the next unit, from which one is to blame for the state
NOISE = 1 / math.sqrt(3)  # relative gradient error from which a backward pass is useless
_EQUAL = 1e-3  # relative difference of two equal passes where the kernels are not deterministic


@dataclass(frozen=True)
class Verdict:
    """Who is to blame, with a row of evidence per unit looked at; `passes` is what it cost.

    `margin` is the gain of the first unit over that of the next one; inf without a next one.
    """

    kind: str
    units: tuple[str, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    rows: tuple[Mapping[str, Any], ...] = ()
    margin: float = math.nan
    passes: float = 0.0  # forward and backward passes
    backward: bool = True  # the backward pass is to blame too


class _Case:
    """One attribution under way: its host and what has been spent."""

    def __init__(self, host: Host, trigger: Trigger, detector: Detector) -> None:
        self.host, self.trigger, self.detector = host, trigger, detector
        self.passes = 0.0
        self.evidence: dict[str, Any] = {}

    def look(self, name: str, **how: Any) -> Pass:
        self.passes += 1.0 if how.get("backward", True) else 1 / 3
        found = self.host.replay(**how)
        if name:
            self.evidence[name] = {"loss": found.loss, "norm": found.norm}
        return found

    def verdict(self, kind: str, units: Sequence[str] = (), **more: Any) -> Verdict:
        return Verdict(
            kind, tuple(units), evidence=self.evidence, passes=round(self.passes, 2), **more
        )


def attribute(
    host: Host,
    trigger: Trigger,
    detector: Detector,
    *,
    seen: Pass | None,
    suspects: Mapping[str, float] | None = None,
) -> Verdict:
    """The verdict on the step of `trigger`, whose update is withheld.

    `seen` is the pass that was withheld, None where the update has been made (numeric triggers);
    `suspects` are units that a numeric rule has named, with how far each is above its threshold.
    """
    case = _Case(host, trigger, detector)
    again = case.look("same arithmetic", keep=True)
    differs = seen is not None and not _equal(seen, again, exact=host.deterministic)
    if seen is not None and (differs or trigger.kind == "irreproducible"):
        case.evidence["seen"] = {"loss": seen.loss, "norm": seen.norm}
        unit = host.differing_unit()
        case.passes += 2 / 3
        persistent = not _equal(again, case.look(""), exact=host.deterministic)
        case.evidence["persistent"] = persistent
        return case.verdict(HARDWARE, [unit] if unit else [])
    reference = case.look("reference", off=ALL, compare=True)
    errors = _errors(reference)
    if not suspects and (other := _not_precision(case, again, reference, errors)):
        return other
    return _name_units(case, again, reference, errors, suspects or {})


def _not_precision(
    case: _Case, again: Pass, reference: Pass, errors: Mapping[str, float]
) -> Verdict | None:
    """Data or state, where the reference arithmetic is no better; None where precision is left."""
    detector = case.detector
    if case.trigger.kind in ("sustained", "divergence"):
        # The weights have moved by now: what the last steps did to the gradients must tell.
        excess = again.loss - detector.best_short
        helps = again.loss - reference.loss >= 0.5 * excess > 0
        noisy = any(_finite(error) >= NOISE for error in errors.values())
        return None if helps or noisy else _state(case, reference)
    if not detector.is_outlier(reference.loss, reference.norm):
        return None
    fresh = case.look("fresh batch, reference", off=ALL, fresh=1)
    if detector.is_outlier(fresh.loss, fresh.norm):
        return _state(case, fresh)
    return case.verdict(DATA)


def _state(case: _Case, found: Pass) -> Verdict:
    """The state, and the unit that broke or whose gradient has grown most over its mean."""
    if case.trigger.kind == "nonfinite" and (broken := case.host.broken_unit()):
        case.passes += 1
        return case.verdict(STATE, [broken])
    growth = case.detector.growth(found.units)
    rows = [{"unit": unit, "growth": value} for unit, value in list(growth.items())[:CANDIDATES]]
    first, second = [*growth.values(), math.nan, math.nan][:2]
    margin = first / second if second else math.inf
    # All units grow alike after a wrong learning rate: then none is to blame.
    named = list(growth)[:1] if first > 1 and not margin < APART else []
    return case.verdict(STATE, named, rows=tuple(rows), margin=margin)


def _name_units(
    case: _Case,
    again: Pass,
    reference: Pass,
    errors: Mapping[str, float],
    suspects: Mapping[str, float],
) -> Verdict:
    """The smallest set of units whose fp32 removes most of the excess, or those that are noise."""
    # Of units that are equally wrong, the backward pass has met the last ones first.
    order = {unit: i for i, unit in enumerate(errors)}
    scored = sorted(errors, key=lambda u: (-_finite(errors[u]), -order[u]))
    candidates = [*suspects, *(u for u in scored if u not in suspects)][:CANDIDATES]
    gains = _leave_one_in(case, again, reference, candidates)
    growth = case.detector.growth(again.units)
    rows = tuple(
        {
            "unit": unit,
            "gain": gains[unit],
            "gradient_error": errors.get(unit, math.nan),
            "growth": growth.get(unit, math.nan),
            "over_threshold": suspects.get(unit, 0.0),
        }
        for unit in candidates
    )
    ranked = sorted(gains, key=lambda u: -gains[u])
    guilty = _smallest(ranked, gains, case.evidence["excess"])
    noisy = [unit for unit in scored if _finite(errors[unit]) >= NOISE]
    first, second = ([gains[unit] for unit in ranked] + [0.0])[:2]
    margin = first / second if second > 0 else math.inf
    if suspects:
        # Where the loss does not mind (yet), or minds others more, the counters name the unit.
        both = [u for u in suspects if u in noisy or u in guilty] or list(suspects)
        if first <= 0 or ranked[0] not in suspects:
            margin = _margin_of_gradient(case, reference, candidates, suspects)
            case.evidence["margin of"] = "gradient"
        return case.verdict(PRECISION, both, rows=rows, margin=margin)
    if guilty:
        backward = any(unit in noisy for unit in guilty)
        return case.verdict(PRECISION, guilty, rows=rows, margin=margin, backward=backward)
    if noisy:
        return case.verdict(PRECISION, noisy[:CANDIDATES], rows=rows)
    return case.verdict(UNKNOWN, rows=rows)


def _margin_of_gradient(
    case: _Case, reference: Pass, candidates: Sequence[str], suspects: Collection[str]
) -> float:
    """By how many times more a suspect in fp32 mends the whole gradient than the next unit; or nan.

    The gradient tells where a loss does not that is the same or, on one batch, better by chance.
    """
    case.look("", off=ALL, keep=True)
    wrong = _length(reference.differences)
    found = {u: case.look("", off=(u,), compare=True) for u in candidates}
    gains = {u: wrong - _length(p.differences) for u, p in found.items()}
    ranked = sorted(gains, key=lambda u: -gains[u])
    first, second = ([gains[u] for u in ranked] + [0.0])[:2]
    if ranked[0] not in suspects or first <= 0:
        return math.nan
    return first / second if second > 0 else math.inf


def _length(parts: Mapping[str, float]) -> float:
    return math.hypot(*map(_finite, parts.values()))


def _leave_one_in(
    case: _Case, again: Pass, reference: Pass, candidates: Sequence[str]
) -> dict[str, float]:
    """By how much each unit alone in fp32 makes the step better."""
    in_gradient = math.isfinite(again.loss) and not math.isfinite(again.norm)
    case.evidence["excess"] = _excess(again, reference, in_gradient)
    return {
        unit: _excess(again, case.look("", off=(unit,), backward=in_gradient), in_gradient)
        for unit in candidates
    }


def _excess(again: Pass, other: Pass, in_gradient: bool) -> float:
    """By how much `again` is worse: in nats, or in gradient norm where only that is broken."""
    if in_gradient:
        return _finite(again.norm) - _finite(other.norm)
    return _finite(again.loss) - _finite(other.loss)


def _smallest(ranked: Sequence[str], gains: Mapping[str, float], excess: float) -> list[str]:
    """The first units whose gains add up to EXPLAINED of the excess; empty if none helps."""
    guilty: list[str] = []
    explained = 0.0
    for unit in ranked:
        if gains[unit] <= 0 or explained >= EXPLAINED * excess:
            break
        guilty.append(unit)
        explained += gains[unit]
    return guilty


def _errors(reference: Pass) -> dict[str, float]:
    """Relative error of each unit's gradient: ‖g_lp − g_hp‖ / ‖g_hp‖."""
    norms = reference.units
    return {u: d / norms[u] if norms[u] else 0.0 for u, d in reference.differences.items()}


def _equal(a: Pass, b: Pass, *, exact: bool) -> bool:
    pairs = [(a.loss, b.loss), (a.norm, b.norm)]
    if exact:
        return all(x == y or (math.isnan(x) and math.isnan(y)) for x, y in pairs)
    return all(
        math.isclose(x, y, rel_tol=_EQUAL) or (math.isnan(x) and math.isnan(y)) for x, y in pairs
    )


def _finite(value: float) -> float:
    """`value`, or one that is larger than all losses where it is not finite."""
    return value if math.isfinite(value) else 1e30
