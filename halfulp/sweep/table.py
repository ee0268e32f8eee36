"""What a sweep came to: one row per recipe and data set."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from halfulp.errors import RunError
from halfulp.sweep.design import Design
from halfulp.sweep.interval import LEVEL, mean_interval
from halfulp.sweep.result import Result
from halfulp.sweep.row import Grid, Row, make_row
from halfulp.sweep.split import Split, rounding_pairs

if TYPE_CHECKING:
    from halfulp.sweep.inputs import Inputs

Key = tuple[str, float, int, str]


@dataclass(frozen=True)
class Table:
    """The results of a design, as far as they are there; of two of one run the later counts.

    RunError for a result that is no run of the design.
    """

    design: Design
    results: tuple[Result, ...]
    path: Path | None = None
    damaged: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        cells = {(c.recipe, c.lr, c.seed, c.data) for c in self.design.cells()}
        for result in self.results:
            if _key(result) not in cells:
                raise RunError(
                    f"the result {result.id} (recipe {result.recipe}, lr {result.lr:g}, seed "
                    f"{result.seed}, data {result.data}) is no run of this design. Keep the "
                    "results of every sweep in a directory of its own."
                )

    @property
    def reference(self) -> str:
        return self.design.reference

    @property
    def recipes(self) -> tuple[str, ...]:
        return tuple(self.design.recipes)

    @property
    def lrs(self) -> tuple[float, ...]:
        """Ascending."""
        return tuple(sorted(self.design.lrs))

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(self.design.seeds)

    @property
    def data(self) -> tuple[str, ...]:
        """Names of the data sets."""
        return tuple(self.design.data)

    def rows(self, level: float = LEVEL) -> tuple[Row, ...]:
        """Data set by data set, the reference first; with intervals at `level`."""
        others = [recipe for recipe in self.recipes if recipe != self.reference]
        found = self._rows if level == LEVEL else self._rows_at(level)
        return tuple(found[r, d] for d in self.data for r in (self.reference, *others))

    def row(self, recipe: str, data: str | None = None) -> Row:
        """The row of `recipe`; `data` may be left out where there is one data set.

        RunError for a recipe or a data set that the sweep does not hold.
        """
        name = self.data[0] if data is None and len(self.data) == 1 else data
        if (row := self._rows.get((recipe, name or ""))) is None:
            raise RunError(
                f"a row of recipe {recipe!r} on data {data!r} was asked for. The sweep holds "
                f"{', '.join(self.recipes)} on {', '.join(self.data)}."
            )
        return row

    def splits(self) -> tuple[Split, ...]:
        """Bias and resolution of every truncating recipe whose twin rounds to nearest.

        At the reference's best learning rate; only pairs that have runs there.
        """
        pairs = rounding_pairs(self.recipes)
        found = [self._split(data, *pair) for data in self.data for pair in pairs]
        return tuple(split for split in found if split is not None)

    def verdict(self, bar_nats: float = 0.01, inputs: "Inputs | None" = None) -> str:
        """One sentence per recipe: may it replace the reference? With `inputs`, does it pay?

        The rules, and ConfigError for what cannot be judged: halfulp.sweep.verdict.
        """
        from halfulp.sweep.money import money
        from halfulp.sweep.verdict import verdicts

        bills = None if inputs is None else money(self, inputs)
        return "\n".join(v.sentence for v in verdicts(self, bills, bar_nats=bar_nats))

    @cached_property
    def _rows(self) -> Mapping[tuple[str, str], Row]:
        return self._rows_at(LEVEL)

    def _rows_at(self, level: float) -> Mapping[tuple[str, str], Row]:
        return {
            (recipe, data): make_row(
                self._grid(recipe, data),
                self._grid(self.reference, data),
                initial_nats=self._initial_nats(data),
                level=level,
            )
            for data in self.data
            for recipe in self.recipes
        }

    @cached_property
    def _results(self) -> Mapping[Key, Result]:
        return {_key(result): result for result in self.results}

    def _grid(self, recipe: str, data: str) -> Grid:
        results = tuple(
            tuple(self._results.get((recipe, lr, seed, data)) for seed in self.seeds)
            for lr in self.lrs
        )
        return Grid(recipe=recipe, data=data, lrs=self.lrs, results=results)

    def _initial_nats(self, data: str) -> float:
        known = [r.initial_nats for r in self.results if r.data == data]
        finite = [value for value in known if np.isfinite(value)]
        return median(finite) if finite else float("nan")

    def _split(self, data: str, truncate: str, nearest: str) -> Split | None:
        lr = self.row(self.reference, data).best_lr
        if lr is None:
            return None
        rate, initial = self.lrs.index(lr), self._initial_nats(data)
        names = (truncate, nearest, self.reference)
        a, b, base = (self._grid(name, data).losses(initial)[rate] for name in names)
        bias, resolution, total = (mean_interval(d) for d in (a - b, b - base, a - base))
        if bias is None or resolution is None or total is None:
            return None
        return Split(
            data=data, truncate=truncate, nearest=nearest, lr=lr, bias=bias,
            resolution=resolution, total=total,
        )  # fmt: skip


def _key(result: Result) -> Key:
    return result.recipe, result.lr, result.seed, result.data
