"""The guard itself: from a trigger to a verdict, an answer and its cost, for any training loop.

Detector and numeric rules say that something is wrong, attribution says who, and a ladder of
answers what to do:

0. raise the guilty unit one rung;
1. withhold the update, and skip the batch or repeat it;
2. go back to a good snapshot and skip the data in question;
3. the same, and raise the guilty units, or lower their learning rates;
4. the whole model in the fallback recipe, from an older snapshot;
5. stop.

Trouble of the same kind at the same place is answered one rung higher each time.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from halfulp.guard.attribute import (
    DATA,
    HARDWARE,
    PRECISION,
    STATE,
    UNKNOWN,
    Verdict,
    attribute,
)
from halfulp.guard.budget import Budget, Exceeded, Spent
from halfulp.guard.descent import due, try_lower
from halfulp.guard.detect import Detector, Trigger
from halfulp.guard.host import Host, Pass
from halfulp.guard.incident import BACK, LOWER, RAISE, RETRY, SKIP, STOP, Incident
from halfulp.guard.ladder import FALLBACK, Ladder
from halfulp.guard.numeric import STORAGE, Finding, Numeric
from halfulp.guard.ring import Ring, Snapshot

ROLLBACK = 100  # steps before the onset to which a run goes back
MEMORY = 1000  # steps in which trouble at the same place is answered one rung higher
NEAR = 60  # onsets that are no farther apart are the same place
SKIP_BEFORE, SKIP_AFTER = 5, 20  # batches around the trouble that are skipped with it
SLOWER, REWARM = 0.7, 100  # factor on a learning rate, and steps to come back to it from 0


@dataclass
class Keeper:
    """The guard of one run of `steps` steps; `on_incident` receives every incident.

    Each step: `judge` before the update; where it gives a trigger, `respond` to it and do the step
    again from where the host then is; otherwise update and `accept`. `check` takes the findings of
    numeric rules.
    """

    host: Host
    ladder: Ladder
    steps: int
    budget: Budget = field(default_factory=Budget)
    on_incident: Callable[[Incident], None] = lambda _: None
    ring: Ring = field(default_factory=Ring)
    detector: Detector = field(default_factory=Detector)
    spent: Spent = field(default_factory=Spent)
    past: list[dict[str, Any]] = field(default_factory=list)  # step, onset, verdict, units, level
    rates: dict[str, list[float]] = field(default_factory=dict)  # unit → [factor, step since when]
    jumped: str = ""  # the parameter that a trigger of the kind "weight" is about
    last_loud: int = 0  # last step with anything remarkable

    def begin(self, step: int) -> None:
        """The run begins, or goes on, after `step` finished steps."""
        if not self.ring.snapshots:
            self.snapshot(step)

    def judge(self, step: int, found: Pass) -> Trigger | None:
        """What the (1-based) `step` shows before its update."""
        if jump := self.detector.jump(step, found.weights):
            trigger, self.jumped = jump
            return trigger
        return self.detector.judge(step, found.loss, found.norm)

    def accept(self, step: int, found: Pass) -> None:
        """The update of `step` has been made."""
        if not self.detector.is_quiet(found.loss, found.norm):
            self.last_loud = step
        self.detector.accept(found.loss, found.norm, found.units, found.weights)
        self.ring.settle(step)

    def keep(self, step: int) -> None:
        """Take a snapshot after `step` finished steps, if one is due."""
        if self.ring.due(step):
            self.snapshot(step)

    def snapshot(self, step: int) -> None:
        """Keep the run as it is after `step` finished steps."""
        tensors, facts = self.host.capture()
        facts = {**facts, "detector": self.detector.state()}
        self.ring.put(Snapshot(step, tensors, facts))

    def respond(self, trigger: Trigger, seen: Pass) -> Incident:
        """Attribute, act and book; the host is afterwards where the run is to go on."""
        verdict = self._attribute(trigger, seen, {})
        level = self._level(trigger, verdict)
        incident = self._act(trigger, verdict, level)
        return self._book(incident)

    def check(self, step: int, suspects: Mapping[str, float], **how: Any) -> Incident | None:
        """Raise the units that a numeric rule names (unit → value over threshold), if it can.

        `how` may say `storage`, `backward` (see Ladder.climb) and `signals`, the numbers to show.
        None if they all stand on the highest rung that would help.
        """
        signals = how.pop("signals", {})
        free = {u: x for u, x in suspects.items() if self.ladder.next(u, **how)}
        if not free:
            return None
        trigger = Trigger("numeric", step, step, 0, signals)
        if how.get("storage"):
            rows = tuple({"unit": u, "over_threshold": x} for u, x in free.items())
            verdict = Verdict(PRECISION, tuple(free), rows=rows)
        else:
            verdict = self._attribute(trigger, None, free)
            verdict = _only(verdict, free)
        return self._book(self._raise(trigger, verdict, 0, RAISE, **how))

    def heed(self, step: int, findings: Iterable[Finding], numeric: Numeric) -> bool:
        """Raise the units that findings of the level "act" name; whether there were any.

        Rules on storage and on GEMMs are answered apart: another rung may be the next for each.
        """
        acts = [finding for finding in findings if finding.level == "act"]
        for storage in (False, True):
            chosen = [f for f in acts if (f.rule in STORAGE) == storage]
            if chosen:
                self._heed(step, chosen, numeric, storage=storage)
        return bool(acts)

    def _heed(
        self, step: int, findings: Sequence[Finding], numeric: Numeric, *, storage: bool
    ) -> None:
        units, suspects = self.ladder.units, dict[str, float]()
        for f in findings:
            over = f.value / f.threshold if f.threshold else math.inf
            unit = units.of[f.block]
            suspects[unit] = max(over, suspects.get(unit, 0.0))
        incident = self.check(
            step,
            suspects,
            storage=storage,
            backward=any(f.backward for f in findings),
            signals={f"{f.rule} of {f.place}": f.value for f in findings},
        )
        for unit in incident.raised if incident else ():
            for block in units.blocks.get(unit, units.of):
                numeric.forget(block)

    def descend(self, step: int) -> Incident | None:
        """Bring one unit whose lock has run out down a rung, if a shadow run says that it holds."""
        unit = due(self.ladder, step, self.last_loud)
        if unit is None:
            return None
        found = try_lower(self.host, self.ladder, unit, step)
        self.spent.passes += found.verdict.passes
        trigger, raised = Trigger("lock", step, step, 0), found.lowered
        return self._book(
            self._incident(trigger, found.verdict, 0, LOWER, found.words, raised=raised)
        )

    def factors(self, step: int) -> dict[str, float]:
        """Factor on the learning rate of each slowed unit for the step after `step`."""
        return {
            unit: factor * min(1.0, (step + 1 - since) / REWARM)
            for unit, (factor, since) in self.rates.items()
        }

    def state(self) -> dict[str, Any]:
        """Everything but the snapshots, as plain values."""
        return {
            "detector": self.detector.state(),
            "ladder": self.ladder.state(),
            "spent": self.spent.state(),
            "past": [dict(p) for p in self.past],
            "rates": {unit: list(pair) for unit, pair in self.rates.items()},
            "last_loud": self.last_loud,
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; the policy in force and the rates are put back by the host."""
        self.detector.load(state["detector"])
        self.ladder.load(state["ladder"])
        self.spent.load(state["spent"])
        self.past = [dict(p) for p in state["past"]]
        self.rates = {unit: list(pair) for unit, pair in state["rates"].items()}
        self.last_loud = state["last_loud"]

    def _attribute(
        self, trigger: Trigger, seen: Pass | None, suspects: Mapping[str, float]
    ) -> Verdict:
        if trigger.kind == "weight":  # the state itself has been seen to change
            unit = self.ladder.units.parameters[self.jumped]
            rows = ({"unit": unit, "parameter": self.jumped, **trigger.evidence},)
            return Verdict(STATE, (unit,), rows=rows, margin=math.inf)
        if not self.spent.may_attribute(self.budget, self.steps):
            evidence = {"not attributed": f"guard.attribution = {self.budget.attribution:g}"}
            return Verdict(UNKNOWN, tuple(suspects), evidence=evidence)
        verdict = attribute(self.host, trigger, self.detector, seen=seen, suspects=suspects)
        self.spent.passes += verdict.passes
        return verdict

    def _level(self, trigger: Trigger, verdict: Verdict) -> int:
        """The rung of the answer: the trigger's, and one more for each time it did not help."""
        recent = [p for p in self.past if trigger.step - p["step"] < MEMORY]
        if verdict.kind == HARDWARE:
            times = sum(p["verdict"] == HARDWARE for p in recent)
            return 5 if times >= 3 else 1
        if verdict.kind == PRECISION:
            if self._can_raise(verdict.units):
                return trigger.level
            return 4 if self.ladder.would_gain(FALLBACK) else max(2, trigger.level)
        if verdict.kind == DATA:
            return trigger.level
        same = [p for p in recent if abs(p["onset"] - trigger.onset) <= NEAR]
        same = [p for p in same if p["verdict"] in (STATE, UNKNOWN)]
        return min(5, max([trigger.level, *(p["level"] + 1 for p in same)]))

    def _act(self, trigger: Trigger, verdict: Verdict, level: int) -> Incident:
        if over := self.spent.exceeded(self.budget, self.steps):
            return self._stop(trigger, verdict, over)
        if level >= 5:
            return self._stop(trigger, verdict, "nothing that the guard can do has helped")
        if level == 4:
            return self._fall_back(trigger, verdict)
        if verdict.kind == HARDWARE:
            return self._incident(trigger, verdict, level, RETRY, "the batch is repeated")
        if verdict.kind == PRECISION and self._can_raise(verdict.units):
            return self._raise(trigger, verdict, level, BACK if level >= 2 else RETRY)
        if verdict.kind == STATE or level >= 2:
            return self._go_back(trigger, verdict, level)
        skipped = self.host.skip(trigger.step, trigger.step)
        self.spent.skipped += skipped
        return self._incident(trigger, verdict, level, SKIP, "the batch is skipped for good")

    def _raise(
        self, trigger: Trigger, verdict: Verdict, level: int, action: str, **how: Any
    ) -> Incident:
        how.setdefault("backward", verdict.backward)
        raised, step = {}, trigger.step
        for unit in verdict.units:
            if self.ladder.next(unit, **how):
                raised[unit] = self.ladder.climb(unit, step, **how)
        # Where nothing is broken yet and the fallback is no better, more may be raised than that.
        too_many = self.ladder.share_high() > self.budget.raised
        if too_many and (trigger.kind != "numeric" or self.ladder.would_gain(FALLBACK)):
            return self._fall_back(trigger, verdict)
        self.host.apply(self.ladder.policy())
        done = [f"{unit} raised to {recipe}" for unit, recipe in raised.items()]
        if action == BACK:
            return self._go_back(trigger, verdict, level, done=done, raised=raised)
        return self._incident(trigger, verdict, level, action, *done, raised=raised)

    def _go_back(
        self,
        trigger: Trigger,
        verdict: Verdict,
        level: int,
        *,
        done: Sequence[str] = (),
        raised: Mapping[str, str] | None = None,
    ) -> Incident:
        """Restore a snapshot; by the level also skip data and lower learning rates."""
        margin = 1 if level == 1 else ROLLBACK if level < 4 else 2 * ROLLBACK
        snapshot = self.ring.before(trigger.onset - margin)
        if snapshot is None:
            return self._stop(trigger, verdict, "there is no good snapshot to go back to")
        replayed = trigger.step - 1 - snapshot.step
        if over := self.spent.cannot_replay(self.budget, self.steps, trigger.step, replayed):
            return self._stop(trigger, verdict, over)
        words = list(done)
        if level >= 2 and verdict.kind not in (PRECISION,):
            last = trigger.step + max(SKIP_AFTER, trigger.step - trigger.onset)
            skipped = self.host.skip(trigger.onset - SKIP_BEFORE, last)
            self.spent.skipped += skipped
            words.append(f"{skipped} batches from step {trigger.onset - SKIP_BEFORE} skipped")
        self._restore(snapshot)
        self.spent.replayed += replayed
        self.spent.rollbacks.append(trigger.step)
        words.append(f"rolled back to step {snapshot.step}")
        if level >= 3 and verdict.kind == STATE:
            words += self._slow_down(verdict.units, snapshot.step)
        return self._incident(trigger, verdict, level, BACK, *words, raised=raised or {})

    def _restore(self, snapshot: Snapshot) -> None:
        self.host.restore(snapshot)
        self.detector.load(snapshot.facts["detector"])
        self.ring.forget_after(snapshot.step)
        for stand in self.ladder.stands.values():  # locks are kept in steps that have to be made
            stand.lock_until = min(stand.lock_until, snapshot.step + stand.lock)

    def _slow_down(self, units: Sequence[str], step: int) -> list[str]:
        units = list(units) or list(self.ladder.units.names)
        for unit in units:
            factor, _ = self.rates.get(unit, [1.0, 0])
            self.rates[unit] = [factor * SLOWER, step]
        names = ", ".join(units) if len(units) <= 4 else f"{len(units)} units"
        return [f"learning rate of {names} × {SLOWER:g}, warmed up again over {REWARM} steps"]

    def _fall_back(self, trigger: Trigger, verdict: Verdict) -> Incident:
        """The whole model in the fallback recipe, from an older snapshot."""
        if self.ladder.fallback or not self.ladder.would_gain(FALLBACK):
            return self._stop(trigger, verdict, "the whole model is in high precision already")
        self.ladder.fallback = FALLBACK
        self.host.apply(self.ladder.policy())
        words, raised = f"the whole model falls back to {FALLBACK}", {"*": FALLBACK}
        if trigger.kind == "numeric":  # nothing has happened yet that would have to be undone
            return self._incident(trigger, verdict, 4, RAISE, words, raised=raised)
        return self._go_back(trigger, verdict, 4, done=[words], raised=raised)

    def _stop(self, trigger: Trigger, verdict: Verdict, why: str | Exceeded) -> Incident:
        incident = self._incident(trigger, verdict, 5, STOP, str(why))
        return replace(incident, exceeded=why if isinstance(why, Exceeded) else None)

    def _can_raise(self, units: Sequence[str]) -> bool:
        return any(self.ladder.next(unit) for unit in units)

    def _incident(
        self,
        trigger: Trigger,
        verdict: Verdict,
        level: int,
        action: str,
        *done: str,
        raised: Mapping[str, str] | None = None,
    ) -> Incident:
        held = action in (RETRY, SKIP, BACK, STOP) and trigger.kind not in ("numeric", "lock")
        self.spent.withheld += held
        to = self.ring.snapshots[-1].step if action == BACK else trigger.step - held
        cost = {"withheld": float(held), "passes": verdict.passes}
        cost["replayed"] = float(trigger.step - held - to)
        return Incident(trigger, verdict, level, action, to, done, raised or {}, cost)

    def _book(self, incident: Incident) -> Incident:
        trigger, verdict = incident.trigger, incident.verdict
        self.last_loud = max(self.last_loud, incident.step)
        if incident.action != LOWER:
            self.past = [p for p in self.past if trigger.step - p["step"] < MEMORY]
            self.past.append(
                {
                    "step": trigger.step,
                    "onset": trigger.onset,
                    "verdict": verdict.kind,
                    "units": list(verdict.units),
                    "level": incident.level,
                }
            )
        if trigger.kind not in ("numeric", "lock"):
            self.ring.disturb()
        self.on_incident(incident)
        return incident


def _only(verdict: Verdict, units: Mapping[str, float]) -> Verdict:
    """A verdict on a numeric trigger names units that the rules have named."""
    named = tuple(u for u in verdict.units if u in units) or tuple(units)
    return replace(verdict, kind=PRECISION, units=named)
