"""Results of sweeps that were never run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from halfulp.sweep.design import Cell, Design
from halfulp.sweep.result import Result
from halfulp.sweep.table import Table

LRS = (1e-3, 2e-3, 4e-3)


@dataclass(frozen=True)
class Plan:
    """What a table asks of a design."""

    recipes: tuple[str, ...] = ("fp32", "nvfp4")
    reference: str = "fp32"
    lrs: tuple[float, ...] = LRS
    seeds: tuple[int, ...] = (0, 1, 2)
    data: Mapping[str, tuple[str, ...]] | Sequence[str] = ("text",)

    def cells(self) -> tuple[Cell, ...]:
        return tuple(
            Cell(recipe, lr, seed, data)
            for data in self.data
            for seed in self.seeds
            for lr in self.lrs
            for recipe in self.recipes
        )


def result(cell: Cell, **fields: Any) -> Result:
    """A healthy run of loss 2.4 in 100 steps unless `fields` say otherwise."""
    healthy: dict[str, Any] = {
        "status": "finished", "steps": 100, "planned_steps": 100, "tokens": 6400,
        "parameters": 1000, "loss_nats": 2.4, "tail_nats": 2.4, "best_nats": 2.4,
        "initial_nats": 5.5, "unigram_nats": 3.2, "sharpness": 0.1, "sharpness_centered": 0.08,
        "logz": 1.0, "spikes": {"olmo_core": 0.01, "olmo2": float("nan")},
    }  # fmt: skip
    return Result(
        id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
        **(healthy | fields),
    )  # fmt: skip


def table(plan: Plan, fields_of: Callable[[Cell], dict[str, Any] | None]) -> Table:
    """The table of `plan`; a cell whose fields are None is not done."""
    made = [(cell, fields_of(cell)) for cell in plan.cells()]
    results = tuple(result(cell, **fields) for cell, fields in made if fields is not None)
    return Table(cast(Design, plan), results)
