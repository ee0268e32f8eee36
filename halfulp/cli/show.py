"""What the commands print: tables, and the progress of runs."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

# (count, out of, words): the shares that a counter row may hold.
_SHARES = (
    ("saturated", "n", "saturated"),
    ("underflow", "n", "underflow"),
    ("lost_updates", "asked", "updates lost"),
)


def is_live() -> bool:
    """True when a table may be redrawn in place: on a terminal, and not under CI."""
    return sys.stdout.isatty() and not os.environ.get("CI")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A rich table on a terminal, aligned columns of plain text elsewhere."""
    if not is_live():
        for line in _aligned([columns, *rows]):
            print(line)
        return
    from rich.console import Console

    Console().print(rich_table(columns, rows))


def rich_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Any:
    """The rich table that `print_table` prints."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    return table


def worst_counter(event: Mapping[str, Any]) -> str:
    """The largest share in a `counters` event, in words: "updates lost 61 %, layers.1.ffn"."""
    worst, words = 0.0, ""
    for row in (*event["gemms"], *event["optimizer"]):
        for count, total, what in _SHARES:
            share = row[count] / row[total] if row.get(total) and count in row else 0.0
            if share > worst:
                worst, words = share, f"{what} {share:.1%}, {row['block']}"
    return words


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of digits; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}"


def _aligned(rows: Sequence[Sequence[object]]) -> list[str]:
    texts = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(t.ljust(w) for t, w in zip(row, widths, strict=True)).rstrip() for row in texts
    ]
