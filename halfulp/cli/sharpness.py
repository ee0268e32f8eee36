"""`halfulp sharpness`: how sharp the loss is in each block, and what follows from it."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfulp.cli.common import (
    Steps,
    check_outputs,
    command_line,
    pairs,
    quiet_transformers,
    words,
)
from halfulp.cli.model_options import Hints, RunOrModel, Texts, TokenizerName
from halfulp.cli.output_options import Figures, Force, Page
from halfulp.cli.sharpness_formats import cells, forecast_of, prices_of, print_forecast
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.cli.load import Loaded
    from halfulp.sharpness.report import SharpnessReport

Ratios = Mapping[str, Mapping[str, float]]

_ROWS, _FORWARDS = 32, 8  # of text and passes, for the critical step
_WANTED = 0.05  # relative standard error that the column "draws for 5 %" is about


def sharpness(
    model: RunOrModel,
    data: Texts = None,
    tokenizer: TokenizerName = None,
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
    formats: Annotated[
        str | None,
        typer.Option(
            help="Also what rounding each block to these formats does to the loss; words of "
            "`halfulp formats`, or quantizers, with commas."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="With --formats: nats per token that one block type may cost. [default: 0.005]"
        ),
    ] = None,
    hint: Hints = None,
    seed: Annotated[int, typer.Option(help="Of labels, probes and the choice of text.")] = 0,
    html: Page = None,
    json_: Figures = None,
    force: Force = False,
) -> None:
    """Measure how sharp the loss is in each block.

    Sharpness is the mean diagonal entry of the curvature: trace / parameters (arXiv:2502.19002).
    """
    check_outputs({"--html": html, "--json": json_}, force=force)
    asked = words("--formats", formats) if formats is not None else []
    hints = pairs("--hint", hint or [])
    limit = _budget(asked, budget)
    loaded = _load(model, data, tokenizer, tokens, draws, seed)
    report = _measure(loaded, estimator, draws, rel_se, tokens, hints, seed)
    ratios = _ratios(report)
    _print(report, ratios, per_layer)
    if (run := Path(model)).joinpath("events.jsonl").is_file():
        _print_critical(run, loaded)
    rounding: list[dict[str, str]] = []
    figures: dict[str, Any] = {"lr_ratios": ratios}
    if asked:
        found = forecast_of(loaded, asked, draws=draws, seed=seed, budget=limit, hints=hints)
        prices = prices_of(loaded, asked, seed=seed, hints=hints)
        print_forecast(found, prices, said=report.notes)
        rounding = cells(found, prices)
        figures["rounding"] = json.loads(found.to_json())
        figures["kl_by_check"] = [
            {"block": block, "format": word, "kl": kl} for (block, word), kl in prices.items()
        ]
    if json_ is not None:
        _write_figures(report, figures, json_)
    if html is not None:
        _write_page(report, ratios, rounding, html)


def _budget(formats: list[str], budget: float | None) -> float:
    """The budget in nats per token; FormatError and ConfigError for what cannot be forecast."""
    if budget is not None and not 0 < budget < math.inf:
        raise ConfigError(f"--budget {budget:g} leaves no room. Give nats per token above 0.")
    if not formats:
        if budget is not None:
            raise ConfigError("--budget belongs to --formats. Give formats, or leave it out.")
        return math.nan
    from halfulp.sharpness.rounding import BUDGET_NATS
    from halfulp.sharpness.weights import weight_quantizer

    for word in formats:
        weight_quantizer(word)
    return BUDGET_NATS if budget is None else budget


def _write_figures(report: "SharpnessReport", figures: dict[str, Any], path: Path) -> None:
    """What `SharpnessReport.load` reads, and beside it the figures of the command."""
    text = json.dumps(json.loads(report.to_json()) | figures, indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}.") from error
    print(f"figures: {path}")


def _write_page(
    report: "SharpnessReport", ratios: Ratios, rounding: list[dict[str, str]], path: Path
) -> None:
    from halfulp.report.sharpness_page import write_sharpness

    written = write_sharpness(
        report, path, name=report.model, ratios=ratios, rounding=rounding, force=True,
        command=command_line(),
    )  # fmt: skip
    print(f"page: {written}")


def _load(
    where: str, data: list[str] | None, tokenizer: str | None, tokens: int, draws: int, seed: int
) -> "Loaded":
    from halfulp.cli.load import check_tokens, load_model

    quiet_transformers()
    check_tokens(tokens)
    wanted = max(1, draws) * tokens
    return load_model(where, data=data, tokenizer=tokenizer, tokens=wanted, seed=seed)


def _measure(
    loaded: "Loaded", estimator: str, draws: int, rel_se: float | None, tokens: int,
    hints: dict[str, str], seed: int,
) -> "SharpnessReport":  # fmt: skip
    from halfulp.sharpness.measure import sharpness as measure

    rows, length = loaded.text.shape
    each = max(1, min(rows, tokens // length))
    batches = loaded.text[: rows // each * each].split(each)  # all of one size
    with Steps() as steps:
        report = measure(
            loaded.model, batches, estimator=estimator, draws=draws, rel_se=rel_se,
            hints=hints or None, seed=seed, progress=steps.count,
        )  # fmt: skip
    notes = [*loaded.notes, *report.notes]
    if len(batches) < report.draws:
        notes.append(
            f"The text is enough for {len(batches)} of the {report.draws} draws, so that the "
            "errors do not cover all that another text would change."
        )
    return replace(report, model=f"{loaded.name} ({report.model})", notes=tuple(notes))


def _ratios(report: "SharpnessReport") -> Ratios:
    """Rule → ratio of the learning rate per block type: the published ones and the measured.

    Traces of the exact Hessian may be negative and give no ratios.
    """
    from halfulp.sharpness.ratios import measured, resolve

    types = list(report.by_type)
    published = dict(resolve("paper", types).by_type)
    if report.estimator == "hutchinson" or "qkvo" in types:
        return {"paper": published}
    return {"measured": dict(measured(report).by_type), "paper": published}


def _print(report: "SharpnessReport", ratios: Ratios, per_layer: bool) -> None:
    print(
        f"{report.model}: loss of the first batch {report.loss_nats:.4f} nats/token, "
        f"{report.estimator}, {report.draws} draws of {report.positions} predictions, "
        f"seed {report.seed}, the time of {report.cost_steps:.1f} training steps"
    )
    for note in report.notes:
        print(f"note: {note}")
    _print_rows(report, "type", ratios)
    if per_layer:
        print("\nEvery block")
        _print_rows(report, "block", {})
    if report.eigenvalues:
        _print_eigenvalues(report)
    print(f"order: {report.order()}   (< differs by 1.96 standard errors, ~ cannot be told)")


def _print_rows(report: "SharpnessReport", by: str, ratios: Ratios) -> None:
    from halfulp.cli.show import print_table

    norm = report.by_type.get("norm")
    columns = ("block", "parameters", "sharpness", "± se", "× norm", "draws for 5 %")
    rows = []
    for row in report.rows(by):
        times = row.sharpness / norm.sharpness if norm else math.nan
        rates = (ratio.get(row.name) for ratio in ratios.values())
        rows.append(
            (row.name, f"{row.parameters:,}", f"{row.sharpness:.3g}", f"{row.rel_se:.1%}",
             f"{times:.3g}" if norm else "–", row.draws_for(_WANTED),
             *("–" if rate is None else f"{rate:.3g}" for rate in rates))
        )  # fmt: skip
    print_table((*columns, *(f"lr ratio, {rule}" for rule in ratios)), rows)


def _print_critical(run: Path, loaded: "Loaded") -> None:
    """How far the run's last update could have gone on before the loss rises."""
    from halfulp.cli.load import weights_of
    from halfulp.pieces import pieces
    from halfulp.sharpness.critical import adam_direction, critical_sharpness
    from halfulp.train import checkpoint
    from halfulp.train.blockwise import last_ratios
    from halfulp.train.loop import config_of
    from halfulp.train.schedule import lr_at

    config, weights = config_of(run), weights_of(run)
    assert weights is not None
    train = config.train
    ratios = last_ratios(config, pieces(loaded.model, config.model.hints), weights)
    direction = adam_direction(weights, betas=train.betas, eps=train.eps)
    direction = {name: d * ratios.get(name, 1.0) for name, d in direction.items()}
    lr = lr_at(max(checkpoint.steps_in(run / "checkpoints")) - 1, train)
    found = critical_sharpness(
        loaded.model, direction, loaded.text[:_ROWS], start=lr, forwards=_FORWARDS
    )
    low, high = found.bracket
    if math.isinf(high):
        text = f"beyond {low:.2g}: the loss never rose"
    elif low == 0:
        text = f"below {high:.2g}: the loss rose at every step tried"
    else:
        text = f"{found.step:.2g}, in [{low:.2g}, {high:.2g}] (2 / step = {found.sharpness:.3g})"
    print(
        f"critical step along the last update: {text}; the run's last rate was {lr:.2g}"
        f"{', times the ratio of each block' if ratios else ''}"
    )


def _print_eigenvalues(report: "SharpnessReport") -> None:
    from halfulp.cli.show import print_table

    print("\nLargest eigenvalue of the Hessian of each block type")
    print_table(
        ("block", "eigenvalue"), [(n, f"{value:.4g}") for n, value in report.eigenvalues.items()]
    )
