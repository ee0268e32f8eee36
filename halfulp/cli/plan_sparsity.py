"""`halfulp plan sparsity`: how many parameters can be zeroed before the loss rises by a budget."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.common import Steps, pairs, quiet_transformers
from halfulp.cli.model_options import Hints, RunOrModel, Texts, TokenizerName
from halfulp.errors import ConfigError

if TYPE_CHECKING:
    from halfulp.plan.sparsity import Sparsity, Zeroed


def sparsity(
    model: RunOrModel,
    data: Texts = None,
    tokenizer: TokenizerName = None,
    tokens: Annotated[
        int, typer.Option(help="Held-out tokens to measure on, and as many for the sharpness.")
    ] = 4096,
    budget: Annotated[float, typer.Option(help="Nats per token that the loss may rise.")] = 0.01,
    per_layer: Annotated[
        bool, typer.Option("--per-layer", help="Every block type of every layer.")
    ] = False,
    draws: Annotated[int, typer.Option(help="Sampled labels behind the sharpness.")] = 16,
    hint: Hints = None,
    seed: Annotated[int, typer.Option(help="Of labels and the choice of text.")] = 0,
    json_: Annotated[Path | None, typer.Option("--json", help="Write all figures there.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that exists.")] = False,
) -> None:
    """Measure how many parameters of a trained model are negligible.

    The share of each block that can be set to zero while the held-out loss rises by the budget at
    most: the smallest weights first, or those that the sharpness says matter least. Nothing is
    trained again.
    """
    from halfulp.cli.common import check_outputs
    from halfulp.cli.load import load_model
    from halfulp.plan.sparsity import sparsity as measure

    check_outputs({"--json": json_}, force=force)
    hints = pairs("--hint", hint or [])
    quiet_transformers()
    loaded = load_model(model, data=data, tokenizer=tokenizer, tokens=tokens, seed=seed)
    with Steps() as steps:
        found = measure(
            loaded.model, loaded.text, loaded.held_out, budget_nats=budget,
            by="block" if per_layer else "type", draws=draws, seed=seed, hints=hints or None,
            progress=steps.count,
        )  # fmt: skip
    _print(loaded.name, found, loaded.notes)
    if json_ is not None:
        try:
            json_.write_text(_json(loaded.name, found, loaded.notes) + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"{json_} cannot be written: {error.strerror}.") from error
        print(f"figures: {json_}")


def _json(name: str, found: "Sparsity", notes: tuple[str, ...]) -> str:
    figures = {"model": name} | asdict(found)
    figures["notes"] = [*notes, *found.notes]
    figures["rows"] = [asdict(row) | {"share": row.share} for row in found.rows]
    return json.dumps(figures, indent=1)


def _print(name: str, found: "Sparsity", notes: tuple[str, ...]) -> None:
    from halfulp.cli.show import print_table

    total = sum(found.parameters.values())
    print(
        f"{name}: {total:,} parameters, {found.zero_before:,} of them zero as they are; loss "
        f"{found.loss_nats:.4f} nats/token on {found.tokens:,} held-out tokens in {found.windows} "
        f"windows; sharpness from {found.draws} draws, seed {found.seed}"
    )
    for note in (*notes, *found.notes):
        print(f"note: {note}")
    print(f"\nShare that can be zeroed for {found.budget_nats:g} nats/token, each block alone")
    columns = ("block", "parameters", "rule", "zeroed", "loss rises by", "± se", "too many")
    print_table(columns, [_cells(row) for row in found.rows])
    print("\nOf each block type, all zeroed together")
    joint = {row.rule: row.by_type for row in found.rows if row.block == "all"}
    print_table(
        ("block", *joint),
        [
            (kind, *(f"{zeroed[kind] / size:.1%}" for zeroed in joint.values()))
            for kind, size in found.parameters.items()
        ],
    )
    print(f"\n{found.passes} passes over the held-out text, {found.seconds:.1f} s")


def _cells(row: "Zeroed") -> tuple[str, ...]:
    return (
        row.block, f"{row.parameters:,}", row.rule, f"{row.share:.1%}", f"{row.rise_nats:+.4f}",
        f"{row.rise_se:.4f}", f"{row.above:.1%}" if row.above < 1 or row.share < 1 else "–",
    )  # fmt: skip
