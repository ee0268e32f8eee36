"""`halfulp plan`: how big, how long, how precise, and what it costs."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.common import check_outputs, command_line
from halfulp.cli.plan_fit import fit
from halfulp.cli.plan_kausik import kausik
from halfulp.cli.plan_laws import laws
from halfulp.cli.plan_sparsity import sparsity
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.plan.budget import Plan
    from halfulp.plan.facts import Facts

plan = typer.Typer(name="plan")


@plan.callback(invoke_without_command=True)
def plan_run(
    context: typer.Context,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200, b200, mi300x or mi355x.")] = "h100",
    gpu_hours: Annotated[
        float | None, typer.Option(help="The budget: GPU-hours of training.")
    ] = None,
    money: Annotated[float | None, typer.Option(help="The budget: US dollars.")] = None,
    flops: Annotated[float | None, typer.Option(help="The budget: FLOPs, 6 N D.")] = None,
    target_loss: Annotated[float | None, typer.Option(help="The goal: nats per token.")] = None,
    unique_tokens: Annotated[
        float | None, typer.Option(help="Different tokens there are; beyond, they are repeated.")
    ] = None,
    serve_tokens: Annotated[
        float, typer.Option(help="Tokens to be served: a smaller model for longer.")
    ] = 0.0,
    precision: Annotated[str, typer.Option(help="auto, bf16, fp8, mxfp8 or nvfp4.")] = "auto",
    law: Annotated[
        str, typer.Option(help="See `halfulp plan laws`; or fit.json or runs.csv of your own.")
    ] = "epoch",
    corpus: Annotated[
        Path | None, typer.Option(help="What `halfulp corpus` found: a JSON file.")
    ] = None,
    mfu: Annotated[float, typer.Option(help="Share of the BF16 peak that training reaches.")] = 0.4,
    gpus: Annotated[int | None, typer.Option(help="How many: for days and memory.")] = None,
    price: Annotated[float | None, typer.Option(help="Yours, in dollars per GPU-hour.")] = None,
    speed: Annotated[
        str, typer.Option(help="Measured, over BF16: fp8=1.35,nvfp4=1.6 or a JSON file.")
    ] = "",
    html: Annotated[Path | None, typer.Option(help="Write the page there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the loss surface there, as SVG.")] = None,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    language: Annotated[str, typer.Option(help="Of page, plot and paragraph: en or ja.")] = "en",
    write_config: Annotated[
        Path | None, typer.Option(help="Write the run there, for `halfulp train`.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text of that run; may be repeated.")
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Tokenizer of that run.")] = None,
    length: Annotated[int | None, typer.Option(help="Sequence length of that run: 2048.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
) -> None:
    """Plan a run: size, tokens, precision, cost.

    Give exactly one of --gpu-hours, --money, --flops and --target-loss. Prints parameters, tokens,
    epochs, precision, batch, learning rate, cost, the loss with its 80 % band, and what twice the
    budget would buy. What is used beyond its data is flagged.
    """  # fmt: skip
    if context.invoked_subcommand:
        _no_options(context)
        return
    from halfulp.plan.budget import plan as make
    from halfulp.plan.facts import read_facts
    from halfulp.plan.speeds import read_speeds

    outputs = {"--html": html, "--plot": plot, "--json": json_, "--write-config": write_config}
    check_outputs(outputs, force=force, inputs=(law, corpus, speed))
    _check_config_options(write_config, data, tokenizer, length)
    facts = None if corpus is None else read_facts(corpus)
    if unique_tokens is None and facts is not None:
        unique_tokens = facts.unique_symbols
    found = make(
        gpu, gpu_hours=gpu_hours, money_usd=money, flops=flops, target_loss_nats=target_loss,
        unique_tokens=unique_tokens, serve_tokens=serve_tokens, precision=precision, law=law,
        mfu=mfu, gpus=gpus, price_usd=price, speeds=read_speeds(speed) if speed else None,
    )  # fmt: skip
    _show(found, facts, language)
    _write(found, facts, html, plot, json_, language)
    if write_config is not None:
        _write_config(found, write_config, data or [], tokenizer or "bytes", length or 2048)


for command in (laws, fit, kausik, sparsity):
    plan.command()(command)


def _no_options(context: typer.Context) -> None:
    for name in context.params:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise ConfigError(
                f"--{name.strip('_').replace('_', '-')} belongs to `halfulp plan` itself. Give "
                f"options of {context.invoked_subcommand} after its name."
            )


def _check_config_options(
    write_config: Path | None, data: list[str] | None, tokenizer: str | None, length: int | None
) -> None:
    if write_config is not None and not (data and all(data)):
        raise ConfigError(
            "--write-config needs the text of the run: give --data PATH, or --data stdlib."
        )
    given = {"--data": data, "--tokenizer": tokenizer, "--length": length}
    if write_config is None and any(given.values()):
        names = ", ".join(name for name, value in given.items() if value)
        raise ConfigError(f"{names} only matters to --write-config. Add it, or delete {names}.")
    if length is not None and length < 1:
        raise ConfigError(f"--length {length} is no sequence. Give 1 or more.")


def _show(found: "Plan", facts: "Facts | None", language: str) -> None:
    from halfulp.cli.plan_show import print_plan
    from halfulp.report.plan_words import paragraph

    text = paragraph(found, language)
    print_plan(found, facts)
    print(f"\n{text}")


def _write(
    found: "Plan", facts: "Facts | None", html: Path | None, plot: Path | None,
    json_: Path | None, language: str,
) -> None:  # fmt: skip
    try:
        if json_ is not None:
            from halfulp.plan.content import to_json

            json_.write_text(to_json(found, facts, command=command_line()) + "\n", encoding="utf-8")
            print(f"figures: {json_}")
        if plot is not None:
            from halfulp.report.plan_plots import surface_svg

            plot.write_text(surface_svg(found, language), encoding="utf-8")
            print(f"plot: {plot}")
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be written: {error.strerror}.") from error
    if html is not None:
        from halfulp.report.plan_page import write_plan

        path = write_plan(
            found, html, facts=facts, language=language, force=True, command=command_line()
        )
        print(f"page: {path}")


def _write_config(found: "Plan", path: Path, data: list[str], tokenizer: str, length: int) -> None:
    from halfulp.plan.shape import run_config, shape_of
    from halfulp.plan.vocabulary import vocabulary_of
    from halfulp.toml import dumps
    from halfulp.train.config import load_config

    chosen = found.chosen
    shape = shape_of(chosen.parameters, vocabulary_of(tokenizer, data))
    config = run_config(
        shape, tokens=chosen.tokens, lr=found.lr, batch_tokens=found.batch_tokens,
        recipe=chosen.recipe, length=length, gpus=found.gpus or 1, data=data, tokenizer=tokenizer,
    )  # fmt: skip
    load_config(config)
    path.write_text(dumps(config), encoding="utf-8")
    print(f"run: {path} (halfulp train {path})")
