"""Run directories as arrays: curves, held-out losses and counters, ready to compare and to draw."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halfulp.errors import RunError
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
    state: str  # "finished" | "nonfinite" | "interrupted" | "unfinished" | "empty"
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

    @property
    def broke_at(self) -> int:
        """The step that was not finite, or the last one."""
        return int(self.nonfinite.get("step", self.last_step))

    @property
    def diverged(self) -> bool:
        """The run says so, or its last loss is not finite."""
        last = self.loss.values[-1] if len(self.loss.values) else 0.0
        said = bool(self.summary.get("diverged")) or self.state == "nonfinite"
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
    events: dict[str, list[dict[str, Any]]] = {}
    order: list[str] = []
    for event in run.events():
        events.setdefault(event.get("event", ""), []).append(event)
        order.append(event.get("event", ""))
    config, summary = run.config(), run.summary()
    steps, evals = events.get("step", []), events.get("eval", [])
    last_step = max((int(e["step"]) for e in steps + evals if "step" in e), default=0)
    gemms, optimizer = _rows(events, "gemms"), _rows(events, "optimizer")
    rows = {"gemms": gemms, "optimizer": optimizer}
    start = events.get("start", [{}])[-1]
    return Record(
        path=path,
        name=path.resolve().name,
        label="",
        recipe=_recipe(summary, config, path),
        state=_state(order, events, last_step),
        last_step=last_step,
        planned_steps=_planned(config, summary),
        loss=_curve(steps, "loss_nats"),
        tokens=_curve(steps, "tokens"),
        held_out=_curve(evals, "loss_nats"),
        held_out_fp32=_curve(evals, "loss_nats_fp32"),
        counters=_counters(rows),
        peaks={name: _peak(gemms, name) for name in PEAKS},
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
        formats=_formats(rows),
    )


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


def _state(order: list[str], events: Mapping[str, list[dict[str, Any]]], last_step: int) -> str:
    marks = [kind for kind in order if kind in ("start", "end")]
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


def _speed(summary: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> float:
    """Tokens per second of the whole run; nan if it was not recorded."""
    said = summary.get("tokens_per_second")
    if isinstance(said, (int, float)):
        return float(said)
    seconds = sum(float(event.get("seconds") or 0) for event in steps)
    tokens = max((float(event.get("tokens") or 0) for event in steps), default=0.0)
    return tokens / seconds if seconds > 0 else math.nan


_Rows = list[tuple[int, Mapping[str, Any]]]


def _rows(events: Mapping[str, list[dict[str, Any]]], kind: str) -> _Rows:
    latest = {int(event["step"]): event for event in events.get("counters", ())}
    return [(step, row) for step in sorted(latest) for row in latest[step].get(kind) or ()]


def _site(row: Mapping[str, Any]) -> Site:
    name = row.get("gemm") or row.get("parameter") or row["block"]
    form = row.get("format") or row.get("weight_format") or ""
    return Site(str(row["block"]), str(name), str(row.get("operand", "")), str(form))


def _counters(rows: Mapping[str, _Rows]) -> dict[str, Counts]:
    counters = {}
    for name, (kind, hits, total) in COUNTED.items():
        held = [(step, row) for step, row in rows[kind] if hits in row and row.get(total)]
        if held:
            counters[name] = _table(held, hits, total)
    return counters


def _table(rows: _Rows, hits: str, total: str) -> Counts:
    steps = {step: j for j, step in enumerate(sorted({step for step, _ in rows}))}
    sites: dict[Site, int] = {}
    for _, row in rows:
        sites.setdefault(_site(row), len(sites))
    table = np.zeros((2, len(sites), len(steps)))
    for step, row in rows:
        i, j = sites[_site(row)], steps[step]
        # Two rows of one site and step are two micro-batches: they add.
        table[:, i, j] += float(row[hits] or 0), float(row[total])
    return Counts(np.array(list(steps), int), tuple(sites), table[0], table[1])


def _peak(rows: _Rows, name: str) -> dict[Site, float]:
    peaks: dict[Site, float] = {}
    for _, row in rows:
        value = row.get(name)
        if isinstance(value, (int, float)) and math.isfinite(value):
            peaks[_site(row)] = max(peaks.get(_site(row), 0.0), float(value))
    return peaks


def _formats(rows: Mapping[str, _Rows]) -> dict[str, tuple[str, ...]]:
    seen: dict[str, dict[str, None]] = {}
    for _, row in [*rows["gemms"], *rows["optimizer"]]:
        site = _site(row)
        if site.format:
            seen.setdefault(site.operand or "weight", {})[site.format] = None
    return {operand: tuple(formats) for operand, formats in seen.items()}


def _is_torn(file: Path) -> bool:
    if not file.exists() or file.stat().st_size == 0:
        return False
    with open(file, "rb") as lines:
        lines.seek(-1, 2)
        return lines.read() != b"\n"
