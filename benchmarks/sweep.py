"""How many runs of a sweep are trained per minute, and what a run costs beside its steps.

    python benchmarks/sweep.py [--quick]

The same runs one after another, each in a process of its own (`halfulp train`) or all in this one;
by the persistent workers of `halfulp.sweep`, a core each; and on a Ray cluster with as many
workers, where Ray is installed. A worker's first run also imports torch and transformers.
"""

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import machine, table, verdict

from halfulp.data import open_data
from halfulp.numerics.kernel import cache_directory
from halfulp.run import Run
from halfulp.sweep.design import Cell, Design, make_design
from halfulp.sweep.one_run import Task, run_cell
from halfulp.sweep.run import run_design
from halfulp.sweep.store import open_store
from halfulp.tasks import cores
from halfulp.train.config import load_config

JOBS = min(2, len(cores()))
GOAL_S = 2.0
_WORDS = ("loss", "round", "off", "error", "step", "bit", "scale", "block", "norm", "head")


@dataclass(frozen=True)
class Measured:
    """Runs done one way: when each was done, and its seconds outside of steps."""

    done: list[float]  # seconds since the start, ascending
    beside: list[float]  # in the order in which the runs were done
    workers: int

    @property
    def per_minute(self) -> float:
        """In all, with the start of the workers."""
        return 60 * len(self.done) / self.done[-1]

    @property
    def per_minute_warm(self) -> float:
        """Once every worker has done a run."""
        return 60 * (len(self.done) - self.workers) / (self.done[-1] - self.done[self.workers - 1])


def processes(design: Design, cells: list[Cell], folder: Path) -> Measured:
    """A process each: every run is the first of its worker."""
    began, done, beside = time.perf_counter(), [], []
    for cell in cells:
        out = folder / cell.id
        config = design.config_of(cell, out, folder)
        start = time.perf_counter()
        # Written by a run directory that is not kept: the command reads any config.toml.
        Run.create(folder / "asked" / cell.id, config.to_dict(), command=["benchmark"]).close()
        asked = folder / "asked" / cell.id / "config.toml"
        command = [sys.executable, "-m", "halfulp", "train", str(asked)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        now = time.perf_counter()
        done.append(now - began)
        beside.append(now - start - Run.open(out, writer=False).summary()["seconds"])
    return Measured(done, beside, 1)


def in_turn(design: Design, cells: list[Cell], folder: Path) -> Measured:
    """One after another in this process, which has imported everything."""
    path = folder / "sweep"
    open_store(path, design, command=["benchmark"])[0].close()
    digest = open_data(design.config.data.corpus(), cache_directory() / "data").digest
    began, done, beside = time.perf_counter(), [], []
    for cell in cells:
        task = Task(path, design.to_dict(), design.digest(), cell, 600.0, digest)
        result = run_cell(task).result
        assert result is not None
        _check(result.status, result.message)
        done.append(time.perf_counter() - began)
        beside.append(result.wall_seconds - result.seconds)
    return Measured(done, beside, 1)


def workers(design: Design, cells: list[Cell], folder: Path, *, ray: str = "") -> Measured:
    """`JOBS` persistent workers, of this machine or of a cluster."""
    began, done, beside = time.perf_counter(), [], []

    def note(event) -> None:
        if event["event"] in ("result", "retry"):
            _check(event.get("status", "retry"), event["message"])
            done.append(time.perf_counter() - began)
            beside.append(event["wall_seconds"] - event["seconds"])

    run_design(design, folder / "sweep", jobs=JOBS, ray=ray, on_event=note)
    assert len(done) == len(cells)
    return Measured(done, beside, JOBS)


def on_ray(design: Design, cells: list[Cell], folder: Path) -> Measured:
    """The same on a cluster of `JOBS` nodes of one CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=node | {"include_dashboard": False})
    try:
        for _ in range(JOBS - 1):
            cluster.add_node(**node)
        ray.init(cluster.address, log_to_driver=False, logging_level="error")
        return workers(design, cells, folder, ray=cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()


def _check(status: str, message: str) -> None:
    """A run that was not trained would make the figures too good."""
    if status != "finished":
        raise SystemExit(f"a run failed, so nothing was measured: {message}")


def _design(corpus: Path, steps: int, seeds: int) -> Design:
    config = load_config(
        {
            "model": {"preset": "llama-tiny"},
            "data": {"source": [str(corpus)], "length": 64},
            "train": {"steps": steps, "rows": 4, "device": "cpu", "threads": 1},
        }
    )
    return make_design(config, recipes=["fp32", "te_current"], lrs=[1e-3, 3e-3], seeds=seeds)


def _measure(quick: bool) -> tuple[dict[str, Measured], int, int]:
    ways: dict[str, Callable[[Design, list[Cell], Path], Measured]] = {
        "one after another, a process each": processes,
        "one after another, one process": in_turn,
        f"{JOBS} workers": workers,
    }
    try:
        import ray  # noqa: F401

        ways[f"Ray, {JOBS} workers"] = on_ray
    except ImportError:
        pass
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus, chance = folder / "words.txt", random.Random(0)
        corpus.write_text(" ".join(chance.choice(_WORDS) for _ in range(60_000)))
        design = _design(corpus, 40 if quick else 100, 2 if quick else 3)
        cells = list(design.cells())
        in_turn(design, cells[:2], folder / "warm")  # data and kernels are in the cache
        few = cells[: 2 if quick else 4]
        found = {}
        for i, (way, measure) in enumerate(ways.items()):
            (folder / str(i)).mkdir()
            found[way] = measure(design, few if measure is processes else cells, folder / str(i))
        return found, design.config.train.steps, len(cells)


def _row(way: str, m: Measured, base: Measured) -> list[str]:
    first, later = m.beside[: m.workers], statistics.median(m.beside[m.workers :])
    persistent = not way.endswith("a process each")
    return [
        way,
        f"{m.per_minute:.1f}",
        f"{m.per_minute_warm:.1f}",
        f"{m.per_minute_warm / base.per_minute_warm:.2f}",
        f"{statistics.median(first):.2f}",
        f"{later:.2f}" + (f" ({verdict(later, GOAL_S)})" if persistent else ""),
        str(len(m.done)),
    ]


def main() -> None:
    cli = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cli.add_argument("--quick", action="store_true", help="fewer and shorter runs")
    args = cli.parse_args()
    load = os.getloadavg()[0]
    found, steps, runs = _measure(args.quick)
    base = found["one after another, one process"]
    head = ["way", "runs/min", "once warm", "× in turn", "beside steps, s: first", "later", "runs"]
    rows = [_row(way, m, base) for way, m in found.items()]
    print(
        f"## Sweep\n\n{machine()}\n\nllama-tiny in fp32 and te_current, {steps} steps of 4 × 64 "
        f"tokens, {runs} runs; load of the machine before and after: {load:.1f} and "
        f"{os.getloadavg()[0]:.1f}. Beside steps: imports, data, model, evaluation, checkpoint, "
        f"measurement, files.\n\n{table(head, rows)}"
    )


if __name__ == "__main__":
    main()
