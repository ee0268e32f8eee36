"""Training runs for the claims on sharpness and blockwise learning rates, kept in the user's cache.

Unlike reproduce/runs.py, which trains by `halfulp train`, the loop here is a few lines of torch, as
a user's own would be: only the parameter groups, the schedule and the measurement are halfulp's.
"""

import math
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from halfulp import BlockwiseSchedule, blockwise_param_groups
from halfulp.data import Data, DataConfig, open_data
from halfulp.data.cache import key_of, read_json, write_json
from halfulp.numerics.kernel import cache_directory
from halfulp.sharpness.measure import sharpness
from halfulp.sharpness.ratios import measured as ratios
from reproduce.models import LENGTH, build

ROWS = 16  # of an evaluated or measured batch, and of a step unless told
WARMUP = 50
FLOOR = 1 / 20  # of the base rate, the same for all blocks
EVALUATION = 40  # held-out batches
BYTES = 257  # vocabulary without BPE: bytes and the end of a document
VERSION = 1  # raise it when what a run computes changes: kept outcomes are then trained again


@dataclass(frozen=True)
class Course:
    """One training run: AdamW (0.9, 0.95), decay 0.1 on everything, norm clipped to 1, cosine.

    * `ratios`: as halfulp.blockwise_param_groups takes them.
    * `stretch`: a block's warm-up is longer by its ratio, so that all rates rise alike.
    * `steps` is the length of the schedule; the run ends before, after `until` steps, where given.
    * `evaluated`: steps after which the held-out loss is taken, besides the last.
    * `measured`: (step, draws) of each measurement of sharpness.
    """

    label: str
    seed: int
    steps: int
    lr: float
    style: str = "gpt2"
    vocab: int = 2048
    ratios: str = "uniform"
    stretch: bool = True
    rows: int = ROWS
    until: int | None = None
    evaluated: tuple[int, ...] = ()
    measured: tuple[tuple[int, int], ...] = ()

    @property
    def last(self) -> int:
        return self.steps if self.until is None else self.until


@dataclass(frozen=True)
class Measured:
    """Sharpness and its relative standard error by block type, and the ratios that follow."""

    sharpness: dict[str, float]
    rel_se: dict[str, float]
    ratios: str


@dataclass(frozen=True)
class Outcome:
    """Held-out losses in nats/token and measurements by step, and the CPU time of all.

    A course that diverged has the loss inf from there on.
    """

    losses: dict[int, float]
    measured: dict[int, Measured]
    seconds: float

    @property
    def loss(self) -> float:
        return self.losses[max(self.losses)]


