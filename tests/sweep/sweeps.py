"""Small sweeps, run in this process, and runs that go wrong in workers."""

import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from halfulp.errors import RunError
from halfulp.sweep.alive import watched
from halfulp.sweep.design import Design, make_design
from halfulp.sweep.one_run import Task, Trained, run_cell
from halfulp.sweep.result import Result
from halfulp.tasks import Outcome
from halfulp.train.config import TrainConfig, load_config
from halfulp.train.tree import merge

WORDS = ["loss", "round", "off", "error", "step", "bit", "scale", "block", "norm", "head"]
DULL = ("wall_seconds", "seconds")  # of a Result: what differs between two equal sweeps


def write_corpus(folder: Path, seed: int = 0) -> Path:
    """24 small texts with something to learn in them."""
    chance = random.Random(seed)
    folder.mkdir()
    for i in range(24):
        (folder / f"{i}.txt").write_text(" ".join(chance.choice(WORDS) for _ in range(300)))
    return folder


def config_of(corpus: Path, **sections: Any) -> TrainConfig:
    """Four steps of a model with one layer."""
    base = {
        "model": {"preset": "llama-tiny", "hidden": 32, "layers": 1},
        "data": {"source": [str(corpus)], "length": 16, "val_fraction": 0.1},
        "train": {
            "steps": 4, "rows": 2, "eval_every": 0, "eval_batches": 1, "checkpoint_every": 2,
            "count_every": 0, "device": "cpu",
        },
        "sharpness": {"every": 0},
    }  # fmt: skip
    return load_config(merge(base, sections))


def design_of(corpus: Path, **options: Any) -> Design:
    """Two recipes, two rates, two seeds."""
    given = {"recipes": ["fp32", "te_current"], "lrs": [1e-3, 1e-2], "seeds": 2} | options
    return make_design(given.pop("config", config_of(corpus)), **given)


def same(result: Result) -> str:
    """What two equal runs share, to the last bit; nan equals itself."""
    facts = {k: v for k, v in result.to_dict().items() if k not in DULL}
    return json.dumps(facts, sort_keys=True)


def facts_of(results: Iterable[Result]) -> dict[str, str]:
    """`same` by id; no id occurs twice."""
    results = list(results)
    found = {result.id: same(result) for result in results}
    assert len(found) == len(results)
    return found


def serially(function: Callable, next_task: Callable, **options: Any) -> Iterator[Outcome]:
    """As run_tasks, in this process."""
    while (task := next_task()) is not None:
        try:
            outcome = Outcome(task, function(task))
        except Exception as error:
            outcome = Outcome(task, error=error)
        yield outcome


def imagined(task: Task) -> Trained:
    """What a run might come to; nothing is trained."""
    cell = task.cell
    loss = 1 + cell.lr + 0.1 * cell.seed + len(cell.recipe)
    same = {"id": cell.id, "recipe": cell.recipe, "lr": cell.lr, "seed": cell.seed}
    return Trained(Result(**same, data=cell.data, status="finished", loss_nats=loss), {})


