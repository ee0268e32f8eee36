"""`halfulp guard drill`: faults injected into a small run, and what the guard makes of them."""

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.common import check_outputs, overrides_of, quiet_transformers, words
from halfulp.cli.output_options import Figures
from halfulp.cli.show import print_table
from halfulp.cli.train_options import Preset, RecipeName, Seed, Sources
from halfulp.strict_json import with_nulls

if TYPE_CHECKING:
    from halfulp.train.drill import Drilled, DrillReport

_COLUMNS = (
    "fault", "noticed after", "trigger", "verdict", "names", "margin", "answer", "loss gap",
    "cost", "gates",
)  # fmt: skip


def drill(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps.")] = False,
    faults: Annotated[
        str | None, typer.Option(help="Some of them, such as weight-x8,stale-scale.")
    ] = None,
    model: Preset = None,
    data: Sources = None,
    recipe: RecipeName = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of each run.")] = None,
    seed: Seed = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other option of `halfulp train`; may be repeated."),
    ] = None,
    unguarded: Annotated[
        bool, typer.Option("--unguarded", help="Train each once more without the guard.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Directory; a new numbered one.")] = None,
    json_: Figures = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the drill at --out.")] = False,
) -> None:
    """Inject faults into a run, see the guard act.

    A small model is trained once without a fault, and goes on from there with each fault in turn:
    bad data, corrupted state, a stale scale, a wrong learning rate, broken hardware. Exit code 1
    if the guard misses a requirement.
    """
    from halfulp.cli.progress import Progress
    from halfulp.train.drill import config_of_drill
    from halfulp.train.drill import drill as run

    named = {
        "model": {"preset": model},
        "data": {"source": data or None},
        "policy": {"recipe": recipe},
        "train": {"steps": steps, "seed": seed},
        "run": {"out": str(out) if out else None},
    }
    config = config_of_drill(overrides_of(named, set_ or []), quick=quick)
    names = None if faults is None else words("--faults", faults)
    check_outputs({"--json": json_}, force=force)
    quiet_transformers()
    with Progress(compare=True) as progress:
        report = run(
            config, names, unguarded=unguarded, force=force, on_run=progress.begin,
            on_event=progress.event,
        )  # fmt: skip
    if json_ is not None:
        json_.write_text(json.dumps(with_nulls(report.to_dict()), indent=1), encoding="utf-8")
    _show(report)
    if not report.passed:
        raise typer.Exit(1)


def _show(report: "DrillReport") -> None:
    """The table, then what failed, then the verdict."""
    alarms = f"{report.false_alarms} false alarms" if report.false_alarms else "no false alarm"
    print(f"without a fault: held-out loss {report.loss_nats:.4f} nats/token, {alarms}")
    print_table(_COLUMNS, [_cells(row) for row in report.rows])
    for name, why in report.left_out.items():
        print(f"left out: {name}: {why}")
    for row in report.rows:
        for gate in row.gates:
            if not gate.passed:
                told = "could not tell" if gate.passed is None else "fail"
                print(f"{told}: {row.fault}: {gate.asked}; found: {gate.found}")
    kept = sum(row.passed for row in report.rows)
    print(f"{'pass' if report.passed else 'fail'}: {kept} of {len(report.rows)} faults")
    print(f"runs: {report.path}")


def _cells(row: "Drilled") -> tuple[str, ...]:
    noticed = "unnoticed" if row.delay is None else f"{row.delay} steps"
    gap = row.reason if math.isnan(row.loss_gap) else f"{row.loss_gap:+.4f}"
    if not math.isnan(row.unguarded_gap):
        gap += f" (unguarded {row.unguarded_gap:+.4f})"
    cost = row.withheld + row.replayed + row.passes
    margin = {math.inf: "no other"}.get(row.margin, f"{row.margin:.1f} ×")
    margin = "" if math.isnan(row.margin) else margin
    units = ", ".join(row.units)
    verdict = "pass" if row.passed else "fail"
    return (
        row.fault, noticed, row.trigger, row.verdict, units, margin, row.action, gap,
        f"{cost:.0f} steps", verdict,
    )  # fmt: skip
