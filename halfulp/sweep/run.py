"""Run a sweep to its end: every cell once, a result after each, and go on where it was left."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfulp.errors import ConfigError, HalfulpError, RunError
from halfulp.sweep.alive import Watch
from halfulp.sweep.design import Design, make_design
from halfulp.sweep.one_run import Task, Trained, run_cell
from halfulp.sweep.order import next_cell, seconds_of
from halfulp.sweep.preflight import cannot_compare, preflight
from halfulp.sweep.result import Result
from halfulp.sweep.store import Store, check_place, open_store
from halfulp.tasks import Outcome, run_tasks

if TYPE_CHECKING:
    from halfulp.sweep.table import Table
    from halfulp.train.config import TrainConfig

TRIES = 2  # of a run whose process ends or hangs: the machine may be at fault once
GPU_SHARE = 0.25  # of a GPU for each run: four share it
OnEvent = Callable[[Mapping[str, Any]], None]


def sweep(
    config: "TrainConfig | str | Path",
    *,
    recipes: Sequence[str],
    lrs: Sequence[float],
    seeds: int | Sequence[int] = 3,
    reference: str = "",
    data: Mapping[str, Sequence[str]] | None = None,
    guard: bool = False,
    out: str | Path = "sweep",
    jobs: int = 0,
    time_s: float = 0.0,
    timeout_s: float = 600.0,
    ray: str = "",
    force: bool = False,
    on_event: OnEvent | None = None,
) -> "Table":
    """Train every recipe × learning rate × seed × data set, and say what came of it.

    A sweep at `out` of the same design is gone on with. See `make_design` for the grid and
    `run_design` for the execution and its errors.
    """
    from halfulp.train.config import TrainConfig, load_config

    config = config if isinstance(config, TrainConfig) else load_config(config)
    design = make_design(
        config, recipes=recipes, lrs=lrs, seeds=seeds, reference=reference, data=data, guard=guard
    )
    return run_design(
        design, Path(out), jobs=jobs, time_s=time_s, timeout_s=timeout_s, ray=ray, force=force,
        on_event=on_event,
    )  # fmt: skip


def run_design(
    design: Design,
    path: Path,
    *,
    jobs: int = 0,
    time_s: float = 0.0,
    timeout_s: float = 600.0,
    ray: str = "",
    force: bool = False,
    command: Sequence[str] = ("halfulp.sweep",),
    on_event: OnEvent | None = None,
) -> "Table":
    """Run what is missing of `design` at `path`; the most informative runs first.

    * `jobs` at a time, 0 = as many as there is room for; on the cluster at `ray` if given.
    * `time_s`: no run is started that would not be done by then; 0 = no limit.
    * `timeout_s`: a run without a step for so long is ended, and tried once more; its first step
      may take ten minutes (halfulp.sweep.alive).

    A run that fails is a result, and one that was lost in an earlier call is tried again. Raises
    as `preflight` and `open_store`, before anything is on disk; as `run_tasks`; and RunError when a
    run finds the machine unfit twice (no space, no data). The results so far are kept, and the same
    call goes on.
    """
    if jobs < 0 or time_s < 0 or timeout_s <= 0:
        raise ConfigError(
            f"jobs = {jobs}, time = {time_s:g} s and timeout = {timeout_s:g} s cannot be used. "
            "Jobs and time cannot be negative, and a timeout must be above 0."
        )
    check_place(path, design, force=force)
    digests = preflight(design, here=not ray)
    store, stored = open_store(path, design, command=command, force=force)
    results = {r.id: r for r in stored.results}
    state = _State(design, store, results, timeout_s, on_event, digests)
    if time_s:
        state.deadline = time.monotonic() + time_s
    for line in stored.damaged:
        state.tell("damaged", message=line)
    try:
        _check_reference(design, stored.results)
        state.tell("begin", done=len(state.done), cells=len(design.cells()))
        outcomes = run_tasks(
            run_cell, state.next_task, jobs=jobs, ray=ray,
            threads=design.config.train.threads, gpu_share=_gpu_share(design),
            hung=state.hung,
        )  # fmt: skip
        with closing(outcomes):
            for outcome in outcomes:
                state.take(outcome)
    finally:
        store.close()
    from halfulp.sweep.table import Table

    return Table(design, tuple(state.results.values()), path=path, damaged=stored.damaged)


@dataclass
class _State:
    """What the driver knows while runs are under way."""

    design: Design
    store: Store
    results: dict[str, Result]
    timeout_s: float
    on_event: OnEvent | None
    digests: Mapping[str, str]  # of the data sets, as they are here
    deadline: float = float("inf")
    running: set[str] = field(default_factory=set)
    done: set[str] = field(init=False)
    watch: Watch = field(init=False)
    tries: dict[str, int] = field(default_factory=dict)
    afresh: set[str] = field(default_factory=set)  # whose files could not be gone on with

    def __post_init__(self) -> None:
        self.done = {id for id, result in self.results.items() if not result.lost}
        self.watch = Watch(self.store.runs, self.timeout_s)

    def next_task(self) -> Task | None:
        cell = next_cell(self.design, self.results.values(), self.running | self.done)
        if cell is None:
            return None
        if time.monotonic() + seconds_of(self.results.values(), cell.recipe) > self.deadline:
            return None
        self.running.add(cell.id)
        self.tries[cell.id] = self.tries.get(cell.id, 0) + 1
        self.watch.begin(cell.id)
        self.tell("run", id=cell.id)
        path = self.store.path.absolute()
        return Task(
            path, self.design.to_dict(), self.design.digest(), cell, self.timeout_s,
            self.digests[cell.data], cell.id in self.afresh,
        )  # fmt: skip

    def hung(self, task: Task) -> bool:
        return self.watch.late(task.cell.id)

    def take(self, outcome: Outcome[Task]) -> None:
        cell = outcome.task.cell
        self.running.discard(cell.id)
        result = self._result(outcome)
        self.watch.end(cell.id)
        if result is None:
            return
        self.results[cell.id] = result
        self.done.add(cell.id)
        self.store.add(result)
        self.tell("result", **result.to_dict())
        _check_reference(self.design, [result])

    def _result(self, outcome: Outcome[Task]) -> Result | None:
        """The result of a run; None when it is to be tried once more."""
        cell = outcome.task.cell
        if isinstance(outcome.value, Trained) and outcome.value.result is not None:
            if outcome.value.files:
                self.store.keep(cell.id, outcome.value.files)
            return outcome.value.result
        stalled = self.watch.why(cell.id) if outcome.died else ""
        message = stalled or _why(outcome)
        unfit = isinstance(outcome.error, (HalfulpError, OSError))
        if self.tries[cell.id] < TRIES:
            self.store.note("retry", id=cell.id, message=message)
            if unfit:
                self.afresh.add(cell.id)
            elif outcome.died:
                self.store.unlock(cell.id)
            self.tell("retry", id=cell.id, message=message)
            return None
        if unfit:
            raise RunError(
                f"{cell.id} cannot be run here: {message} The sweep stops, and its results are "
                f"kept. When that is mended, go on with: halfulp sweep --resume {self.store.path}"
            ) from outcome.error
        status = "stalled" if stalled else "died"
        return Result(
            id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
            status=status, message=message,
        )  # fmt: skip

    def tell(self, event: str, **fields: Any) -> None:
        if self.on_event is not None:
            self.on_event({"event": event, **fields})


def _check_reference(design: Design, results: Sequence[Result]) -> None:
    """ConfigError when the reference was refused: nothing could be compared."""
    for result in results:
        if result.status == "refused" and result.recipe == design.reference:
            raise cannot_compare(design, result.data, result.message)


def _why(outcome: Outcome[Task]) -> str:
    if outcome.error is not None:
        known = isinstance(outcome.error, HalfulpError)
        return str(outcome.error) if known else f"{type(outcome.error).__name__}: {outcome.error}"
    return f"its process {outcome.died}" if outcome.died else "it was interrupted"


def _gpu_share(design: Design) -> float:
    """The part of a GPU that a run takes: small models leave most of one idle."""
    return GPU_SHARE if design.config.train.device == "cuda" else 0.0
