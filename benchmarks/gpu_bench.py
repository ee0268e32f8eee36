"""Time on a GPU: CUDA events around several calls in a row."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from common import Time

Run = Callable[[], object]


@dataclass(frozen=True)
class Bench:
    """Where and how thoroughly to measure; `dry`: the CPU stands in for the GPU."""

    quick: bool
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    def times(self, runs: dict[str, Run], *, calls: int = 1, least: int = 5) -> dict[str, Time]:
        """Seconds of one call of each, in turns, after two that are not counted."""
        repeats = 1 if self.dry else max(3, least // 2) if self.quick else least
        for run in runs.values():
            run(), run()
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(repeats):
            for name, run in runs.items():
                taken[name].append(self._once(run, calls) / calls)
        return {name: Time(min(t), sorted(t)[len(t) // 2]) for name, t in taken.items()}

    def _once(self, run: Run, calls: int) -> float:
        if self.dry:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
