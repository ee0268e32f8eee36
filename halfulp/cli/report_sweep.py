"""`halfulp report SWEEP`: the pages on a sweep, and its figures as JSON."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfulp.cli.common import check_outputs, command_line, plain
from halfulp.cli.report_assume import assumptions
from halfulp.cli.sweep_progress import damaged
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.report.sweep_page import Judged
    from halfulp.sweep.inputs import Inputs


def report_sweep(
    path: Path,
    out: Path,
    *,
    inputs: "Inputs | None",
    title: str | None,
    bar_nats: float,
    executive: bool,
    language: str,
    json_: Path | None,
    force: bool,
) -> None:
    """Judge the sweep at `path`, print its verdicts and write its page."""
    check_outputs({"--out": out, "--json": json_}, force=force)
    from halfulp.report.document import save
    from halfulp.report.sweep_executive import write_executive
    from halfulp.report.sweep_page import judge, write_sweep

    judged = judge(path, inputs=inputs, bar_nats=bar_nats)
    if executive:
        command = command_line()
        write_executive(judged, out, language=language, title=title, force=force, command=command)
    else:
        write_sweep(judged, out, title=title, force=force)
    for line in judged.table.damaged:
        print(damaged(line))
    for verdict in judged.verdicts:
        print(f"{str(verdict).removesuffix('.')}.")
    print(f"report: {out}")
    if json_ is not None:
        save(json.dumps(figures(judged), indent=1) + "\n", json_)
        print(f"figures: {json_}")


def inputs_of(
    gpu: str | None,
    price: str | None,
    gpu_hours: float | None,
    speedup: str | None,
    tokens: float | None,
    assume: Sequence[str],
) -> "Inputs":
    """The options on money as they are typed; ConfigError for one that is not understood."""
    from halfulp.sweep.inputs import Inputs, read_speedup

    return Inputs(
        gpu=gpu,
        price_usd=None if price is None else _price(price),
        gpu_hours=gpu_hours,
        speedup=None if speedup is None else read_speedup(speedup),
        tokens=tokens,
        **assumptions(assume),
    )


def _price(text: str) -> float | tuple[float, float]:
    low, dash, high = text.partition("-")
    try:
        return (float(low), float(high)) if dash else float(low)
    except ValueError:
        raise ConfigError(
            f"--price {text!r} is not understood. Write dollars per GPU-hour: 3.5, or 2.5-7."
        ) from None


def figures(judged: "Judged") -> dict[str, Any]:
    """Everything that the page shows, ready for JSON; what is not finite as "NaN", "Infinity"."""
    table, bills = judged.table, judged.bills
    return {
        "schema": 1,
        "sweep": judged.name,
        "bar_nats": judged.bar_nats,
        "reference": table.reference,
        "runs": {"planned": len(table.design.cells()), "done": len(table.results)},
        "damaged": list(table.damaged),
        "verdicts": [plain(verdict) for verdict in judged.verdicts],
        "rows": [plain(row) for row in table.rows()],
        "splits": [plain(split) for split in table.splits()],
        "money": None if bills is None else plain(bills),
    }
