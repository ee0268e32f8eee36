"""`halfulp sweep status`: how far a sweep is."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.show import is_live, print_table, rich_table
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

    found = status_of(path)
    if watch and is_live():
        found = _watch(path, every)
    while watch and not is_live() and found.seconds_left != 0.0:
        _show(found)
        print()
        time.sleep(every)
        found = status_of(path)
    _show(found)


def _watch(path: Path, every: float) -> "Status":
    """Redraw the status in place until the sweep is done; the last one."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    from halfulp.sweep.status import status_of

    with Live(transient=True) as live:
        while (found := status_of(path)).seconds_left != 0.0:
            live.update(Group(rich_table(_COLUMNS, _rows(found)), *map(Text, _lines(found))))
            time.sleep(every)
    return found


def _show(found: "Status") -> None:
    print_table(_COLUMNS, _rows(found))
    for line in _lines(found):
        print(line)


def _rows(found: "Status") -> list[tuple[object, ...]]:
    return [
        (
            row.recipe, row.data, f"{row.finished + row.failed + row.lost}/{row.cells}",
            row.finished, row.failed, row.lost,
            "" if row.best_nats != row.best_nats else f"{row.best_nats:.4f}",
            "" if row.best_lr != row.best_lr else f"{row.best_lr:.2g}",
        )
        for row in found.rows
    ]  # fmt: skip


def _lines(found: "Status") -> list[str]:
    never = f", {found.left_out} left out: recipe refused" if found.left_out else ""
    whole = found.done + found.left_out == found.cells
    left = never if whole else f"{never}, {clock(found.seconds_left)} left"
    return [
        *(
            f"running: {run.id}: step {run.step}/{run.steps}, loss {run.loss_nats:.3f}"
            for run in found.running
        ),
        *map(damaged, found.damaged),
        f"{found.done} of {found.cells} runs done{left}",
    ]
