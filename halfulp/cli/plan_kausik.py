"""`halfulp plan kausik`: how the size of an efficient model follows its corpus."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.plan_laws import pair
from halfulp.cli.show import print_table
from halfulp.errors import PlanError

if TYPE_CHECKING:
    from halfulp.plan.facts import Facts
    from halfulp.plan.kausik import Growth


def kausik(
    ref: Annotated[
        str, typer.Option(help="Parameters and tokens of a model taken as efficient: 1e9,2e10.")
    ],
    corpus: Annotated[
        Path | None, typer.Option(help="What `halfulp corpus` found: a JSON file.")
    ] = None,
    tokens: Annotated[
        float | None, typer.Option(help="Size of the corpus; without it that of --corpus.")
    ] = None,
    law: Annotated[
        str, typer.Option(help='Whose exponent gives the band, or "kausik": the published pair.')
    ] = "epoch",
) -> None:
    """Size a model after the sequences of its corpus.

    The band of gamma in N = N_ref (D / D_ref)^gamma, how much more corpus doubles the unique
    sequences, and for each n whether scaling up may still uncover new skills.
    """
    from halfulp.plan.facts import read_facts

    n_ref, d_ref = pair("--ref", ref)
    facts = None if corpus is None else read_facts(corpus)
    if tokens is None and facts is not None:
        tokens = facts.unique_symbols
    if tokens is not None and not 0 < tokens < float("inf"):
        raise PlanError(f"--tokens {tokens:g} is no size of a corpus. Give a positive number.")
    bands = {law: _band(law)} if law == "kausik" else {law: _band(law), "kausik": _band("kausik")}
    _print_bands(bands, tokens, n_ref, d_ref)
    print("note: the efficient N is the least that reaches an accuracy, not the compute-optimal N")
    print("note: text that is repeated counts once; for epochs see `halfulp plan --unique-tokens`")
    if facts is None:
        print("note: give --corpus for the statement on new skills, which needs counts for each n")
    else:
        low, high = bands[law].parameters(tokens or d_ref, n_ref=n_ref, d_ref=d_ref)
        _print_emergence(facts, (low * high) ** 0.5)


def _band(law: str) -> "Growth":
    from halfulp.plan.in_use import open_law
    from halfulp.plan.kausik import growth_of, published
    from halfulp.plan.laws import law_names, load_law

    if law == "kausik":
        return published()
    if law in law_names() and "beta" in load_law(law).coefficients:
        return growth_of(load_law(law).coefficients["beta"])
    return growth_of(open_law(law).plain.beta)


def _print_bands(
    bands: "dict[str, Growth]", tokens: float | None, n_ref: float, d_ref: float
) -> None:
    from halfulp.report.plan_tables import doubling_text

    rows = []
    for name, band in bands.items():
        low = "no lower bound" if band.low is None else f"{band.low:.3f}"
        row = [name, "–" if band.beta is None else f"{band.beta:.4f}", f"{low} to {band.high:.3f}"]
        if tokens is None:
            rows.append([*row, "–", doubling_text(band.doubling)])
            continue
        least, most = band.parameters(tokens, n_ref=n_ref, d_ref=d_ref)
        rows.append([*row, f"{least:.3g} to {most:.3g}", doubling_text(band.doubling)])
    size = "parameters" if tokens is None else f"parameters for {tokens:.3g} tokens"
    print_table(("law", "beta", "gamma", size, "doubling"), rows)


def _print_emergence(facts: "Facts", parameters: float) -> None:
    from halfulp.plan.kausik import emergence
    from halfulp.report.plan_tables import columns, order_rows

    print(f"\n{facts.file}: {facts.symbols:.4g} {facts.unit}s, tokenizer {facts.tokenizer}")
    if facts.note:
        print(f"note: {facts.note}")
    print_table(columns("order_columns"), order_rows(facts.orders))
    for unit in dict.fromkeys(order.unit for order in facts.orders):
        unique = {order.n: order.unique for order in facts.orders if order.unit == unit}
        for said in emergence(unique, parameters, unit=unit, tokenizer=facts.tokenizer):
            print(said.sentence)
