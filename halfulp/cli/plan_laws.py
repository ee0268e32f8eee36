"""`halfulp plan laws`: every scaling law, and what it says at a point."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.show import print_table
from halfulp.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from halfulp.plan.laws import Law


def laws(
    law: Annotated[
        str | None, typer.Option(help="One of them, or a fit.json or runs.csv of your own.")
    ] = None,
    at: Annotated[
        str | None, typer.Option(help="Parameters and tokens, such as 70e9,1.4e12.")
    ] = None,
) -> None:
    """List scaling laws with coefficients and sources.

    With --law: everything about one. With --at: its loss, rates or bits there. Losses are in nats
    per token of each paper's own tokenizer and data and do not compare between laws.
    """
    from halfulp.plan.laws import law_names

    point = None if at is None else pair("--at", at)
    if law is not None:
        _one(law, point)
    elif point is None:
        print_table(("law", "title", "formula", "source"), [_cells(n) for n in law_names()])
    else:
        _every(*point)


def pair(option: str, text: str) -> tuple[float, float]:
    """ "N,D" as two positive numbers; PlanError for anything else."""
    try:
        n, d = (float(part) for part in text.split(","))
        if not (0 < n < float("inf") and 0 < d < float("inf")):
            raise ValueError("not positive")
    except ValueError as error:
        raise PlanError(
            f"{option} {text!r} is not understood ({error}). Give parameters and tokens, such as "
            "70e9,1.4e12."
        ) from error
    return n, d


def _cells(name: str) -> tuple[str, ...]:
    from halfulp.plan.laws import load_law

    law = load_law(name)
    return name, law.title, law.formula, law.source


def _every(n: float, d: float) -> None:
    from halfulp.plan.at import values_at
    from halfulp.plan.laws import law_names, load_law

    rows = []
    for name in law_names():
        if found := values_at(name, n, d):
            flags = load_law(name).outside(N=n, D=d, C=6 * n * d)
            rows += [(name, *row) for row in found]
            rows += [(name, "out of range", flag.removeprefix(f"{name}: ")) for flag in flags]
    print_table(("law", "what", "value"), rows)


def _one(name: str, point: tuple[float, float] | None) -> None:
    from halfulp.plan.at import values_at
    from halfulp.plan.in_use import open_law
    from halfulp.plan.laws import LOSS_KINDS, load_law

    own = name.endswith((".json", ".csv"))
    law = open_law(name).law if own else load_law(name)
    rows = _facts(law, _deviations(name) if own or law.kind in LOSS_KINDS else {})
    if point is not None:
        n, d = point
        found = values_at(name, n, d) or [("value", "it says nothing of N and D alone")]
        rows += [(f"{what} at {n:.4g}, {d:.4g}", value) for what, value in found]
        rows += [("out of range", flag) for flag in law.outside(N=n, D=d, C=6 * n * d)]
    print_table(("what", "value"), rows)


def _deviations(name: str) -> dict[str, float]:
    """The standard deviation of each coefficient over the refits behind the law's band."""
    from statistics import stdev

    from halfulp.plan.in_use import open_law

    draws = [asdict(draw) for draw in open_law(name).draws]
    return {key: stdev(draw[key] for draw in draws) for key in draws[0]} if draws else {}


def _facts(law: "Law", deviations: "Mapping[str, float]") -> list[tuple[str, str]]:
    rows = [("law", f"{law.name}: {law.title}"), ("formula", law.formula)]
    for symbol, value in law.coefficients.items():
        error, spread = law.errors.get(symbol), deviations.get(symbol)
        text = f"{value:.8g}" if error is None else f"{value:.8g} ± {error:g}"
        rows.append((symbol, text if spread is None else f"{text} (refits ± {spread:.3g})"))
    rows += [
        (f"range of {what}", f"{low:.3g} to {high:.3g}")
        for what, (low, high) in law.ranges.items()
    ]  # fmt: skip
    rows += [("source", f"{law.source} ({law.read})")]
    rows += [("note", note) for note in law.notes]
    return [*rows, ("warning", law.warning)] if law.warning else rows