def flagged(task: Task, name: str) -> bool:
    """Whether this is the first call with that `name` in the sweep of `task`."""
    try:
        (task.path.parent / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def killed_once(task: Task) -> Trained:
    """The worker is killed in the middle of one run: it has just written a checkpoint."""
    if task.cell.recipe == "te_current" and flagged(task, "killed"):
        _at_checkpoint(lambda: os.kill(os.getpid(), signal.SIGKILL))
    return run_cell(task)


def hangs_once(task: Task) -> Trained:
    """One run hangs, without letting other threads run; but for that nothing is trained."""
    if task.cell.recipe == "te_current" and flagged(task, "hung"):
        _hold(task)
    return imagined(task)


def hangs(task: Task) -> Trained:
    """The runs of te_current at one rate hang."""
    if task.cell.recipe == "te_current" and task.cell.lr == 1e-2:
        _hold(task)
    return imagined(task)


def stops_once(task: Task) -> Trained:
    """One run is stopped from outside after a step; its own timer stands still with it."""
    if task.cell.recipe == "te_current" and flagged(task, "stopped"):
        _stop(task)
    return imagined(task)


def stops(task: Task) -> Trained:
    """The runs of te_current at one rate are stopped."""
    if task.cell.recipe == "te_current" and task.cell.lr == 1e-2:
        _stop(task)
    return imagined(task)


def starts_slowly(task: Task) -> Trained:
    """The first step of one run comes after more than `timeout_s`, the second at once."""
    if flagged(task, "slow"):
        with watched(task.path / "runs", task.cell.id, task.timeout_s) as alive:
            alive({"event": "start"})
            time.sleep(2 * task.timeout_s)
            alive({"event": "step"})
            alive({"event": "step"})
    return imagined(task)


def dies(task: Task) -> Trained:
    """The runs of te_current at one rate end their process."""
    if task.cell.recipe == "te_current" and task.cell.lr == 1e-2:
        os._exit(7)
    return imagined(task)


def full_disk(task: Task) -> Trained:
    """The machine has no room for the runs of te_current."""
    if task.cell.recipe == "te_current":
        raise RunError("cannot write to events.jsonl: No space left on device. Make room.")
    return imagined(task)


def slow(task: Task) -> Trained:
    """A run that leaves time for a signal after its first checkpoint."""
    _at_checkpoint(lambda: time.sleep(0.5))
    return run_cell(task)


def slow_imagined(task: Task) -> Trained:
    """The same, without training."""
    time.sleep(0.3)
    return imagined(task)


def blind(task: Task) -> Trained:
    """A worker that does not see the directory of the sweep."""
    from dataclasses import replace

    return run_cell(replace(task, path=Path("/nowhere/sweep")))


def _at_checkpoint(act: Callable[[], object]) -> None:
    """`act` after the next checkpoint of this process, once."""
    from halfulp.train import checkpoint

    save = checkpoint.save

    def saved(*arguments: Any, **options: Any) -> Path:
        checkpoint.save = save
        path = save(*arguments, **options)
        act()
        return path

    checkpoint.save = saved


def _hold(task: Task) -> None:
    import ctypes

    with watched(task.path / "runs", task.cell.id, task.timeout_s) as alive:
        alive({"event": "step"})
        ctypes.PyDLL(None).sleep(600)  # PyDLL keeps the lock of the interpreter


def _stop(task: Task) -> None:
    with watched(task.path / "runs", task.cell.id, task.timeout_s) as alive:
        alive({"event": "step"})
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(600)


def ray_task(what: str) -> tuple[float, float]:
    """When it ran, a short while; or what `what` says."""
    if what == "exit":
        os._exit(3)
    if what == "raise":
        raise RunError("a wrong disk")
    began = time.monotonic()
    time.sleep(0.2)
    return began, time.monotonic()


def ray_meeting(folder: Path) -> str:
    """The Ray node that this runs on, once it runs on two of them."""
    node = _marked(folder)
    _wait(lambda: len(list(folder.iterdir())) == 2)
    return node


def ray_node_that_leaves(task: tuple[str, Path]) -> str:
    """The Ray node that this runs on; (node, folder): it never ends on that node.

    Elsewhere it ends once it runs there too.
    """
    leaving, folder = task
    node = _marked(folder)
    _wait(lambda: node != leaving and (folder / leaving).exists())
    return node


def _marked(folder: Path) -> str:
    """The Ray node that this runs on, which has a file in the folder now."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (folder / node).touch()
    return node


def _wait(done: Callable[[], bool]) -> None:
    """RunError after five minutes: a loaded machine may take one to start a worker."""
    end = time.monotonic() + 300
    while not done():
        if time.monotonic() > end:
            raise RunError("waited for five minutes")
        time.sleep(0.02)
