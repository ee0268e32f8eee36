"""`halfulp sweep status`: how far a sweep is."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.show import print_table
from halfulp.cli.sweep_progress import clock, damaged

if TYPE_CHECKING:
    from halfulp.sweep.status import Status

_COLUMNS = (
    "recipe", "data", "done", "finished", "failed", "lost", "lowest loss", "at lr",
)  # fmt: skip


def status(
    path: Annotated[Path, typer.Argument(help="Directory of a sweep.")],
    watch: Annotated[bool, typer.Option("--watch", help="Until the sweep is done.")] = False,
    every: Annotated[
        float, typer.Option(min=0.1, help="Seconds between two looks of --watch.")
    ] = 5.0,
) -> None:
    """Show what is done, running and failed."""
    from halfulp.sweep.status import status_of

    while True:
        found = status_of(path)
        _show(found)
        if not watch or found.seconds_left == 0.0:
            return
        time.sleep(every)
        print()


def _show(found: "Status") -> None:
    rows = [
        (
            row.recipe, row.data, f"{row.finished + row.failed + row.lost}/{row.cells}",
            row.finished, row.failed, row.lost,
            "" if row.best_nats != row.best_nats else f"{row.best_nats:.4f}",
            "" if row.best_lr != row.best_lr else f"{row.best_lr:.2g}",
        )
        for row in found.rows
    ]  # fmt: skip
    print_table(_COLUMNS, rows)
    for run in found.running:
        print(f"running: {run.id}: step {run.step}/{run.steps}, loss {run.loss_nats:.3f}")
    for line in found.damaged:
        print(damaged(line))
    left = "" if found.done == found.cells else f", {clock(found.seconds_left)} left"
    print(f"{found.done} of {found.cells} runs done{left}")
