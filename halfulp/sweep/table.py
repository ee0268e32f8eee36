"""What a sweep came to: one row per recipe and data set."""

from dataclasses import dataclass
from pathlib import Path

from halfulp.sweep.design import Design
from halfulp.sweep.result import Result


@dataclass(frozen=True)
class Table:
    """The results of a design."""

    design: Design
    results: tuple[Result, ...]
    path: Path | None = None
    damaged: tuple[str, ...] = ()
