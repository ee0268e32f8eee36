"""The runs behind guard.py: clean ones, and one for each fault of the drill, side by side.

A run without a fault writes a checkpoint right before the step of the fault, and those with a fault
go on from there. Its answer to trouble is that of the guard, none, or to withhold every update that
OLMo's rule calls an outlier.
"""

import gzip
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from guard_detectors import OlmoSkipStep

from halfulp.errors import NonFiniteError, StoppedError
from halfulp.guard.attribute import UNKNOWN, Verdict
from halfulp.guard.detect import Trigger
from halfulp.guard.host import Pass
from halfulp.guard.incident import SKIP, Incident
from halfulp.run import Run
from halfulp.train.checkpoint import path_of
from halfulp.train.config import TrainConfig
from halfulp.train.drill import FAULT_AFTER, config_of_drill, faults_of
from halfulp.train.guard import SessionGuard
from halfulp.train.loop import train
from halfulp.train.session import Session

DRILLED = "te_delayed"  # the recipe of the runs with faults
_KEPT = ("step", "trigger", "verdict", "units", "action", "done", "signals")  # of an incident
Result = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One run; `answer` is guard, nothing, skip, or off for a run that has no guard at all.

    `fault` is "" in a clean run, which `at`, the step of the fault, makes the base of others.
    """

    recipe: str
    seed: int
    steps: int
    answer: str
    fault: str = ""
    at: int = 0  # 1-based; 0 = a clean run that nothing goes on from

    @property
    def name(self) -> str:
        what = self.fault or ("base" if self.at else "clean")
        return f"{self.recipe}-{self.steps}-{self.seed}-{what}-{self.answer}"

    @property
    def base(self) -> "Task":
        """The run that this one goes on from."""
        return Task(self.recipe, self.seed, self.steps, "guard", at=self.at)

    def config(self, out: Path) -> TrainConfig:
        """That of the drill, with a check at the default interval."""
        section = {"seed": self.seed, "steps": self.steps, "device": "cpu", "count_every": 50}
        section |= {"eval_every": 0, "eval_batches": 16, "checkpoint_every": max(0, self.at - 1)}
        changes = {"policy": {"recipe": self.recipe}, "train": section}
        changes |= {"guard": {"on": self.answer != "off"}, "run": {"out": str(out)}}
        return config_of_drill(changes)


def fault_step(steps: int) -> int:
    """The (1-based) step of the fault in a run of `steps`, as in a drill."""
    return round(FAULT_AFTER * steps) + 1


@dataclass
class Log:
    """What every step showed before its update, and which updates a rule withheld."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    held: list[int] = field(default_factory=list)

    def note(self, step: int, seen: Pass) -> None:
        """Keep six digits of everything."""
        known = {"step": step, "loss": _short(seen.loss), "grad_norm": _short(seen.norm)}
        units = {name: _short(value) for name, value in seen.units.items()}
        weights = {name: _short(value) for name, value in seen.weights.items()}
        self.steps.append({**known, "units": units, "weights": weights})

    def fill(self, steps: int) -> None:
        """As a loop without a guard goes on once a gradient is not a number: nothing else is."""
        last = self.steps[-1]
        nothing = {kind: dict.fromkeys(last[kind], math.nan) for kind in ("units", "weights")}
        for step in range(last["step"] + 1, steps + 1):
            self.steps.append({"step": step, "loss": math.nan, "grad_norm": math.nan, **nothing})


class Watched(SessionGuard):
    """The guard; the log gets every step that it judges."""

    def __init__(self, session: Session, log: Log) -> None:
        super().__init__(session)
        self.log = log

    def judge(self, step: int, seen: Pass) -> Trigger | None:
        self.log.note(step, seen)
        return super().judge(step, seen)


class Alone(Watched):
    """No guard, but for a rule that withholds updates: the step is over, the batch gone."""

    def __init__(self, session: Session, log: Log, rule: OlmoSkipStep | None) -> None:
        super().__init__(session, log)
        self.rule = rule

    def judge(self, step: int, seen: Pass) -> Trigger | None:
        self.log.note(step, seen)
        rule = self.rule
        alarm = rule is not None and rule.observe(step, seen.loss, seen.norm, seen.units)
        return Trigger("spike", step, step, 1) if alarm else None

    def respond(self, trigger: Trigger, seen: Pass) -> Incident:
        self.log.held.append(trigger.step)
        self.session.step += 1
        self.session.cursor.advance()
        return Incident(trigger, Verdict(UNKNOWN), 1, SKIP, self.session.step)

    def begin(self) -> None:
        pass

    def accept(self, seen: Pass) -> None:
        pass

    def check(self, gemms: Sequence[object], optimizer: Sequence[object]) -> None:
        pass

    def keep(self) -> None:
        pass


