"""The progress of a sweep: a bar on a terminal, one line per result everywhere."""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from halfulp.cli.show import is_live

if TYPE_CHECKING:
    from halfulp.sweep.design import Design


class SweepProgress:
    """A context that shows the events of `run_design`."""

    def __init__(self, design: "Design") -> None:
        self._cells = {cell.id: cell for cell in design.cells()}
        self._done = self._failed = 0
        self._began = time.monotonic()
        self._here = 0  # results of this call
        self._bar: Any = None

    def __enter__(self) -> "SweepProgress":
        if is_live():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            self._bar = Progress(
                BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
            )
            self._bar.start()
            self._task = self._bar.add_task("reading", total=len(self._cells))
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event."""
        kind = event["event"]
        if kind == "begin":
            self._done = event["done"]
            self._say(f"{event['cells']} runs, {self._done} done")
        elif kind == "result":
            self._done += 1
            self._here += 1
            self._failed += event["status"] != "finished"
            self._say(f"{self._done}/{len(self._cells)} {event['id']}: {_came_to(event)}")
        elif kind == "retry":
            self._say(f"{event['id']}: {event['message']}; tried once more")
        elif kind == "damaged":
            self._say(damaged(event["message"]))
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, description=self._left())

    def _left(self) -> str:
        failed = f"{self._failed} failed, " if self._failed else ""
        if not self._here:
            return failed + "no estimate yet"
        each = (time.monotonic() - self._began) / self._here
        return failed + f"{clock(each * (len(self._cells) - self._done))} left"

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.console.print(line, markup=False, highlight=False)
        else:
            print(line, flush=True)


def damaged(what: str) -> str:
    """A line of the results that could not be read, and what that means."""
    return f"damaged: {what}; if it was a result, its run counts as not done"


def clock(seconds: float) -> str:
    """A duration as h:mm:ss; nothing for nan."""
    if seconds != seconds:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _came_to(event: Mapping[str, Any]) -> str:
    if event["status"] == "finished":
        return f"held-out loss {event['loss_nats']:.4f} nats/token, {event['wall_seconds']:.1f} s"
    return f"{event['status']}: {event['message'].partition('. ')[0]}"
