"""What a table of runs says about one recipe, all its data sets together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halfulp.sweep.failures import Failures
from halfulp.sweep.interval import LEVEL
from halfulp.sweep.window import Window

if TYPE_CHECKING:
    from halfulp.sweep.table import Row, Table


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of a recipe from `planned` runs, of which `missing` are not done.

    `failures`: at its own best learning rate, all seeds and data sets. `window`: the narrowest of
    its data sets. `abandoned_fraction`: mean share done when a failing run was called diverged;
    None if none was. `tokens`: of one run. `refused`: why the model cannot take it, or "".
    `hopeless`: data sets on which every known run at its best learning rate failed.
    """

    recipe: str
    failures: Failures
    window: Window | None
    abandoned_fraction: float | None
    tokens: int
    missing: int
    planned: int
    refused: str
    hopeless: tuple[str, ...] = ()

    def cases(self) -> tuple[tuple[float, float], ...]:
        """(succeeded, failed) with lost runs counted neither way, as successes, as failures."""
        known = self.failures
        return tuple((f.runs - f.failed, f.failed) for f in (known, known.best, known.worst))

    def times(self, factor: int) -> "Evidence":
        """The same shares and window from `factor` times as many seeds, none of them lost."""
        window, narrower = self.window, 1 / math.sqrt(factor)
        if window is not None:
            low = window.octaves - (window.octaves - window.low) * narrower
            high = window.octaves + (window.high - window.octaves) * narrower
            window = replace(window, low=low, high=high)
        failures = Failures(self.failures.failed * factor, self.failures.runs * factor)
        return replace(self, failures=failures, window=window)


def gather(table: "Table", recipe: str) -> Evidence:
    """The evidence of `table` on `recipe`; the interval of its window is at 95 %."""
    return evidence_of(recipe, rows_of(table, recipe))


def evidence_of(recipe: str, rows: "Sequence[Row]") -> Evidence:
    """The evidence of the rows of `recipe`."""
    shares = [row.abandoned_fraction for row in rows if row.abandoned_fraction is not None]
    return Evidence(
        recipe=recipe,
        failures=sum((row.failures for row in rows), start=Failures(0, 0)),
        window=_narrowest([row.window for row in rows]),
        abandoned_fraction=sum(shares) / len(shares) if shares else None,
        tokens=max((row.tokens for row in rows), default=0),
        missing=sum(row.missing for row in rows),
        planned=sum(row.planned for row in rows),
        refused=next((row.refused for row in rows if row.refused), ""),
        hopeless=tuple(row.data for row in rows if row.failures.share == 1),
    )


def rows_of(table: "Table", recipe: str, level: float = LEVEL) -> "list[Row]":
    """The rows of one recipe, one per data set, with intervals at `level`."""
    return [row for row in table.rows(level) if row.recipe == recipe]


def _narrowest(windows: Sequence[Window | None]) -> Window | None:
    """None where a data set has none: a recipe must have one everywhere."""
    known = [window for window in windows if window is not None]
    return min(known, key=lambda w: w.octaves) if known and len(known) == len(windows) else None
