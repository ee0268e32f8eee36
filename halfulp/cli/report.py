"""`halfulp report`: one page that compares runs, or judges a sweep."""

import math
from pathlib import Path
from typing import Annotated

import typer

from halfulp.errors import ConfigError


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Run directories, compared with the fp32 one, else with the first; or one sweep."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="HTML file.")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Heading of the page.")] = None,
    gpu: Annotated[str | None, typer.Option(help="Of a sweep: the GPU that will train.")] = None,
    price: Annotated[
        str | None, typer.Option(help="Dollars per GPU-hour: 3.5, or a range 2.5-7.")
    ] = None,
    gpu_hours: Annotated[
        float | None, typer.Option(help="GPU-hours of one run with the reference.")
    ] = None,
    speedup: Annotated[
        str | None,
        typer.Option(help="Step time of the reference over a recipe's: 1.35, or te_current=1.35,…"),
    ] = None,
    tokens: Annotated[float | None, typer.Option(help="Tokens of one run: 2e12.")] = None,
    assume: Annotated[
        list[str] | None,
        typer.Option(help="Another figure of the bill: proxy_fraction=0.02; may be repeated."),
    ] = None,
    bar: Annotated[float, typer.Option(help="Nats per token that a recipe may cost.")] = 0.01,
    executive: Annotated[
        bool, typer.Option("--executive", help="Of a sweep: one printed page for whoever decides.")
    ] = False,
    language: Annotated[
        str | None, typer.Option(help="Of the executive page: en (default) or ja.")
    ] = None,
    json_: Annotated[
        Path | None, typer.Option("--json", help="Of a sweep: write all figures there.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
) -> None:
    """Write an HTML page that compares runs, or judges a sweep.

    The page needs no network. What it finds is also printed. With anything on money (GPU to
    assumption) the page on a sweep says what each recipe costs until one run has succeeded.
    """
    if not 0 <= bar < math.inf:
        raise ConfigError(f"--bar = {bar:g} cannot be used. Give nats per token, such as 0.01.")
    money = {"--gpu": gpu, "--price": price, "--gpu-hours": gpu_hours, "--speedup": speedup}
    money |= {"--tokens": tokens, "--assume": assume or None}
    page = {"--executive": executive or None, "--language": language, "--json": json_}
    given = [name for name, value in {**money, **page}.items() if value is not None]
    if not _is_sweep(runs):
        _report_runs(runs, out, title, bar, force, given)
        return
    if language and not executive:
        raise ConfigError("--language belongs to --executive. Give both, or neither.")
    from halfulp.cli.report_sweep import inputs_of, report_sweep

    said = any(value is not None for value in money.values())
    inputs = inputs_of(gpu, price, gpu_hours, speedup, tokens, assume or []) if said else None
    report_sweep(
        runs[0], out, inputs=inputs, title=title, bar_nats=bar, executive=executive,
        language=language or "en", json_=json_, force=force,
    )  # fmt: skip


def _is_sweep(runs: list[Path]) -> bool:
    """Whether the one path given is a sweep; ConfigError for a sweep among others."""
    from halfulp.sweep.store import is_sweep

    sweeps = [path for path in runs if is_sweep(path)]
    if sweeps and len(runs) > 1:
        raise ConfigError(
            f"{', '.join(map(str, sweeps))} was given with other directories. A page is on one "
            "sweep, or on runs: call the command once for each."
        )
    return bool(sweeps)


def _report_runs(
    runs: list[Path], out: Path, title: str | None, bar_nats: float, force: bool, given: list[str]
) -> None:
    if given:
        raise ConfigError(
            f"{', '.join(given)}: only the report of a sweep takes that, and "
            f"{', '.join(map(str, runs))} is none. Give the directory of `halfulp sweep`, or leave "
            "it out."
        )
    from halfulp.report import findings, write_report

    path = write_report(runs, out, title=title, force=force, bar_nats=bar_nats)
    for finding in findings(runs, bar_nats=bar_nats):
        print(f"{finding.verdict}: {finding.sentence}")
    print(f"report: {path}")
