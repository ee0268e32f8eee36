"""How much faster a training step is in a precision than in BF16: the table of speedups.toml."""

import math
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from statistics import median

from halfulp.errors import ConfigError
from halfulp.hardware import Gpu, gpu_names, load_gpu

_ALIKE = 1.5  # sizes within this factor of the nearest one count as the same setting


@dataclass(frozen=True, kw_only=True)
class Speedup:
    """A published ratio of step times: BF16 over `precision`, lowest to highest of its source."""

    precision: str
    recipe: str
    scope: str  # "step" end to end, "gemm" the matrix products alone
    range: tuple[float, float]
    source: str
    read: str  # "source" or "second hand"
    date: str  # year and month in which it was read
    hardware: str = ""  # "" where the source does not state it
    parameters: float = math.nan


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The ratio of step times that a plan assumes, with its range and where it comes from."""

    ratio: float
    low: float
    high: float
    source: str
    parameters: float = math.nan  # size of the models that the figures are from
    measured: bool = False  # by the user; otherwise published by others


BF16 = Speed(ratio=1.0, low=1.0, high=1.0, source="the reference")


def speed_of(precision: str, gpu: Gpu, *, parameters: float) -> Speed:
    """The published speed of `precision` for the model size nearest to `parameters`.

    From settings of GPUs of the same architecture, end to end: the median of those of about the
    same size, and their whole range.
    Raises ConfigError where nothing is published.
    """
    if precision == "bf16":
        return BF16
    rows = [row for row in load_speedups() if _fits(row, precision, gpu)]
    if not rows:
        raise ConfigError(
            f"no step time of {precision} on {gpu.name} is published in speedups.toml. "
            f"Measure it and give --speed {precision}=RATIO, the step time in BF16 over yours."
        )
    nearest = min(rows, key=lambda row: _distance(row.parameters, parameters)).parameters
    alike = [row for row in rows if _distance(row.parameters, nearest) <= math.log(_ALIKE)]
    return Speed(
        ratio=median(sum(row.range) / 2 for row in alike),
        low=min(row.range[0] for row in alike),
        high=max(row.range[1] for row in alike),
        source="; ".join(row.source for row in alike),
        parameters=nearest,
    )


def _fits(row: Speedup, precision: str, gpu: Gpu) -> bool:
    if (row.precision, row.scope) != (precision, "step") or row.hardware not in gpu_names():
        return False
    same = load_gpu(row.hardware).architecture == gpu.architecture
    return same and math.isfinite(row.parameters)


def _distance(a: float, b: float) -> float:
    return abs(math.log(a / b))


@cache
def load_speedups() -> Sequence[Speedup]:
    """Every row of the table."""
    text = (resources.files("halfulp") / "speedups.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["speedup"]
    return tuple(Speedup(**{**row, "range": (row["range"][0], row["range"][1])}) for row in rows)
