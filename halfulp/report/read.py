"""Run directories as arrays: curves, held-out losses and counters, ready to compare and to draw."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halfulp.errors import RunError
from halfulp.guard.incident import STOP
from halfulp.report.course import Course, Event, course_of
from halfulp.report.incidents import (
    Cost,
    Story,
    cost_of,
    shadows_of,
    stories_of,
    vocab_of,
    was_guarded,
)
from halfulp.run import Run


@dataclass(frozen=True)
class Curve:
    """A number per step; steps are increasing and distinct."""

    steps: np.ndarray
    values: np.ndarray

    def finite(self) -> "Curve":
        """The part that can be drawn and averaged."""
        keep = np.isfinite(self.values)
        return Curve(self.steps[keep], self.values[keep])


class Site(NamedTuple):
    """Where a counter counts: `block`, the GEMM or parameter, the operand ("" for parameters)."""

    block: str
    name: str
    operand: str
    format: str


@dataclass(frozen=True)
class Counts:
    """How many elements were hit, out of how many; both [sites, steps], 0 where not recorded."""

    steps: np.ndarray
    sites: tuple[Site, ...]
    hits: np.ndarray
    total: np.ndarray


@dataclass(frozen=True)
class Record:
    """What one run directory says; `label` names the run in sentences, tables and figures."""

    path: Path
    name: str
    label: str
    recipe: str
    state: str  # "finished" | "nonfinite" | "stopped" | "interrupted" | "unfinished" | "empty"
    last_step: int
    planned_steps: int  # 0 = the configuration does not say
    loss: Curve
    tokens: Curve
    held_out: Curve
    held_out_fp32: Curve
    counters: Mapping[str, Counts]
    peaks: Mapping[str, Mapping[Site, float]]  # "stale", "underflow_energy": largest per site
    nonfinite: Mapping[str, Any]
    tokens_per_second: float
    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    command: tuple[str, ...]
    torn: bool
    skipped_steps: int  # by the loss scale
    stages: tuple[tuple[int, str], ...]  # first step and recipe of every stage of a schedule
    formats: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # operand → formats seen
    sharpness: tuple[Mapping[str, Any], ...] = ()  # its events, by step
    lr_ratios: tuple[Mapping[str, Any], ...] = ()  # its events, as they came
    guarded: bool = False  # a guard watched the run
    stories: tuple[Story, ...] = ()  # its incidents
    shadows: float = 0.0  # passes in which it compared gradients
    withdrawn: tuple[Curve, ...] = ()  # training losses that a rollback took back, one curve each

    @property
    def broke_at(self) -> int:
        """The step that was not finite, or the last one."""
        if self.stopped is not None:
            return self.stopped.step
        return int(self.nonfinite.get("step", self.last_step))

    @property
    def stopped(self) -> Story | None:
        """The incident at which the guard stopped the run, if it did."""
        ended = self.state == "stopped" and self.stories
        return self.stories[-1] if ended and self.stories[-1].incident["action"] == STOP else None

    @property
    def cost(self) -> Cost:
        """What the guard has spent."""
        return cost_of((story.incident for story in self.stories), shadows=self.shadows)

    @property
    def cost_share(self) -> float:
        """The same as a share of the run; nan where its length is not known."""
        steps = self.planned_steps or self.last_step
        return self.cost.steps / steps if steps else math.nan

    @property
    def diverged(self) -> bool:
        """The run says so, its guard stopped it, or its last loss is not finite."""
        last = self.loss.values[-1] if len(self.loss.values) else 0.0
        said = bool(self.summary.get("diverged")) or self.state in ("nonfinite", "stopped")
        return said or bool(self.nonfinite) or not math.isfinite(last)


# Counter → rows that hold it, field with the hits, field with what they are out of.
COUNTED = {
    "lost_updates": ("optimizer", "lost_updates", "asked"),
    "underflow": ("gemms", "underflow", "n"),
    "saturation": ("gemms", "saturated", "n"),
    "v_underflow": ("optimizer", "v_underflow", "n"),
}
PEAKS = ("stale", "underflow_energy")


def read_runs(paths: Sequence[str | Path]) -> list[Record]:
    """One record per path, in order, with labels that tell them apart.

    RunError if there is no path, one is given twice, or one is not a run.
    """
    if not paths:
        raise RunError("a report needs at least one run directory and got none. Name one.")
    resolved = [Path(path).resolve() for path in paths]
    for path in resolved:
        if resolved.count(path) > 1:
            raise RunError(f"{path} is given twice. Name every run once.")
    return _label([_read(Path(path)) for path in paths])


def _label(records: list[Record]) -> list[Record]:
    recipes = [record.recipe for record in records]
    names = [record.name for record in records]
    labeled = []
    for record in records:
        name = record.name
        if names.count(name) > 1:
            name = f"{record.path.resolve().parent.name}/{name}"
        alone = recipes.count(record.recipe) == 1
        label = record.recipe if alone else f"{record.recipe} ({name})"
        labeled.append(replace(record, name=name, label=label))
    return labeled


def _read(path: Path) -> Record:
    run = Run.open(path, writer=False)
    every = list(run.events())
    course = course_of(every)
    events: dict[str, list[Event]] = {}
    for event in course.events:
        events.setdefault(event.get("event", ""), []).append(event)
    config, summary = run.config(), run.summary()
    steps, evals = events.get("step", []), events.get("eval", [])
    last_step = max((int(e["step"]) for e in steps + evals if "step" in e), default=0)
    counted = events.get("counters", [])
    tallies = {kind: _Tally(counted, kind) for kind in ("gemms", "optimizer")}
    start = events.get("start", [{}])[-1]
    return Record(
        path=path,
        name=path.resolve().name,
        label="",
        recipe=_recipe(summary, config, path),
        state=_state(course, events, last_step),
        last_step=last_step,
        planned_steps=_planned(config, summary),
        loss=_curve(steps, "loss_nats"),
        tokens=_curve(steps, "tokens"),
        held_out=_curve(evals, "loss_nats"),
        held_out_fp32=_curve(evals, "loss_nats_fp32"),
        counters=_counters(tallies),
        peaks={name: tallies["gemms"].peaks(name) for name in PEAKS},
        nonfinite=events.get("nonfinite", [{}])[-1],
        tokens_per_second=_speed(summary, steps),
        summary=summary,
        config=config,
        environment=run.environment(),
        command=tuple(start.get("command") or run.environment().get("command") or ()),
        skipped_steps=sum(bool(event.get("skipped")) for event in events.get("loss_scale", ())),
        stages=tuple(
            (int(event["step"]), str(event["recipe"])) for event in events.get("schedule", ())
        ),
        torn=_is_torn(run.path / "events.jsonl"),
        formats=_formats(tallies.values()),
        sharpness=_latest(events.get("sharpness", ())),
        lr_ratios=tuple(events.get("lr_ratios", ())),
        stories=tuple(stories_of(every, vocab_of(summary))),
        guarded=was_guarded(config, every),
        shadows=shadows_of(every),
        withdrawn=tuple(_curve(_only_steps(taken), "loss_nats") for taken in course.withdrawn),
    )


def _only_steps(events: Iterable[Event]) -> list[Event]:
    return [event for event in events if event.get("event") == "step"]


def _recipe(summary: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> str:
    if summary.get("recipe"):
        return str(summary["recipe"])
    policy = config.get("policy")
    asked = policy if isinstance(policy, Mapping) else {"recipe": policy}
    named = asked.get("recipe") or Path(str(asked.get("file") or "")).stem
    # A configuration with a policy section that names nothing trains in fp32.
    return str(named or ("fp32" if "policy" in config else path.resolve().name))


def _planned(config: Mapping[str, Any], summary: Mapping[str, Any]) -> int:
    train = config.get("train")
    steps = train.get("steps") if isinstance(train, Mapping) else None
    return int(steps or summary.get("steps") or 0)


def _state(course: Course, events: Mapping[str, list[Event]], last_step: int) -> str:
    kinds = (event.get("event", "") for event in course.events)
    marks = [kind for kind in kinds if kind in ("start", "end")]
    if not last_step and "nonfinite" not in events:
        return "empty"
    if marks and marks[-1] == "end":
        return str(events["end"][-1].get("reason", "finished"))
    return "nonfinite" if "nonfinite" in events else "unfinished"


def _curve(events: Iterable[Mapping[str, Any]], key: str) -> Curve:
    # A step that was repeated after a resume counts once: the last time.
    values = {int(e["step"]): e[key] for e in events if e.get(key) is not None and "step" in e}
    steps = sorted(values)
    return Curve(np.array(steps, int), np.array([float(values[s]) for s in steps], float))


def _latest(events: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
    """One event per step, the last, in the order of steps."""
    latest = {int(event["step"]): event for event in events}
    return tuple(latest[step] for step in sorted(latest))


def _speed(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second of the whole run; nan if it was not recorded."""
    said = summary.get("tokens_per_second")
    if isinstance(said, (int, float)):
        return float(said)
    seconds = sum(float(event.get("seconds") or 0) for event in steps)
    tokens = max((float(event.get("tokens") or 0) for event in steps), default=0.0)
    return tokens / seconds if seconds > 0 else math.nan


