"""`halfulp sharpness`: how sharp the loss is in each block, and what follows from it."""

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.common import Steps, check_outputs, pairs, quiet_transformers
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.cli.load import Loaded
    from halfulp.sharpness.report import SharpnessReport

_WANTED = 0.05  # relative standard error that the column "draws for 5 %" is about


def sharpness(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="Run directory, local Hugging Face directory, or preset."
        ),
    ],
    data: Annotated[
        list[str] | None, typer.Option(help='Text: "stdlib" or a path; may be repeated.')
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help='"bytes", "bpe:N" or a tokenizer.json; the model\'s own.')
    ] = None,
    estimator: Annotated[
        str,
        typer.Option(
            help="gnb: Gauss-Newton, unbiased and cheapest. fisher: true labels. hutchinson: the "
            "exact Hessian. lanczos: its largest eigenvalue per block type."
        ),
    ] = "gnb",
    draws: Annotated[int, typer.Option(help="Sampled labels, or probes.")] = 16,
    rel_se: Annotated[
        float | None, typer.Option(help="Draw on until the relative standard errors are below.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per draw.")] = 512,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Also every block type of every layer.")
    ] = False,
    hint: Annotated[
        list[str] | None,
        typer.Option(help="'GLOB=BLOCK' for parameters that halfulp cannot place."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of labels, probes and the choice of text.")] = 0,
    html: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Measure how sharp the loss is in each block.

    Sharpness is the mean diagonal entry of the curvature: trace / parameters (arXiv:2502.19002).
    """
    check_outputs({"--html": html, "--json": json_}, force=force)
    report = _measure(
        _load(model, data, tokenizer, tokens, draws, seed),
        estimator, draws, rel_se, tokens, pairs("--hint", hint or []), seed,
    )  # fmt: skip
    _print(report, per_layer)
    try:
        if json_ is not None:
            report.save(json_)
            print(f"figures: {json_}")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}.") from error


def _load(
    where: str, data: list[str] | None, tokenizer: str | None, tokens: int, draws: int, seed: int
) -> "Loaded":
    from halfulp.cli.load import load_model

    quiet_transformers()
    wanted = max(1, draws) * tokens
    return load_model(where, data=data, tokenizer=tokenizer, tokens=wanted, seed=seed)


def _measure(
    loaded: "Loaded", estimator: str, draws: int, rel_se: float | None, tokens: int,
    hints: dict[str, str], seed: int,
) -> "SharpnessReport":  # fmt: skip
    from halfulp.sharpness.measure import sharpness as measure

    rows, length = loaded.text.shape
    batches = loaded.text.split(max(1, min(rows, tokens // length)))
    with Steps() as steps:
        report = measure(
            loaded.model, batches, estimator=estimator, draws=draws, rel_se=rel_se,
            hints=hints or None, seed=seed, progress=steps.count,
        )  # fmt: skip
    notes = [*loaded.notes, *report.notes]
    if len(batches) < draws:
        notes.append(
            f"The text has {len(batches)} batches for {draws} draws: errors do not cover the text."
        )
    return replace(report, model=f"{loaded.name} ({report.model})", notes=tuple(notes))


def _print(report: "SharpnessReport", per_layer: bool) -> None:
    print(
        f"{report.model}: loss {report.loss_nats:.4f} nats/token, {report.estimator}, "
        f"{report.draws} draws of {report.positions} predictions, seed {report.seed}, the time of "
        f"{report.cost_steps:.1f} training steps"
    )
    for note in report.notes:
        print(f"note: {note}")
    _print_rows(report, "type")
    if per_layer:
        print("\nEvery block")
        _print_rows(report, "block")
    if report.eigenvalues:
        _print_eigenvalues(report)
    print(f"order: {report.order()}   (< differs by 1.96 standard errors, ~ cannot be told)")


def _print_rows(report: "SharpnessReport", by: str) -> None:
    from halfulp.cli.show import print_table

    norm = report.by_type.get("norm")
    columns = ("block", "parameters", "sharpness", "± se", "× norm", "draws for 5 %")
    rows = []
    for row in report.rows(by):
        times = row.sharpness / norm.sharpness if norm else math.nan
        rows.append(
            (row.name, f"{row.parameters:,}", f"{row.sharpness:.3g}", f"{row.rel_se:.1%}",
             f"{times:.3g}" if norm else "–", row.draws_for(_WANTED))
        )  # fmt: skip
    print_table(columns, rows)


def _print_eigenvalues(report: "SharpnessReport") -> None:
    from halfulp.cli.show import print_table

    print("\nLargest eigenvalue of the Hessian of each block type")
    print_table(
        ("block", "eigenvalue"), [(n, f"{value:.4g}") for n, value in report.eigenvalues.items()]
    )
