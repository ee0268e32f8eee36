"""The progress of runs, from their events: a live table on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfulp.cli.show import is_live, number, worst_counter
from halfulp.guard.incident import STOP
from halfulp.report.guard_words import done, judged, seen, warning

_SECONDS_BETWEEN_LINES = 10.0
_WORTH_A_LINE = ("guard", "signal")  # also where a live table shows the rest
_COLUMNS = ("run", "step", "loss", "held out", "in fp32", "tokens/s", "left", "worst counter")
_COMPARED = ("run", "step", "loss", "held out", "Δ to first", "tokens/s", "left", "worst counter")


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
    held_out_at: dict[int, float] = field(default_factory=dict)  # by step
    counter: str = ""
    note: str = ""
    _tokens: int = 0
    _seconds: float | None = None  # of one step

    def update(self, event: Mapping[str, Any]) -> None:
        """Take in one event of the run."""
        kind = event["event"]
        if kind == "start":
            self.step = event["step"]
        elif kind == "step":
            self._take_step(event)
        elif kind == "eval":
            self.held_out, self.held_out_fp32 = event["loss_nats"], event["loss_nats_fp32"]
            self.held_out_at[event["step"]] = event["loss_nats"]
        elif kind == "counters":
            self.counter = worst_counter(event)
        elif kind == "guard":
            self._take_incident(event)
        elif kind == "nonfinite":
            self.note = f"{event['what']} not finite in {event['block'] or 'no single block'}"

    def left(self) -> str:
        """Estimated time to the last step, as minutes and seconds."""
        if self._seconds is None or self.step >= self.steps:
            return ""
        minutes, seconds = divmod(round(self._seconds * (self.steps - self.step)), 60)
        return f"{minutes}:{seconds:02d}"

    def _take_incident(self, event: Mapping[str, Any]) -> None:
        self.step = event["to"]
        self._tokens = 0  # after a rollback they are fewer
        if event["action"] == STOP:
            self.note = f"stopped by the guard: {done(event)}"

    def _take_step(self, event: Mapping[str, Any]) -> None:
        self.step, self.loss = event["step"], _smooth(self.loss, event["loss_nats"])
        if self._tokens and event["seconds"]:
            speed = (event["tokens"] - self._tokens) / event["seconds"]
            self.tokens_per_second = _smooth(self.tokens_per_second, speed)
        self._tokens = event["tokens"]
        self._seconds = _smooth(self._seconds, event["seconds"])


class Progress:
    """A context that shows runs as their events arrive; with `compare`, each against the first."""

    def __init__(self, *, compare: bool = False) -> None:
        self._compare = compare
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
        line = _line(row, event)
        if self._live is not None:
            self._live.update(self._table())
            shown = _WORTH_A_LINE if self._compare else ("start", *_WORTH_A_LINE)
            if line and event["event"] in shown:
                self._live.console.print(f"{row.name}: {line}", markup=False, highlight=False)
        elif line:
            now = time.monotonic()
            if event["event"] != "step" or now - self._last_line > _SECONDS_BETWEEN_LINES:
                self._last_line = now
                print(f"{row.name}: {line}", flush=True)

    def _cells(self, row: Row) -> list[str]:
        speed = f"{row.tokens_per_second:,.0f}" if row.tokens_per_second else ""
        last = self._delta(row) if self._compare else number(row.held_out_fp32)
        done = f"{row.step}/{row.steps}"
        losses = [number(row.loss), number(row.held_out), last]
        return [row.name, done, *losses, speed, row.left(), row.note or row.counter]

    def _delta(self, row: Row) -> str:
        """Held-out loss above that of the first run at the same step."""
        common = [step for step in row.held_out_at if step in self.rows[0].held_out_at]
        if row is self.rows[0] or not common:
            return ""
        return f"{row.held_out_at[common[-1]] - self.rows[0].held_out_at[common[-1]]:+.3f}"

    def _table(self) -> Any:
        from rich.table import Table

        columns = _COMPARED if self._compare else _COLUMNS
        table = Table(*columns, box=None, header_style="bold", pad_edge=False)
        for row in self.rows:
            table.add_row(*self._cells(row))
        return table


def _line(row: Row, event: Mapping[str, Any]) -> str:
    kind = event["event"]
    if kind == "start":
        return f"{event['weights']}, step {event['step']} of {row.steps}; {_size(row, event)}"
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
    if kind == "lr_ratios":
        ratios = ", ".join(f"{name} {ratio:.3g}" for name, ratio in event["ratios"].items())
        return f"step {event['step']}: learning rates × {ratios} ({event['why']})"
    if kind == "guard":
        return f"step {event['step']}: {seen(event)} → {judged(event)}: {done(event)}"
    if kind == "signal":
        return f"step {event['step']}: {warning(event)}"
    if kind == "checkpoint":
        return f"step {event['step']}: wrote {event['path']}"
    return row.note if kind == "nonfinite" else ""


def _size(row: Row, event: Mapping[str, Any]) -> str:
    """What is trained on how much, by whom and where."""
    text, step = event["train_tokens"], event["tokens_per_step"]
    processes = f"{event['world']} processes, " if event["world"] > 1 else ""
    return (
        f"{event['parameters']:,} parameters, {step:,} tokens a step, "
        f"{row.steps * step / text:.2g} times the {text:,} training tokens; "
        f"{processes}{event['run']}"
    )


def _smooth(before: float | None, value: float) -> float:
    return value if before is None or before != before else 0.9 * before + 0.1 * value
