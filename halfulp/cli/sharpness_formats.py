"""`halfulp sharpness --formats`: what rounding each block to each format does to the loss."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from halfulp.cli.common import Steps

if TYPE_CHECKING:
    from torch import Tensor

    from halfulp.cli.load import Loaded
    from halfulp.sharpness.rounding_report import Forecast, RoundingRow

_ROWS = 32  # of text that is rounded and measured on, and as many held out
_PROBES = 4  # of the prices beside


def forecast_of(
    loaded: "Loaded", formats: Sequence[str], *, draws: int, seed: int, budget: float,
    hints: Mapping[str, str],
) -> "Forecast":  # fmt: skip
    """Forecast and measurement on the first rows of the text, and on as many held-out ones."""
    from halfulp.sharpness.rounding import forecast

    text, held_out = loaded.text[:_ROWS].split(4), loaded.held_out[:_ROWS].split(4)
    with Steps() as steps:
        return forecast(
            loaded.model, text, held_out=held_out, formats=formats, draws=draws, seed=seed,
            budget_nats=budget, hints=hints or None, progress=steps.count,
        )  # fmt: skip


def prices_of(
    loaded: "Loaded", formats: Sequence[str], *, seed: int, hints: Mapping[str, str]
) -> dict[tuple[str, str], float]:
    """(block type, format) → KL in nats/token by the prices of `halfulp check`, on the same text.

    A price is one parameter's: block types that share a fused projection have none.
    """
    from halfulp.check.prices import price
    from halfulp.pieces import pieces

    parts = pieces(loaded.model, hints or None)
    shared = {p.parameter for p in parts if p.groups}
    mixed = {p.kind for p in parts if p.parameter in shared}
    kinds = {p.parameter: p.kind for p in parts if p.kind not in mixed}
    found = price(
        loaded.model, loaded.text[:_ROWS], formats=tuple(formats), probes=_PROBES, seed=seed,
        sites=[f"weight:{name}" for name in kinds], margins=False, hints=hints or None,
    )  # fmt: skip
    totals: dict[tuple[str, str], float] = {}
    for name, kind in kinds.items():
        for column, word in enumerate(found.formats):
            kl = _number(found.kl[found.index(f"weight:{name}"), column])
            totals[kind, word] = totals.get((kind, word), 0.0) + kl
    return totals


def _number(value: "Tensor") -> float:
    kl = value.item()
    return kl if math.isfinite(kl) else 0.0


def print_forecast(
    found: "Forecast", prices: Mapping[tuple[str, str], float], *, said: Sequence[str]
) -> None:
    """The table, what a budget allows, and how well forecast and measurement agree.

    `said`: notes that the reader has seen already.
    """
    from halfulp.cli.show import print_table

    print(
        f"\nLoss added by rounding the weights of one block type (nats/token; {found.positions} "
        f"predictions, {found.draws} draws, {found.seeds} stochastic roundings)"
    )
    for note in found.notes:
        if note not in said:
            print(f"note: {note}")
    rows = cells(found, prices)
    print_table(list(rows[0]), [list(row.values()) for row in rows])
    lowest = ", ".join(f"{block} {fmt or 'none'}" for block, fmt in found.lowest().items())
    print(f"fewest bits within {found.budget_nats:g} nats, each block type alone: {lowest}")
    for rounding in ("nearest", "stochastic"):
        a = found.agreement(rounding=rounding)
        if math.isnan(a.spearman):
            print(f"{rounding}: nothing to correlate, as too few of these formats change weights")
            continue
        print(
            f"{rounding}: rank correlation {a.spearman:.3f}, measured / forecast {a.median:.2f} "
            f"[{a.quartiles[0]:.2f}, {a.quartiles[1]:.2f}] (quartiles over blocks and formats)"
        )


def cells(found: "Forecast", prices: Mapping[tuple[str, str], float]) -> list[dict[str, str]]:
    """The rows of the table, by column."""
    return [_cells(row, prices) for row in found.rows()]


def _cells(row: "RoundingRow", prices: Mapping[tuple[str, str], float]) -> dict[str, str]:
    kl = prices.get((row.block, row.format))
    return {
        "block": row.block,
        "format": row.format,
        "nearest, forecast": f"{row.predicted:.2e} ± {row.uncertainty:.0e}",
        "nearest, measured": f"{row.measured:.2e}",
        "held out": f"{row.held_out:.2e}",
        "stochastic, forecast": f"{row.predicted_stochastic:.2e}",
        "stochastic, measured": f"{row.measured_stochastic:.2e} ± {row.stochastic_se:.0e}",
        "KL by check": "–" if kl is None else f"{kl:.2e}",
    }
