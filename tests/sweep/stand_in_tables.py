"""Tables of a sweep as its statistics would fill them, one row per recipe and data set."""

import math
from dataclasses import dataclass, field

from halfulp.sweep.failures import Failures
from halfulp.sweep.gap import Gap
from halfulp.sweep.window import Window


@dataclass(frozen=True, kw_only=True)
class StandInRow:
    recipe: str
    data: str = "text"
    is_reference: bool = False
    refused: str = ""
    planned: int = 9
    missing: int = 0
    tokens: int = 1_000_000
    best_lr: float | None = 1e-3
    gap: Gap | None = None
    window: Window | None = None
    failures: Failures = field(default_factory=lambda: Failures(0, 3))
    abandoned_fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class StandInTable:
    reference: str
    all_rows: tuple[StandInRow, ...]
    lrs: tuple[float, ...] = (1e-4, 1e-3, 1e-2)
    seeds: tuple[int, ...] = (1, 2, 3)

    @property
    def recipes(self):
        return tuple(dict.fromkeys(row.recipe for row in self.all_rows))

    def rows(self, level=0.95):
        return self.all_rows


def gap(value, half=0.002, n=3):
    low, high = value - half, value + half
    return Gap(value=value, low=low, high=high, n=n, method="Student", bootstrap=(low, high))


def window(octaves, low=None, high=None, *, open_high=False):
    return Window(
        octaves=octaves,
        low=octaves if low is None else low,
        high=math.inf if open_high else (octaves if high is None else high),
        lr_low=1e-4,
        lr_high=1e-4 * 2**octaves,
        open_low=False,
        open_high=open_high,
        delta_nats=0.05,
        n=3,
        method="Student",
    )


def two(own, reference=None, **more):
    """A table of bf16_amp and te_current; own, reference: fields of their rows."""
    base = {"window": window(4.0), "is_reference": True, **(reference or {})}
    row = {"window": window(4.0), "gap": gap(0.002), **own}
    return StandInTable(
        reference="bf16_amp",
        all_rows=(StandInRow(recipe="bf16_amp", **base), StandInRow(recipe="te_current", **row)),
        **more,
    )