class _Tally:
    """Counter rows of one kind ("gemms" or "optimizer") gathered by site, in one pass."""

    def __init__(self, events: Iterable[Mapping[str, Any]], kind: str):
        # A step that was repeated after a resume counts once: the last time.
        latest = {int(event["step"]): event for event in events}
        self.steps = sorted(latest)
        self.sites: dict[Site, int] = {}
        self.rows: list[tuple[int, int, Mapping[str, Any]]] = []  # site, step, row; as indices
        known: dict[tuple[Any, ...], int] = {}
        for j, step in enumerate(self.steps):
            for row in latest[step].get(kind) or ():
                key = tuple(map(row.get, _IDENTITY))
                if key not in known:
                    known[key] = self.sites.setdefault(_site(row), len(self.sites))
                self.rows.append((known[key], j, row))

    def counts(self, hits: str, total: str) -> Counts | None:
        """Two fields as tables, over the sites and steps that have them; None if there are none."""
        held = [(i, j, row) for i, j, row in self.rows if row.get(total) and hits in row]
        if not held:
            return None
        where = np.array([(i, j) for i, j, _ in held])
        table = np.zeros((2, len(self.sites), len(self.steps)))
        # Two rows of one site and step are two parts of one tensor: they add.
        for layer, name in zip(table, (hits, total), strict=True):
            values = [float(row[name] or 0) for _, _, row in held]
            np.add.at(layer, (where[:, 0], where[:, 1]), values)
        rows, columns = (np.flatnonzero(table[1].any(axis=axis)) for axis in (1, 0))
        sites, inside = list(self.sites), np.ix_(rows, columns)
        steps = np.array(self.steps)[columns]
        return Counts(steps, tuple(sites[i] for i in rows), table[0][inside], table[1][inside])

    def peaks(self, name: str) -> dict[Site, float]:
        """The largest finite value of a field per site."""
        peaks: dict[int, float] = {}
        for i, _, row in self.rows:
            value = row.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                peaks[i] = max(peaks.get(i, 0.0), float(value))
        sites = list(self.sites)
        return {sites[i]: value for i, value in peaks.items()}


_IDENTITY = ("block", "gemm", "parameter", "operand", "format", "weight_format")


def _site(row: Mapping[str, Any]) -> Site:
    name = row.get("gemm") or row.get("parameter") or row["block"]
    form = row.get("format") or row.get("weight_format") or ""
    return Site(str(row["block"]), str(name), str(row.get("operand", "")), str(form))


def _counters(tallies: Mapping[str, _Tally]) -> dict[str, Counts]:
    tables = {key: tallies[kind].counts(*names) for key, (kind, *names) in COUNTED.items()}
    return {key: counts for key, counts in tables.items() if counts is not None}


def _formats(tallies: Iterable[_Tally]) -> dict[str, tuple[str, ...]]:
    seen: dict[str, dict[str, None]] = {}
    for site in (site for tally in tallies for site in tally.sites if site.format):
        seen.setdefault(site.operand or "weight", {})[site.format] = None
    return {operand: tuple(formats) for operand, formats in seen.items()}


def _is_torn(file: Path) -> bool:
    if not file.exists() or file.stat().st_size == 0:
        return False
    with open(file, "rb") as lines:
        lines.seek(-1, 2)
        return lines.read() != b"\n"
