"""`halfulp report`: one page that compares runs."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories; the first is the baseline.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write an HTML page that compares runs.

    The page needs no network. What it finds is also printed.
    """
    from halfulp.report import findings, write_report

    path = write_report(runs, out, title=title, force=force)
    for finding in findings(runs):
        print(f"{finding.verdict}: {finding.sentence}")
    print(f"report: {path}")
