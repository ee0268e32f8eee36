"""The progress of runs, from their events: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfulp.cli.show import is_live, number, worst_counter

_SECONDS_BETWEEN_LINES = 10.0
_COLUMNS = ("run", "step", "loss", "held out", "Δ to first", "tokens/s", "worst counter")


@dataclass
class Row:
    """What is known of one run so far; losses in nats per token."""

    name: str
    steps: int
    step: int = 0
    loss: float | None = None
    held_out: float | None = None
    held_out_fp32: float | None = None
    tokens_per_second: float | None = None
    counter: str = ""
    note: str = ""
    _tokens: int = 0

    def update(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the run."""
        kind = event["event"]
        if kind == "start":
            self.step = event["step"]
        elif kind == "step":
            self._take_step(event)
        elif kind == "eval":
            self.held_out, self.held_out_fp32 = event["loss_nats"], event["loss_nats_fp32"]
        elif kind == "counters":
            self.counter = worst_counter(event)
        elif kind == "nonfinite":
            self.note = f"{event['what']} not finite in {event['block'] or 'no single block'}"

    def _take_step(self, event: Mapping[str, Any]) -> None:
        self.step, self.loss = event["step"], _smooth(self.loss, event["loss_nats"])
        if self._tokens and event["seconds"]:
            speed = (event["tokens"] - self._tokens) / event["seconds"]
            self.tokens_per_second = _smooth(self.tokens_per_second, speed)
        self._tokens = event["tokens"]


class Progress:
    """A context that shows runs as their events arrive; the first run is what Δ refers to."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self._live: Any = None
        self._last_line = 0.0

    def __enter__(self) -> "Progress":
        if is_live():
            from rich.live import Live

            self._live = Live(self._table(), refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.update(self._table())
            self._live.stop()

    def begin(self, name: str, steps: int) -> None:
        """Open the row of the next run; the events that follow belong to it."""
        self.rows.append(Row(name, steps))

    def event(self, event: Mapping[str, Any]) -> None:
        """Show one event of the run begun last."""
        row = self.rows[-1]
        row.update(event)
        if self._live is not None:
            self._live.update(self._table())
        elif line := _line(row, event):
            now = time.monotonic()
            if event["event"] != "step" or now - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = now
                print(f"{row.name}: {line}", flush=True)

    def _cells(self, row: Row) -> list[str]:
        first = self.rows[0].held_out
        delta = ""
        if row is not self.rows[0] and row.held_out is not None and first is not None:
            delta = f"{row.held_out - first:+.3f}"
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else ""
        done = f"{row.step}/{row.steps}"
        losses = [number(row.loss), number(row.held_out)]
        return [row.name, done, *losses, delta, speed, row.note or row.counter]

    def _table(self) -> Any:
        from rich.table import Table

        table = Table(*_COLUMNS, box=None, header_style="bold", pad_edge=False)
        for row in self.rows:
            table.add_row(*self._cells(row))
        return table


def _line(row: Row, event: Mapping[str, Any]) -> str:
    kind = event["event"]
    if kind == "start":
        return f"{event['weights']}, step {event['step']} of {row.steps}, world {event['world']}"
    if kind == "step":
        return f"step {row.step}/{row.steps}, loss {number(row.loss)}, lr {event['lr']:.2g}"
    if kind == "eval":
        both = f"{number(row.held_out, 4)}, in fp32 arithmetic {number(row.held_out_fp32, 4)}"
        return f"step {event['step']}/{row.steps}, held-out loss {both} nats/token"
    if kind == "schedule":
        return f"from step {event['step']} on: {event['recipe']}"
    if kind == "loss_scale":
        skipped = ", step skipped" if event["skipped"] else ""
        return f"step {event['step']}: loss scale {event['scale']:g}{skipped}"
    if kind == "checkpoint":
        return f"step {event['step']}: wrote {event['path']}"
    return row.note if kind == "nonfinite" else ""


def _smooth(before: float | None, value: float) -> float:
    return value if before is None or before != before else 0.9 * before + 0.1 * value
