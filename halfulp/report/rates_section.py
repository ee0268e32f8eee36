"""The section "Learning rates per block" of a report on runs: ratios, their changes and why."""

from collections.abc import Mapping, Sequence
from typing import Any

from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.read import Record

_LEAD = (
    "A block type learns at its ratio times the run's rate (Wang et al., arXiv:2502.19002). Ratios "
    "are those in force after the step, before the schedule."
)


def rates_section(records: Sequence[Record]) -> Markup | None:
    """One table per run with ratios, a row per change; None where no run has any."""
    runs = [record for record in records if record.lr_ratios]
    if not runs:
        return None
    parts = [
        join(tag("h3", record.label), tag("div", _changes(record), class_="card flush"))
        for record in runs
    ]
    return join(tag("h2", "Learning rates per block"), tag("p", _LEAD, class_="lead"), *parts)


def _changes(record: Record) -> Markup:
    types = list(dict.fromkeys(kind for event in record.lr_ratios for kind in event["ratios"]))
    rows = [_row(event, types) for event in record.lr_ratios]
    numeric = frozenset(range(len(types) + 1))
    caption = f"Ratios of {record.label}"
    return table(["step", *types, "why"], rows, numeric=numeric, caption=caption)


def _row(event: Mapping[str, Any], types: Sequence[str]) -> list[Child]:
    ratios = event["ratios"]
    cells = [f"{ratios[kind]:.3g}" if kind in ratios else "–" for kind in types]
    return [f"{event['step']:,}", *cells, event["why"]]
