"""Snapshots of a run in memory: which are kept, which may be rolled back to, and what they need."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from halfulp.errors import ConfigError

EVERY = 50  # steps between two snapshots, and quiet steps after which one is good
KEPT = 4  # newest
OLDER = (200, 800)  # steps back of one older snapshot each, at most


@dataclass
class Snapshot:
    """A run after `step` finished steps: tensors on the CPU by name, and plain facts."""

    step: int
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    good: bool = False


@dataclass
class Ring:
    """Snapshots of one process, oldest first."""

    every: int = EVERY
    kept: int = KEPT
    snapshots: list[Snapshot] = field(default_factory=list)

    def due(self, step: int) -> bool:
        """Whether a snapshot after `step` finished steps is due."""
        there = self.snapshots and self.snapshots[-1].step == step
        return step % self.every == 0 and not there

    def put(self, snapshot: Snapshot) -> None:
        """Keep `snapshot`, the newest ones, one for each older distance, and the last good one.

        For each distance it is the oldest good one that lies no farther back: it grows older until
        it has to go, and the oldest one within the next smaller distance takes its place. The first
        snapshot of a run is good: nothing has happened before it.
        """
        snapshot.good = snapshot.good or not self.snapshots
        self.snapshots = [*self.snapshots, snapshot]
        keep = {s.step for s in self.snapshots[-self.kept :]}
        for back in OLDER:
            older = [s for s in self.snapshots if snapshot.step - s.step <= back and s.good]
            keep |= {s.step for s in older[:1]}
        keep |= {s.step for s in [s for s in self.snapshots if s.good][-1:]}
        self.snapshots = [s for s in self.snapshots if s.step in keep]

    def settle(self, step: int) -> None:
        """After a quiet `step`: snapshots that lie far enough back are good."""
        for snapshot in self.snapshots:
            snapshot.good = snapshot.good or step - snapshot.step >= self.every

    def disturb(self) -> None:
        """An incident: snapshots that are not good by now may hold its beginning, and go."""
        self.snapshots = [s for s in self.snapshots if s.good]

    def before(self, step: int) -> Snapshot | None:
        """The newest good snapshot of `step` or earlier; else the oldest good one."""
        good = [s for s in self.snapshots if s.good]
        early = [s for s in good if s.step <= step]
        return early[-1] if early else (good[0] if good else None)

    def forget_after(self, step: int) -> None:
        """Drop what lies after `step`: the run has gone back there."""
        self.snapshots = [s for s in self.snapshots if s.step <= step]

    def state(self) -> list[dict[str, Any]]:
        """All snapshots as plain values and tensors."""
        return [
            {"step": s.step, "tensors": dict(s.tensors), "facts": dict(s.facts), "good": s.good}
            for s in self.snapshots
        ]

    def load(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """The inverse of `state`."""
        self.snapshots = [Snapshot(r["step"], r["tensors"], r["facts"], r["good"]) for r in rows]

    @property
    def most(self) -> int:
        """The largest number of snapshots held at once."""
        return self.kept + len(OLDER) + 1


def check_memory(snapshot_bytes: int, most: int, asked: str, *, processes: int = 1) -> None:
    """ConfigError if `most` snapshots of `processes` processes on this machine do not fit."""
    free = available_bytes()
    need = snapshot_bytes * most * processes
    if free is None or need <= free:
        return
    fit = free // max(1, snapshot_bytes * processes) - len(OLDER) - 1
    cure = f"Give {asked} = {fit}" if fit >= 1 else "Run without the guard (guard.on = false)"
    raise ConfigError(
        f"the guard's ring of {most} snapshots needs {need / 2**30:.2f} GiB of memory "
        f"({snapshot_bytes / 2**30:.2f} GiB each) and {free / 2**30:.2f} GiB are free. {cure}, "
        "free memory, or use more machines."
    )


def available_bytes(meminfo: Callable[[], str] | None = None) -> int | None:
    """Memory that this machine can still give; None where the system does not say."""
    try:
        text = meminfo() if meminfo else Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    lines = [line.split() for line in text.splitlines() if line.startswith("MemAvailable:")]
    return int(lines[0][1]) * 1024 if lines else None
