"""The incidents of a run, each with the signs before it, what was done and what it cost."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from halfulp.guard.detect import Detector, Trigger
from halfulp.guard.keeper import NEAR
from halfulp.report.course import courses
from halfulp.report.signs import Event, Sign, phases_of, signs_before
from halfulp.run import Run

NO_GUARD = "no guard"


@dataclass(frozen=True)
class Story:
    """One incident, with the fields of the event `guard`, and the signs before it.

    `recorded` is False where no guard was there and the trouble is found in the events afterwards:
    then there is no verdict, no action and no cost.
    """

    incident: Mapping[str, Any]
    signs: tuple[Sign, ...]
    recorded: bool = True

    @property
    def step(self) -> int:
        return int(self.incident["step"])

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, ready for JSON."""
        facts = {k: v for k, v in self.incident.items() if k not in ("event", "time", "map")}
        return {**facts, "recorded": self.recorded, "signs": [asdict(s) for s in self.signs]}


@dataclass(frozen=True)
class Cost:
    """What a guard costs, in steps' worth of tokens; a pass is forward and backward.

    `passes` are those of attribution; `shadows` compare gradients with the reference regularly.
    """

    withheld: float = 0.0
    replayed: float = 0.0
    passes: float = 0.0
    shadows: float = 0.0

    @property
    def steps(self) -> float:
        """All of it together."""
        return self.withheld + self.replayed + self.passes + self.shadows


@dataclass(frozen=True)
class Explained:
    """All incidents of a run, and what they cost together."""

    stories: tuple[Story, ...]
    cost: Cost
    guarded: bool
    last_step: int
    planned_steps: int
    tokens_per_step: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The cost as a share of the run; nan where its length is not known."""
        steps = self.planned_steps or self.last_step
        return self.cost.steps / steps if steps else math.nan


def explain(path: str | Path) -> Explained:
    """The incidents of the run at `path`: those of its guard, or those that one would have seen.

    RunError if there is no run.
    """
    run = Run.open(path, writer=False)
    events, config, summary = list(run.events()), run.config(), run.summary()
    guarded = was_guarded(config, events)
    vocab = vocab_of(summary)
    stories = stories_of(events, vocab) if guarded else afterwards(events, vocab)
    steps = [event for event in events if event.get("event") == "step"]
    tokens = [(e["tokens"], e["step"]) for e in steps if e.get("tokens") and e.get("step")]
    return Explained(
        stories=tuple(stories),
        cost=cost_of((story.incident for story in stories), shadows=shadows_of(events)),
        guarded=guarded,
        last_step=max((int(event["step"]) for event in steps), default=0),
        planned_steps=int((config.get("train") or {}).get("steps") or 0),
        tokens_per_step=tokens[-1][0] / tokens[-1][1] if tokens else math.nan,
        facts=summary.get("guard") or {},
    )


def was_guarded(config: Mapping[str, Any], events: Iterable[Event]) -> bool:
    """Whether a guard watched the run."""
    section = config.get("guard")
    on = isinstance(section, Mapping) and bool(section.get("on"))
    return on or any(event.get("event") == "guard" for event in events)


def vocab_of(summary: Mapping[str, Any]) -> int:
    """The number of token ids of a run; 0 where it has not said yet."""
    data = summary.get("data")
    return int(data.get("vocab") or 0) if isinstance(data, Mapping) else 0


def stories_of(events: Sequence[Event], vocab: int = 0) -> list[Story]:
    """The incidents that the guard has recorded, each with the signs in the course before it."""
    incidents = [event for event in events if event.get("event") == "guard"]
    before = courses(events)
    return [
        Story(incident, tuple(signs_before(course.events, int(incident["step"]), vocab=vocab)))
        for incident, course in zip(incidents, before, strict=False)
    ]


def cost_of(incidents: Iterable[Event], *, shadows: float = 0.0) -> Cost:
    """The costs of some incidents, added, and `shadows` beside them."""
    booked = [incident.get("cost") or {} for incident in incidents]

    def total(key: str) -> float:
        return sum(float(one.get(key, 0.0)) for one in booked)

    return Cost(total("withheld"), total("replayed"), total("passes"), shadows)


def shadows_of(events: Iterable[Event]) -> float:
    """Passes that compared gradients with those of the reference, also in withdrawn steps."""
    return 2.0 * sum(event.get("event") == "gradient_error" for event in events)


def afterwards(events: Sequence[Event], vocab: int = 0) -> list[Story]:
    """The incidents of a run without a guard, as the detector finds them in its steps.

    Triggers no farther apart than 60 steps are one incident: the first, of the highest level seen.
    """
    latest = {int(e["step"]): e for e in events if e.get("event") == "step"}
    steps = [latest[step] for step in sorted(latest)]
    found: list[list[Trigger]] = []
    for trigger in _triggers(steps, phases_of(steps), events):
        if found and trigger.step - found[-1][-1].step <= NEAR:
            found[-1].append(trigger)
        else:
            found.append([trigger])
    return [_found(group, events, vocab) for group in found]


def _triggers(steps: Sequence[Event], phases: set[int], events: Sequence[Event]) -> list[Trigger]:
    detector, found = Detector(), []
    for event in steps:
        step, loss, norm = int(event["step"]), event.get("loss_nats"), event.get("grad_norm")
        if loss is None or norm is None:
            continue
        if trigger := detector.judge(step, float(loss), float(norm)):
            found.append(trigger)
        if math.isfinite(loss) and math.isfinite(norm):
            detector.accept(float(loss), float(norm), {})
        if step in phases:
            detector.begin_phase()
    for event in events:
        if event.get("event") == "nonfinite":
            step = int(event["step"])
            found.append(Trigger("nonfinite", step, step, 1))
    return sorted(found, key=lambda trigger: trigger.step)


def _found(triggers: Sequence[Trigger], events: Sequence[Event], vocab: int) -> Story:
    first, worst = triggers[0], max(triggers, key=lambda t: (t.kind == "nonfinite", t.level))
    broken = [e for e in events if e.get("event") == "nonfinite" and e["step"] == worst.step]
    units = [str(broken[-1]["block"])] if broken and broken[-1].get("block") else []
    incident = {
        "step": first.step,
        "trigger": worst.kind,
        "onset": min(trigger.onset for trigger in triggers),
        "signals": dict(first.evidence or worst.evidence),
        "verdict": NO_GUARD,
        "units": units,
        "triggers": len(triggers),
        "last": triggers[-1].step,
        "done": [],
        "cost": {},
    }
    return Story(incident, tuple(signs_before(events, first.step, vocab=vocab)), recorded=False)
