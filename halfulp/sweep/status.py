"""How far a sweep is: done, running, failed, and the time that is left."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from halfulp import lock
from halfulp.run import Run
from halfulp.sweep.design import Cell, Design
from halfulp.sweep.order import left_out, seconds_of
from halfulp.sweep.result import Result
from halfulp.sweep.store import Stored, read_sweep


@dataclass(frozen=True)
class Running:
    """A run that is under way."""

    id: str
    step: int
    steps: int
    loss_nats: float


@dataclass(frozen=True)
class Progress:
    """How far one recipe is on one data set; `best_nats` is the lowest held-out loss so far."""

    recipe: str
    data: str
    cells: int
    finished: int
    failed: int  # nonfinite, stopped or refused
    lost: int  # stalled or died
    best_nats: float
    best_lr: float


@dataclass(frozen=True)
class Status:
    """A sweep as it stands; `seconds_left` is nan until a run is done, 0 when all are.

    `left_out`: runs that are not made because their recipe was refused.
    """

    path: Path
    rows: tuple[Progress, ...]
    running: tuple[Running, ...]
    done: int
    left_out: int
    cells: int
    seconds_left: float
    damaged: tuple[str, ...]


def status_of(path: Path) -> Status:
    """The status of the sweep at `path`; reads only. RunError where there is none."""
    stored = read_sweep(path)
    design = stored.design
    running = tuple(_running(path, design, stored.missing()))
    never = left_out(design, stored.results)
    to_run = [cell for cell in stored.missing() if cell not in never]
    rows = tuple(_row(stored, recipe, data) for data in design.data for recipe in design.recipes)
    return Status(
        path, rows, running, len(stored.results), len(never), len(design.cells()),
        seconds_left(stored.results, to_run, max(1, len(running))), stored.damaged,
    )  # fmt: skip


def seconds_left(results: Iterable[Result], missing: Iterable[Cell], jobs: int) -> float:
    """Estimate for `missing` with `jobs` at a time: each as long as runs of its recipe took."""
    results, missing = list(results), list(missing)
    if not missing:
        return 0.0
    if not any(r.status == "finished" for r in results):
        return float("nan")
    return sum(seconds_of(results, cell.recipe) for cell in missing) / jobs


def _row(stored: Stored, recipe: str, data: str) -> Progress:
    found = [r for r in stored.results if r.recipe == recipe and r.data == data]
    cells = sum(c.recipe == recipe and c.data == data for c in stored.design.cells())
    finished = [r for r in found if r.status == "finished"]
    by_lr = {
        lr: statistics.fmean(r.loss_nats for r in finished if r.lr == lr)
        for lr in {r.lr for r in finished}
    }
    best = min(by_lr, key=lambda lr: by_lr[lr], default=float("nan"))
    lost = sum(r.lost for r in found)
    failed = len(found) - len(finished) - lost
    loss = by_lr.get(best, float("nan"))
    return Progress(recipe, data, cells, len(finished), failed, lost, loss, best)


def _running(path: Path, design: Design, missing: Iterable[Cell]) -> Iterable[Running]:
    """The runs without a result that somebody is writing, by their last event."""
    for cell in missing:
        folder = path / "runs" / cell.id
        if not lock.held(folder / "writer.lock"):
            continue
        last = {}
        for event in Run(folder, writer=False).events("step", damaged=[]):
            last = event
        yield Running(
            cell.id, last.get("step", 0), design.config.train.steps,
            last.get("loss_nats", float("nan")),
        )  # fmt: skip
