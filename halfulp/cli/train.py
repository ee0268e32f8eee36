"""`halfulp train`: one training run, new or resumed."""

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfulp.cli.common import overrides_of, quiet_transformers
from halfulp.cli.train_options import Preset, RecipeName, Seed, Sources
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.train.config import TrainConfig
    from halfulp.train.loop import Summary


def train(
    config: Annotated[
        Path | None, typer.Argument(help="TOML file; options below take precedence.")
    ] = None,
    model: Preset = None,
    data: Sources = None,
    recipe: RecipeName = None,
    policy: Annotated[str | None, typer.Option(help="TOML file of precision rules.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    lr: Annotated[float | None, typer.Option(help="Highest learning rate.")] = None,
    lr_blocks: Annotated[
        str | None,
        typer.Option(
            help='Learning rates per block type: "paper", "auto" or emb=10,qk=8,ffn=6,vo=4.'
        ),
    ] = None,
    guard: Annotated[
        bool | None,
        typer.Option("--guard/--no-guard", help="Keep the run alive (default: --guard)."),
    ] = None,
    seed: Seed = None,
    out: Annotated[str | None, typer.Option(help="Run directory; a new numbered one.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any other option, such as train.rows=4; may be repeated."),
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run there.")] = None,
    from_step: Annotated[
        int | None, typer.Option(help="With --resume: the checkpoint to go on from.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the run at --out.")] = False,
) -> None:
    """Train with the precision of a recipe or policy.

    Under torchrun the processes share the work. Ctrl-C finishes the step and writes a checkpoint.
    """
    named = {
        "model": {"preset": model},
        "data": {"source": data or None},
        "policy": {"recipe": recipe, "file": policy},
        "train": {"steps": steps, "lr": lr, "seed": seed},
        "blockwise": {"ratios": lr_blocks},
        "guard": {"on": guard},
        "run": {"out": out},
    }
    overrides = overrides_of(named, set_ or [])
    if from_step is not None and resume is None:
        raise ConfigError("--from-step belongs to --resume. Give the run directory there.")
    if resume is None:
        summary = _train(_new(config, overrides), resume, from_step, force)
    else:
        if config is not None or force:
            raise _not_with_resume()
        summary = _train(_resumed(resume, overrides), resume, from_step, force)
    _conclude(summary)


def _resumed(path: Path, overrides: dict[str, Any]) -> "TrainConfig":
    """The configuration of the run at `path`, with other budgets of its guard where given."""
    from halfulp.train.config import BUDGETS, load_config
    from halfulp.train.loop import config_of

    budgets = overrides.get("guard", {})
    if overrides.keys() - {"guard"} or budgets.keys() - set(BUDGETS):
        raise _not_with_resume()
    return load_config(config_of(path).to_dict(), {"guard": budgets})


def _not_with_resume() -> ConfigError:
    from halfulp.train.config import BUDGETS

    budgets = ", ".join(f"guard.{name}" for name in BUDGETS)
    return ConfigError(
        "--resume goes on with the run's own configuration, so no other option can be given but "
        f"--from-step, and with --set the budgets {budgets}. Delete the others, or start a new run."
    )


def _new(path: Path | None, overrides: dict[str, Any]) -> "TrainConfig":
    from halfulp.train.config import load_config

    return load_config({} if path is None else path, overrides)


def _train(
    config: "TrainConfig", resume: Path | None, from_step: int | None, force: bool
) -> "Summary":
    from halfulp.cli.progress import Progress
    from halfulp.train.loop import train as run
    from halfulp.train.precision import name_of

    quiet_transformers()
    if os.environ.get("RANK", "0") != "0":
        return run(config, resume=resume, from_step=from_step, force=force)
    with Progress() as progress:
        progress.begin(name_of(config.policy), config.train.steps)
        return run(config, resume=resume, from_step=from_step, force=force, on_event=progress.event)


def _held_out(summary: "Summary") -> str:
    if math.isnan(summary.loss_nats):
        return "no evaluation yet"
    fp32 = f"(in fp32 arithmetic {summary.loss_nats_fp32:.4f})"
    return f"held-out loss {summary.loss_nats:.4f} {fp32} nats/token"


def _conclude(summary: "Summary") -> None:
    if os.environ.get("RANK", "0") == "0":
        print(
            f"{summary.reason} after {summary.steps} steps, {summary.tokens:,} tokens, "
            f"{summary.seconds:.1f} s in steps: {_held_out(summary)}"
        )
        print(f"run: {summary.path}")
        if summary.reason == "interrupted":
            print(f"resume with: halfulp train --resume {summary.path}")
    if summary.reason == "interrupted":
        raise typer.Exit(130)
