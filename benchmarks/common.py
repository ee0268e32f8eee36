"""Timing that survives a shared machine, and the tables of the benchmarks."""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Time:
    """Seconds of one call: the least and the median of all repeats."""

    best: float
    median: float


@dataclass(frozen=True)
class Absent:
    """A peer that could not be measured, and why."""

    why: str


def parser(about: str) -> argparse.ArgumentParser:
    """--quick and --threads, which every benchmark has."""
    made = argparse.ArgumentParser(description=about)
    made.add_argument("--quick", action="store_true", help="fewer repeats; figures are rougher")
    made.add_argument("--threads", type=int, default=0, help="1 or 2; without it one after other")
    return made


def per_threads(script: str, args: argparse.Namespace) -> None:
    """Run the script once per thread count, each in a fresh process: affinity is inherited."""
    given = [a for a in sys.argv[1:] if not a.startswith("--threads")]
    for threads in sorted({1, min(2, os.cpu_count() or 1)}):
        command = [sys.executable, script, *given, "--threads", str(threads)]
        subprocess.run(command, check=True)


def use_threads(threads: int) -> None:
    """Let torch use this many; with one, the process is pinned to a core."""
    import torch

    if threads == 1 and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(threads)


def interleave(
    variants: Mapping[str, Callable[[], object]],
    *,
    threads: int,
    seconds: float,
    calls: int = 1,
    least: int = 3,
) -> dict[str, Time]:
    """Time of one call of each variant, measured in turns; `seconds` is each one's share.

    Every variant runs `least` times at least, after one run that is not counted.

    One thread: CPU time of the process, which other load disturbs least. Two: wall clock.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    taken: dict[str, list[float]] = {name: [] for name in variants}
    spent = dict.fromkeys(variants, 0.0)
    for run in variants.values():
        run()
    while due := [name for name in variants if spent[name] < seconds or len(taken[name]) < least]:
        for name in due:
            wall, start = time.perf_counter(), clock()
            for _ in range(calls):
                variants[name]()
            taken[name].append((clock() - start) / calls)
            spent[name] += time.perf_counter() - wall
    return {name: Time(min(t), sorted(t)[len(t) // 2]) for name, t in taken.items()}


def verdict(value: float, goal: float | None) -> str:
    """ "goal 1.05, met" beside a figure; empty without a goal. Compared as it is printed."""
    if goal is None:
        return ""
    return f"≤ {goal:g}, {'met' if round(value, 2) <= goal else 'missed'}"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A markdown table; the first column is text, the others are right-aligned."""
    lines = [list(map(str, row)) for row in [head, *rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    rule = ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])]
    body = [[line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in [body[0], rule, *body[1:]])


def section(title: str, text: str) -> None:
    """Print a heading and what follows it, at once: subprocesses share the stream."""
    print(f"\n### {title}\n\n{text}", flush=True)


def machine() -> str:
    """What the figures were measured on, in general terms."""
    import torch

    from halfulp.numerics import cpu, kernel

    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    models = [line.split(":")[1].strip() for line in text.splitlines() if "model name" in line]
    return (
        f"{os.cpu_count()} cores, {models[0] if models else 'unknown CPU'} "
        f"({torch.backends.cpu.get_cpu_capability()}; narrow GEMMs: {cpu.narrow_gemms()}); "
        f"torch {torch.__version__}; kernel: {kernel.status().name}"
    )


def how(threads: int) -> str:
    """The measure behind a table, for its heading."""
    return "1 thread, CPU time" if threads == 1 else f"{threads} threads, wall clock"
