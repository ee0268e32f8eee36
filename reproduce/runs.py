"""Training runs for the claims: `halfulp train`, a tiny model, two processes of one thread each."""

import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from reproduce.common import Result

PRESET = "llama-tiny"  # 0.13 M parameters: 2 layers of 64 channels
LENGTH, ROWS = 64, 8
TOKENS = LENGTH * ROWS  # of one step
STEPS = 240
WORKERS = 2


@dataclass(frozen=True)
class Job:
    """One training run. `policy` and `first` are policy files as text.

    The first `until` of the run computes as `first` says, the rest and the evaluation as `policy`.
    `probe` reads a number off the run directory before it is deleted.
    """

    label: str
    policy: str
    seed: int
    lr: float
    first: str = ""
    until: float = 0.0
    steps: int = STEPS
    constant_lr: bool = False
    probe: Callable[[Path], float] | None = None


@dataclass(frozen=True)
class Outcome:
    loss_nats: float  # held out, in the arithmetic of the last stage
    probed: float
    seconds: float


def policy(
    extends: str,
    *,
    head: bool = False,
    gradient_tokens: int = TOKENS,
    lines: str = "",
) -> str:
    """A policy file with one recipe for everything, made from the shipped recipe `extends`.

    * `head`: quantize the head as the other linears.
    * `gradient_tokens`: make gradients as small as those of a mean over so many tokens, by a
      constant loss scale. The update divides it out; a power of two changes nothing but range.
    * `lines`: further lines of the recipe.
    """
    text = [f'[recipes.here]\nextends = "{extends}"']
    if head:
        text.append('head = "linear"')
    if gradient_tokens != TOKENS:
        scale = TOKENS / gradient_tokens
        text.append(
            f"loss_scale = {{init = {scale!r}, growth = 2.0, interval = {10**9}, backoff = 0.5}}"
        )
    text += [lines, '[[rule]]\nmatch = "*"\nrecipe = "here"']
    return "\n".join(text)


class Trainer(Protocol):
    """What a claim needs: the outcomes of jobs, in order."""

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]: ...

    def losses(self, jobs: Sequence[Job]) -> list[float]: ...


class Plan:
    """Writes down which jobs the claims will ask for, and makes their losses up."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
        self.jobs += jobs
        return [Outcome(float(job.seed), 0.0, 0.0) for job in jobs]

    def losses(self, jobs: Sequence[Job]) -> list[float]:
        return [outcome.loss_nats for outcome in self(jobs)]


class Runs:
    """Trains jobs and remembers them: a run that two claims need happens once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._futures: dict[Job, Future[Outcome]] = {}
        self._finished = 0

    def start(self, claims: Callable[[Trainer], Iterator[Result]]) -> None:
        """Queue all the jobs of `claims` in their order, so that no process waits for a claim."""
        plan = Plan()
        for _ in claims(plan):
            pass
        self._submit(plan.jobs)

    def __call__(self, jobs: Sequence[Job]) -> list[Outcome]:
        """The outcomes of `jobs`, in order."""
        self._submit(jobs)
        return [self._futures[job].result() for job in jobs]

    def losses(self, jobs: Sequence[Job]) -> list[float]:
        """Held-out loss of each job, in nats/token."""
        return [outcome.loss_nats for outcome in self(jobs)]

    def _submit(self, jobs: Sequence[Job]) -> None:
        for job in dict.fromkeys(jobs):
            if job not in self._futures:
                self._futures[job] = future = self._pool.submit(train_job, job)
                future.add_done_callback(partial(self._report, job))

    def _report(self, job: Job, future: Future[Outcome]) -> None:
        self._finished += 1
        if future.cancelled() or future.exception():
            return
        loss, seconds = future.result().loss_nats, future.result().seconds
        print(
            f"  run {self._finished}/{len(self._futures)}: {job.label}, lr {job.lr:g}, "
            f"seed {job.seed}: {loss:.3f} nats ({seconds:.0f} s)",
            file=sys.stderr,
            flush=True,
        )


@contextmanager
def open_runs() -> Iterator[Runs]:
    """Two processes that train, until the end of the block."""
    with open_pool() as pool:
        yield Runs(pool)


@contextmanager
def open_pool() -> Iterator[ProcessPoolExecutor]:
    """Two processes, until the end of the block."""
    # fork would copy the thread pools of torch into a state in which they hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(WORKERS, mp_context=context)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def train_job(job: Job) -> Outcome:
    """Train `job` in a temporary directory, which is deleted."""
    from halfulp.train.config import load_config
    from halfulp.train.loop import train

    before = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(_config(job, Path(folder)))
        summary = train(config, command=("reproduce",))
        probed = job.probe(summary.path) if job.probe else 0.0
    return Outcome(summary.loss_nats, probed, time.perf_counter() - before)


def _config(job: Job, folder: Path) -> dict[str, Any]:
    section: dict[str, Any] = {"file": _write(folder / "policy.toml", job.policy)}
    if job.first:
        first = _write(folder / "first.toml", job.first)
        section["schedule"] = [{"until": job.until, "file": first}]
    train = {"steps": job.steps, "rows": ROWS, "lr": job.lr, "seed": job.seed}
    train |= {"eval_every": 0, "eval_batches": 64, "count_every": 0, "device": "cpu", "threads": 1}
    # A probe compares the weights before and after the last step.
    train["checkpoint_every"] = job.steps - 1 if job.probe else 0
    if job.constant_lr:
        train |= {"schedule": "constant", "warmup": 0}
    return {
        "model": {"preset": PRESET},
        "data": {"length": LENGTH},
        "train": train,
        "policy": section,
        "guard": {"on": False},
        "run": {"out": str(folder / "run")},
    }


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)
