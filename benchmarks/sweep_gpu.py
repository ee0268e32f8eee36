"""How many small runs one GPU trains per minute, when 1, 2, 4 or 8 of them share it.

    python benchmarks/sweep_gpu.py [--quick] [--dry]

The runs of `halfulp.sweep` in its persistent workers, each with a core of its own, after one run
each that is not counted. A run is trained, evaluated, measured and written; `share` is what a sweep
gives each run by default.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

import torch
from common import table

from halfulp.data import open_data
from halfulp.numerics.kernel import cache_directory
from halfulp.sweep.design import Cell, Design, make_design
from halfulp.sweep.one_run import Task, Trained, run_cell
from halfulp.sweep.run import GPU_SHARE
from halfulp.tasks import Outcome, cores, run_tasks
from halfulp.train.config import load_config

TOGETHER = (1, 2, 4, 8)
MODELS = {
    "llama-tiny": {"preset": "llama-tiny"},
    "llama-20m, 3 layers": {"preset": "llama-20m", "layers": 3},
}
STEPS, ROWS, LENGTH = 60, 8, 256
TIMEOUT_S = 600.0


@dataclass
class Phase:
    """Runs of one model, `together` at a time, until `seconds` are over."""

    model: str
    together: int
    seconds: float
    walls: list[float] = field(default_factory=list)  # of the driver, from task to outcome
    steps: list[float] = field(default_factory=list)  # seconds per step
    gib: float = 0.0
    began: float = 0.0
    parameters: int = 0

    @property
    def per_minute(self) -> float:
        return 60 * self.together / statistics.median(self.walls)


class Driver:
    """Feeds one pool with the runs of one phase after another, so that workers start once."""

    def __init__(self, designs: dict[str, Design], phases: list[Phase], folder: Path) -> None:
        self.designs, self.phases, self.folder = designs, phases, folder
        cache = cache_directory() / "data"
        self.digests = {
            name: open_data(design.config.data.corpus(), cache).digest
            for name, design in designs.items()
        }
        self.started: dict[int, float] = {}
        self.numbers = count()
        self.current = 0

    def next_task(self) -> Task | None:
        now, running = time.perf_counter(), len(self.started)
        phase = self.phases[self.current]
        if phase.began and now - phase.began >= phase.seconds:
            if running or self.current + 1 == len(self.phases):
                return None
            self.current += 1
            phase = self.phases[self.current]
        phase.began = phase.began or now
        if running >= phase.together:
            return None
        seed = next(self.numbers)
        self.started[seed] = now
        design = self.designs[phase.model]
        cell = Cell(design.recipes[1], design.lrs[0], seed, next(iter(design.data)))
        unseen = self.folder / "unseen"
        return Task(unseen, design.to_dict(), "", cell, TIMEOUT_S, self.digests[phase.model])

    def take(self, outcome: Outcome[Task]) -> None:
        wall = time.perf_counter() - self.started.pop(outcome.task.cell.seed)
        if not isinstance(outcome.value, Trained) or outcome.value.result is None:
            raise SystemExit(f"a run failed: {outcome.error or outcome.died}")
        result, phase = outcome.value.result, self.phases[self.current]
        if result.status != "finished":
            raise SystemExit(f"a run failed: {result.message}")
        phase.walls.append(wall)
        phase.steps.append(result.seconds / result.steps)
        phase.parameters = result.parameters
        phase.gib = max(phase.gib, _used_gib())


def measured(phases: list[Phase], folder: Path, device: str, steps: int) -> None:
    """Fill in the phases."""
    corpus = folder / "words.txt"
    chance = random.Random(0)
    corpus.write_text(" ".join(chance.choice(_WORDS) for _ in range(100_000)))
    designs = {name: _design(model, corpus, device, steps) for name, model in MODELS.items()}
    driver = Driver(designs, phases, folder)
    jobs = max(phase.together for phase in phases)
    share = 1 / jobs if device == "cuda" else 0.0
    with closing(run_tasks(run_cell, driver.next_task, jobs=jobs, gpu_share=share)) as outcomes:
        for outcome in outcomes:
            driver.take(outcome)


def plan(quick: bool, together: tuple[int, ...]) -> Iterator[Phase]:
    """A run in every worker that warms it up, and then the phases."""
    yield Phase(next(iter(MODELS)), max(together), 0.01)
    for model in MODELS:
        for jobs in together:
            yield Phase(model, jobs, 2.0 if quick else 4.0)


_WORDS = ("loss", "round", "off", "error", "step", "bit", "scale", "block", "norm", "head")


def _design(model: dict, corpus: Path, device: str, steps: int) -> Design:
    config = load_config(
        {
            "model": model,
            "data": {"source": [str(corpus)], "length": LENGTH},
            "train": {"steps": steps, "rows": ROWS, "device": device, "eval_every": 0},
        }
    )
    return make_design(config, recipes=["fp32", "te_current"], lrs=[1e-3, 1e-2], seeds=2)


def _used_gib() -> float:
    if not torch.cuda.is_available():
        return 0.0
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 2**30


def _rows(phases: list[Phase]) -> Iterator[list[str]]:
    alone = {p.model: p.per_minute for p in phases if p.together == 1}
    for phase in phases:
        yield [
            f"{phase.model}, {phase.parameters / 1e6:.1f} M parameters",
            str(phase.together),
            f"{phase.per_minute:.1f}",
            f"{phase.per_minute / alone[phase.model]:.2f}",
            f"{statistics.median(phase.walls):.2f}",
            f"{1e3 * statistics.median(phase.steps):.1f}",
            f"{phase.gib:.1f}",
            str(len(phase.walls)),
        ]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="half as long")
    cli.add_argument("--dry", action="store_true", help="tiny, on the CPU, to try the script")
    args = cli.parse_args()
    if not (args.dry or torch.cuda.is_available()):
        print("sweep_gpu.py needs a CUDA device; this PyTorch sees none.", file=sys.stderr)
        raise SystemExit(2)
    device = "dry run on the CPU" if args.dry else torch.cuda.get_device_name()
    steps = 3 if args.dry else STEPS
    phases = list(plan(args.quick or args.dry, (1, 2) if args.dry else TOGETHER))
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        measured(phases, Path(folder), "cpu" if args.dry else "cuda", steps)
    head = ["te_current", "together", "runs/min", "× alone", "s/run", "ms/step", "GiB used", "runs"]
    print(
        f"## Sweep, runs that share a GPU\n\n{device}, {len(cores())} CPU cores; "
        f"torch {torch.__version__}. {steps} steps of {ROWS} × {LENGTH} tokens a run, with its "
        f"evaluation, measurements and files; a sweep's default share is {GPU_SHARE:g} of a GPU. "
        f"Median over the runs; GiB: of all processes. In all {time.perf_counter() - began:.0f} s."
        f"\n\n{table(head, list(_rows(phases[1:])))}"
    )


if __name__ == "__main__":
    main()