def run(task: Task, work: Path, past: Sequence[Mapping[str, Any]] = ()) -> Result:
    """Train: final held-out loss, incidents, parameters' digest, steps; `past`: of the base.

    The loss is NaN after one that is not finite, None where the guard has stopped the run.
    """
    out, log, more = work / task.name, Log([*map(dict, past)]), dict[str, Any]()
    shutil.rmtree(out, ignore_errors=True)
    config = task.config(out)
    if task.fault:
        shutil.copytree(work / task.base.name, out)
        fault = faults_of(config)[task.fault](task.at)
        more = {"resume": out, "from_step": task.at - 1, "faults": [fault]}
    with _answering(task, log):
        try:
            loss = train(config, command=("benchmark",), **more).loss_nats
        except (NonFiniteError, StoppedError) as error:
            loss = None if isinstance(error, StoppedError) else math.nan
            log.fill(task.steps)
    last = path_of(out / "checkpoints", task.steps) / "model.safetensors"
    digest = hashlib.sha256(last.read_bytes()).hexdigest() if last.exists() else ""
    found = Run.open(out, writer=False).events("guard")
    incidents = [{key: event[key] for key in _KEPT} for event in found]
    if task.fault or not task.at:
        shutil.rmtree(out)
    known = {"name": task.name, "loss": loss, "held": log.held, "digest": digest}
    return {**known, "incidents": incidents, "steps": log.steps if _needed(task) else []}


def all_of(tasks: Iterable[Task], work: Path, jobs: int) -> dict[str, Result]:
    """The results of `tasks` and their bases by name; those that `work` holds are not run again."""
    done, wanted = _read(work), list(tasks)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that are started
    _warm_up(wanted[0], work)
    bases = {task.base.name: task.base for task in wanted if task.fault}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for some in (list(bases.values()), wanted):
            todo = [task for task in some if task.name not in done]
            pasts = [_past(task, done) for task in todo]
            futures = [
                pool.submit(run, task, work, past)
                for task, past in zip(todo, pasts, strict=True)
            ]  # fmt: skip
            for i, future in enumerate(as_completed(futures), 1):
                result = future.result()
                done[result["name"]] = result
                _keep(work, result)
                print(f"{i} of {len(todo)}: {result['name']}", file=sys.stderr, flush=True)
    return done


@contextmanager
def _answering(task: Task, log: Log) -> Iterator[None]:
    """Sessions that are opened inside have the guard that `task` asks for."""
    if task.answer == "off":
        yield
        return

    def opened(session: Session) -> SessionGuard:
        if task.answer == "guard":
            return Watched(session, log)
        rule = OlmoSkipStep() if task.answer == "skip" else None
        if rule is not None:
            for s in log.steps:
                rule.observe(s["step"], s["loss"], s["grad_norm"], s["units"])
        return Alone(session, log, rule)

    with mock.patch("halfulp.train.open.open_guard", opened):
        yield


def _needed(task: Task) -> bool:
    """Whether somebody reads the steps: of what no one has answered, and of bases."""
    return task.answer == "nothing" or bool(task.at and not task.fault)


def _past(task: Task, done: Mapping[str, Result]) -> list[dict[str, Any]]:
    steps = done[task.base.name]["steps"] if task.fault else []
    return [step for step in steps if step["step"] < task.at]


def _warm_up(task: Task, work: Path) -> None:
    """Build the kernel and the token file once, before several processes would."""
    from halfulp.data import open_data
    from halfulp.numerics import kernel

    kernel.status()
    open_data(task.config(work).data.corpus(), kernel.cache_directory() / "data")


def _read(work: Path) -> dict[str, Result]:
    path = work / "results.jsonl.gz"
    if not path.exists():
        return {}
    with gzip.open(path, "rt") as lines:
        return {result["name"]: result for result in map(json.loads, lines)}


def _keep(work: Path, result: Result) -> None:
    with gzip.open(work / "results.jsonl.gz", "at") as lines:
        lines.write(json.dumps(result) + "\n")


def _short(value: float) -> float:
    return float(f"{value:.6g}")
