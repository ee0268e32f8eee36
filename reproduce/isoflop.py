"""A small isoFLOP set: `halfulp train` at equal compute with models of several sizes, kept.

Every run reads bytes of the standard library less than once, on a cosine schedule of its own
length. Runs lie in the user's cache; an interrupted one goes on from its newest checkpoint.
"""

import sys
import time
from collections.abc import Sequence
from concurrent.futures import as_completed
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from reproduce.runs import open_pool

PRESET = "qwen3-tiny"  # norms on queries and keys make it forgive a learning rate that is off
VOCAB = 257  # bytes and the end of a document
LENGTH, ROWS = 64, 8
TOKENS = LENGTH * ROWS  # of one step
LR_TIMES_HIDDEN = 0.25
LAYERS = 2
GRID = {  # FLOPs -> widths; the smallest budgets have too few tokens for larger models
    2e11: (32,),
    3.5e11: (32, 64),
    6e11: (32, 64, 96),
    1e12: (32, 64, 96),
    1.8e12: (32, 64, 96),
}
REPEATED = (6e11, 1.8e12)  # FLOPs at which there are two seeds
SHALLOW = ((6e11, 32), (6e11, 64), (1.8e12, 64))  # (FLOPs, width) of models of one layer
CPU_FILE = "cpu_seconds.json"  # beside the files of the run
VERSION = 1  # raise it when what a run computes changes: kept runs are then trained again
LARGER = (1.08e13, 128)  # FLOPs, width; not fitted: 6 times the compute, 1.7 times the parameters


@dataclass(frozen=True)
class Point:
    """One run: so many FLOPs = 6 × parameters × tokens, to the nearest step."""

    flops: float
    hidden: int
    layers: int
    seed: int


def fitted() -> list[Point]:
    """The runs that the law is fitted to."""
    return [
        Point(flops, hidden, LAYERS, seed)
        for flops, widths in GRID.items()
        for hidden in widths
        for seed in ((0, 1) if flops in REPEATED else (0,))
    ]


def held_out() -> list[Point]:
    """The runs that the fitted law has to predict."""
    return [Point(*LARGER, LAYERS, seed) for seed in (0, 1)]


def shallow() -> list[Point]:
    """Runs of another shape: one layer."""
    return [Point(flops, hidden, 1, 0) for flops, hidden in SHALLOW]


def trained(points: Sequence[Point]) -> list[Path]:
    """The run directories of `points`, in order; trained in two processes where not kept."""
    # A whole set of the first seed, then of the next; the longest first, so that no process waits
    # for one at the end.
    order = sorted(points, key=lambda p: (p.seed, -p.flops))
    if missing := [p for p in order if not _finished(run_directory(p))]:
        _train(missing)
    return [run_directory(p) for p in points]


def _train(points: Sequence[Point]) -> None:
    with open_pool() as pool:
        jobs = {pool.submit(train_point, point): point for point in points}
        for done, job in enumerate(as_completed(jobs), 1):
            said = f"  run {done}/{len(jobs)}: {jobs[job]} ({job.result():.0f} s)"
            print(said, file=sys.stderr, flush=True)


def cpu_seconds(path: Path) -> list[float]:
    """The CPU time that a run took, or nothing where it does not say so."""
    from halfulp.data.cache import read_json

    found = read_json(path / CPU_FILE)
    return [found["cpu_seconds"]] if found else []


def train_point(point: Point) -> float:
    """Train or go on with the run of `point`; the CPU seconds spent here."""
    from halfulp.data.cache import read_json, write_json
    from halfulp.train.config import load_config
    from halfulp.train.loop import train

    path = run_directory(point)
    config = load_config(config_of(point) | {"run": {"out": str(path)}})
    begun = (path / "config.toml").is_file()
    earlier = (read_json(path / CPU_FILE) or {"cpu_seconds": 0.0})["cpu_seconds"]
    before = time.process_time()
    path.parent.mkdir(parents=True, exist_ok=True)
    train(config, resume=path if begun else None, command=("reproduce",))
    seconds = time.process_time() - before
    write_json(path / CPU_FILE, {"cpu_seconds": earlier + seconds})
    return seconds


def run_directory(point: Point) -> Path:
    """Where the run of `point` is kept; another configuration or torch has another place."""
    import torch

    from halfulp.data.cache import key_of
    from halfulp.numerics.kernel import cache_directory

    name = f"{point.flops:.3g}-{point.hidden}x{point.layers}-{point.seed}"
    key = key_of(VERSION, torch.__version__, config_of(point))[:8]
    return cache_directory() / "isoflop" / f"{name}-{key}"


def config_of(point: Point) -> dict[str, Any]:
    """The sections of run.toml that decide the run."""
    steps = round(point.flops / (6 * parameters(point.hidden, point.layers) * TOKENS))
    train = {"steps": steps, "rows": ROWS, "lr": LR_TIMES_HIDDEN / point.hidden}
    train |= {"seed": point.seed, "eval_every": 0, "eval_batches": 128, "count_every": 0}
    train |= {"checkpoint_every": 2000, "keep": 1, "device": "cpu", "threads": 1}
    return {
        "model": {"preset": PRESET, "hidden": point.hidden, "layers": point.layers},
        "data": {"length": LENGTH},
        "train": train,
        "sharpness": {"every": 0},
        "guard": {"on": False},
    }


@cache
def parameters(hidden: int, layers: int) -> int:
    """All parameters of the model; the tied embedding counts once."""
    import torch

    from halfulp.train.config import ModelConfig
    from halfulp.train.model import build_model

    with torch.device("meta"):
        shape = ModelConfig(preset=PRESET, hidden=hidden, layers=layers)
        model = build_model(shape, vocab=VOCAB, length=LENGTH, seed=0).model
    return sum(p.numel() for p in model.parameters())


def _finished(path: Path) -> bool:
    from halfulp.run import Run

    begun = (path / "config.toml").is_file()
    return begun and Run.open(path, writer=False).summary().get("reason") == "finished"


if __name__ == "__main__":
    trained([*fitted(), *held_out(), *shallow()])