class Courses:
    """Trains courses in a pool of processes and remembers them."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._futures: dict[Course, Future[Outcome]] = {}
        self._finished = 0

    def start(self, courses: Sequence[Course]) -> None:
        """Queue `courses`, without waiting."""
        for course in courses:
            if course not in self._futures:
                self._futures[course] = future = self._pool.submit(outcome, course)
                future.add_done_callback(partial(self._report, course))

    def __call__(self, courses: Sequence[Course]) -> list[Outcome]:
        """The outcomes of `courses`, in order."""
        self.start(courses)
        return [self._futures[course].result() for course in courses]

    def losses(self, courses: Sequence[Course], *, at: int | None = None) -> list[float]:
        """Held-out loss of each course in nats/token, after the last step or after step `at`."""
        found = self(courses)
        return [o.loss if at is None else o.losses[at] for o in found]

    def cost(self) -> str:
        """What all finished courses took, whenever they were trained."""
        seconds = [f.result().seconds for f in self._futures.values() if f.done()]
        return f"{len(seconds)} runs, {sum(seconds) / 60:.0f} minutes of CPU time"

    def _report(self, course: Course, future: Future[Outcome]) -> None:
        self._finished += 1
        if future.cancelled() or future.exception():
            return
        found = future.result()
        loss = f"{found.loss:.3f} nats" if found.losses else "measured"
        print(
            f"  course {self._finished}/{len(self._futures)}: {course.style} {course.label}, "
            f"lr {course.lr:g}, seed {course.seed}: {loss} ({found.seconds:.0f} s)",
            file=sys.stderr,
            flush=True,
        )


def outcome(course: Course) -> Outcome:
    """From the cache, or trained here on one thread and kept there."""
    facts = asdict(course)
    del facts["label"]
    path = cache_directory() / "courses" / f"{key_of(VERSION, torch.__version__, facts)}.json"
    if (kept := read_json(path)) is None:
        kept = train(course)
        write_json(path, kept)
    return Outcome(
        {int(step): loss for step, loss in kept["losses"].items()},
        {int(step): Measured(**found) for step, found in kept["measured"].items()},
        kept["seconds"],
    )


def train(course: Course) -> dict[str, Any]:
    """Run `course`; the fields of its Outcome, ready for JSON."""
    torch.set_num_threads(1)
    before = time.process_time()
    data, model = corpus(course.vocab), build(course.style, course.vocab, course.seed)
    groups = blockwise_param_groups(model, course.lr, course.ratios, decay_norm=True)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    schedule = BlockwiseSchedule(
        optimizer, course.steps, WARMUP, min_lr=FLOOR, stretch_warmup=course.stretch
    )
    losses: dict[str, float] = {}
    measured: dict[str, dict[str, Any]] = {}
    draws, finite = dict(course.measured), True
    for step in range(course.last + 1):
        if step in draws:
            measured[str(step)] = asdict(measure(model, data, draws[step]))
        if step in course.evaluated or step == course.last:
            losses[str(step)] = held_out(model, data) if finite else math.inf
        if step < course.last and finite:
            batch = _batch(data, "train", step, seed=course.seed, rows=course.rows)
            finite = train_step(model, optimizer, batch)
            schedule.step()
    return {"losses": losses, "measured": measured, "seconds": time.process_time() - before}


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch_BT: Tensor) -> bool:
    """One step; False, and no step, where the loss is not finite."""
    loss = next_token_loss(model, batch_BT)
    if not bool(torch.isfinite(loss)):
        return False
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return True


def next_token_loss(model: nn.Module, batch_BT: Tensor) -> Tensor:
    logits_BTV = model(batch_BT[:, :-1])
    return cross_entropy(logits_BTV.flatten(0, 1), batch_BT[:, 1:].flatten())


@torch.no_grad()
def held_out(model: nn.Module, data: Data) -> float:
    """Mean loss on the same held-out windows for every course; their files are not trained on."""
    batches = (_batch(data, "val", i, seed=0) for i in range(EVALUATION))
    return sum(next_token_loss(model, batch).item() for batch in batches) / EVALUATION


def measure(model: nn.Module, data: Data, draws: int) -> Measured:
    """By Gauss-Newton-Bartlett, one draw on each of `draws` training batches."""
    batches = [_batch(data, "train", i, seed=1234)[:, :LENGTH] for i in range(draws)]
    report = sharpness(model, batches, estimator="gnb", draws=draws)
    rows = report.by_type
    return Measured(
        {kind: row.sharpness for kind, row in rows.items()},
        {kind: row.rel_se for kind, row in rows.items()},
        ",".join(f"{kind}={ratio:.4g}" for kind, ratio in ratios(report).by_type.items()),
    )


def _batch(data: Data, split: str, index: int, *, seed: int, rows: int = ROWS) -> Tensor:
    return data.batch(split, index, rows=rows, length=LENGTH, seed=seed)


@lru_cache(maxsize=1)
def corpus(vocab: int) -> Data:
    """The standard library in tokens of a vocabulary of 257 (bytes) or `vocab` (BPE)."""
    tokenizer = "bytes" if vocab == BYTES else f"bpe:{vocab}"
    return open_data(DataConfig(tokenizer=tokenizer), cache_directory() / "data")
