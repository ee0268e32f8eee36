"""`halfulp demo`: six precisions of one small model, compared in two minutes."""

from pathlib import Path
from typing import Annotated

import typer


def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps, a smaller model.")] = False,
    out: Annotated[Path | None, typer.Option(help="Directory; a new numbered one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the demo at --out.")] = False,
) -> None:
    """Compare six precisions of one small model.

    Trains it six times on the same tokens and reports what each precision lost.
    """
    from halfulp.cli.common import quiet_transformers
    from halfulp.cli.progress import Progress
    from halfulp.demo import demo as run
    from halfulp.report import findings

    quiet_transformers()
    with Progress(compare=True) as progress:
        result = run(out, quick=quick, force=force, on_run=progress.begin, on_event=progress.event)
    for failed in (r for r in result.runs if r.failure):
        print(f"{failed.recipe} failed: {failed.failure}")
    if result.report is None:
        print(f"interrupted; the runs so far are in {result.path}")
        raise typer.Exit(130)
    for finding in findings([r.path for r in result.runs if (r.path / "config.toml").exists()]):
        print(f"{finding.verdict}: {finding.sentence}")
    print(f"report: {result.report}")
