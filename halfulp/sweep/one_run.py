"""One run of a sweep, in a worker: trained, measured, and never left hanging."""

import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfulp.errors import (
    ConfigError,
    DataError,
    FormatError,
    NonFiniteError,
    PolicyError,
    StoppedError,
)
from halfulp.sweep.alive import watched
from halfulp.sweep.design import Cell, Design
from halfulp.sweep.result import Result
from halfulp.sweep.store import is_sweep, read_design, write_policies

REFUSALS = (ConfigError, FormatError, PolicyError)  # the model or the data cannot take the recipe


@dataclass(frozen=True)
class Task:
    """A cell to run in the sweep at `path`; `timeout_s` is the longest time between two events.

    `data`: the digest of its data set, which is to be the same on every machine.
    `afresh`: from its first step, whatever an earlier try has left.
    """

    path: Path
    design: Mapping[str, Any]  # of Design.to_dict
    digest: str
    cell: Cell
    timeout_s: float
    data: str
    afresh: bool = False


@dataclass(frozen=True)
class Trained:
    """A result, and the run's files where the worker does not see the sweep's directory."""

    result: Result | None  # None: interrupted, to be gone on with
    files: Mapping[str, bytes]


def run_cell(task: Task) -> Trained:
    """Train and measure one cell; goes on after the newest checkpoint where there is one.

    A recipe that diverges or that the model cannot take is a result. What is wrong with the
    machine is raised: OSError, DataError, KernelError, MissingExtraError, RunError.
    """
    design = Design.from_dict(task.design)
    if _sees(task):
        return Trained(_result(design, task, task.path), {})
    with tempfile.TemporaryDirectory() as folder:
        elsewhere = Path(folder)
        write_policies(elsewhere / "policies", design)
        result = _result(design, task, elsewhere)
        return Trained(result, _files(elsewhere / "runs" / task.cell.id))


def _sees(task: Task) -> bool:
    """Whether the sweep's directory is the one here, and not just one of the same name."""
    return is_sweep(task.path) and read_design(task.path).digest() == task.digest


def _files(path: Path) -> dict[str, bytes]:
    files = path.iterdir() if path.is_dir() else ()  # none where the recipe was refused
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def _result(design: Design, task: Task, path: Path) -> Result | None:
    out, before = path / "runs" / task.cell.id, time.perf_counter()
    status, message = "finished", ""
    try:
        with watched(path / "runs", task.cell.id, task.timeout_s) as alive:
            reason = _train(design, task, out, path / "policies", alive)
        if reason == "interrupted":
            return None
    except NonFiniteError as error:
        status, message = "nonfinite", str(error)
    except StoppedError as error:
        status, message = "stopped", str(error)
    except REFUSALS as error:
        status, message = "refused", str(error)
    return _measured(task.cell, status, message, out, time.perf_counter() - before)


def _train(design: Design, task: Task, out: Path, policies: Path, alive: Any) -> str:
    from halfulp.train import checkpoint
    from halfulp.train.loop import train

    _check_data(design, task)
    config = design.config_of(task.cell, out, policies)
    begun = (out / "config.toml").is_file() and bool(checkpoint.steps_in(out / "checkpoints"))
    started = begun and not task.afresh
    command = ("halfulp", "sweep")
    resume = out if started else None
    return train(config, resume=resume, force=not started, command=command, on_event=alive).reason


def _check_data(design: Design, task: Task) -> None:
    from halfulp.data import open_data
    from halfulp.numerics.kernel import cache_directory

    section = design.data_of(task.cell.data)
    if open_data(section.corpus(), cache_directory() / "data").digest != task.data:
        raise DataError(
            f"the data set {task.cell.data} ({', '.join(section.source)}) is not the same here as "
            "where the sweep began. Give every machine the same files."
        )


def _measured(cell: Cell, status: str, message: str, out: Path, seconds: float) -> Result:
    from halfulp.sweep.measure import measure

    facts = measure(out) if (out / "events.jsonl").is_file() else {}
    return Result(
        id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
        status=status, message=message, wall_seconds=seconds, **facts,
    )  # fmt: skip
