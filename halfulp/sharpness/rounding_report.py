"""What rounding each block costs, forecast and measured: rows of block type × format."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from halfulp.errors import ConfigError
from halfulp.formats import format_bits

WHOLE = "all"  # the block of the rows that round every weight at once


@dataclass(frozen=True, kw_only=True)
class RoundingRow:
    """One block type in one format; losses in nats per position, changes against the model's own.

    * `first_order` g·δ and `second_order` ½ Σ hδ² (½ δᵀGδ for vectors) of nearest rounding.
    * `first_order_se` √(δᵀGδ / positions): the standard error of g·δ as a mean over positions; the
      variance of one is the curvature along δ where the model is right about its labels.
    * `predicted_stochastic`: ½ Σ h E e², the expectation under stochastic rounding (and g·E e where
      values lie beyond the largest of the format).
    * `rel_se`: relative standard error of the block's trace over the draws, about that of the
      second order and of the stochastic forecast.
    * `measured`, `held_out`: nearest, on the batches of the forecast and on others;
      `measured_stochastic` ± `stochastic_se`: the expectation over the seeds, by measured losses
      less each seed's g·e, whose expectation is known. NaN where nothing was measured.
    """

    block: str
    parameters: int
    format: str
    first_order: float
    first_order_se: float
    second_order: float
    predicted_stochastic: float
    rel_se: float
    measured: float = math.nan
    held_out: float = math.nan
    measured_stochastic: float = math.nan
    stochastic_se: float = math.nan

    @property
    def predicted(self) -> float:
        """g·δ + the second order: nearest rounding on the batches of the forecast."""
        return self.first_order + self.second_order

    @property
    def uncertainty(self) -> float:
        """What other text may differ by: g·δ is no gain to count on, and is known to its error."""
        return math.hypot(self.first_order, self.first_order_se)

    @property
    def price(self) -> float:
        """What a budget must hold: the second order + the uncertainty of the first."""
        return self.second_order + self.uncertainty

    @property
    def bits(self) -> float:
        return format_bits(self.format)

    @property
    def ratio(self) -> float:
        """Measured / predicted, nearest."""
        return self.measured / self.predicted if self.predicted else math.nan

    @property
    def ratio_stochastic(self) -> float:
        predicted = self.predicted_stochastic
        return self.measured_stochastic / predicted if predicted else math.nan


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Forecast against measurement over rows: rank correlation, and quartiles of the ratio."""

    spearman: float
    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """The rows of all block types (`blocks`) and of the whole model at once (`whole`)."""

    blocks: tuple[RoundingRow, ...]
    whole: tuple[RoundingRow, ...]
    formats: tuple[str, ...]
    budget_nats: float
    loss_nats: float
    held_out_nats: float
    positions: int
    draws: int
    seeds: int
    seed: int
    notes: tuple[str, ...] = ()

    def rows(self) -> tuple[RoundingRow, ...]:
        """Every block type in every format, then the whole model in every format."""
        return self.blocks + self.whole

    def row(self, block: str, fmt: str) -> RoundingRow:
        """The row of a block type, or "all"; KeyError if there is none."""
        found = [r for r in self.rows() if (r.block, r.format) == (block, fmt)]
        if not found:
            raise KeyError(f"no row of block {block!r} in format {fmt!r}")
        return found[0]

    def lowest(self) -> dict[str, str | None]:
        """For each block type alone, the format of fewest bits whose price is in the budget."""
        found: dict[str, str | None] = {}
        for row in sorted(self.blocks, key=lambda r: (-r.bits, -r.price)):
            found.setdefault(row.block, None)
            if row.price <= self.budget_nats:
                found[row.block] = row.format
        return {row.block: found[row.block] for row in self.blocks}

    def additivity(self, fmt: str, *, rounding: str = "nearest") -> float:
        """Σ of the measured changes of the blocks / that of the whole at once.

        Nearest changes have either sign, and where they cancel the quotient says little.
        """
        parts = math.fsum(_pair(r, rounding)[1] for r in self.blocks if r.format == fmt)
        return parts / _pair(self.row(WHOLE, fmt), rounding)[1]

    def agreement(self, *, rounding: str = "nearest") -> Agreement:
        """Measured against predicted over the block types × formats; "nearest" or "stochastic".

        Rows that the format leaves as they are, are left out.
        """
        pairs = [_pair(r, rounding) for r in self.blocks if r.predicted_stochastic]
        predicted, measured = [p for p, _ in pairs], [m for _, m in pairs]
        ratios = torch.tensor([m / p for p, m in pairs if p] or [math.nan], dtype=torch.float64)
        low, median, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
        return Agreement(
            spearman=spearman(predicted, measured), median=median, quartiles=(low, high)
        )

    def to_json(self) -> str:
        """Schema 1: every row with its derived numbers, and how they were measured."""
        names = ("formats", "budget_nats", "loss_nats", "held_out_nats", "positions", "draws")
        facts: dict[str, Any] = {"schema": 1}
        facts |= {n: _plain(getattr(self, n)) for n in (*names, "seeds", "seed", "notes")}
        facts["rows"] = [_facts(row) for row in self.rows()]
        facts["lowest"] = self.lowest()
        return json.dumps(facts, indent=1)


def _pair(row: RoundingRow, rounding: str) -> tuple[float, float]:
    """(predicted, measured)"""
    if rounding == "nearest":
        return row.predicted, row.measured
    if rounding == "stochastic":
        return row.predicted_stochastic, row.measured_stochastic
    raise ConfigError(f"rounding = {rounding!r} is not measured. Give nearest or stochastic.")


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Rank correlation; equal numbers share their mean rank. NaN for fewer than two."""
    if len(a) < 2:
        return math.nan
    return torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1].item()


def _ranks(values: Sequence[float]) -> torch.Tensor:
    x = torch.tensor(values, dtype=torch.float64)
    below = (x[:, None] > x).sum(1)
    return below + ((x[:, None] == x).sum(1) - 1) / 2


def _facts(row: RoundingRow) -> dict[str, Any]:
    derived = ("bits", "predicted", "uncertainty", "ratio", "ratio_stochastic")
    return {n: _plain(v) for n, v in (vars(row) | {d: getattr(row, d) for d in derived}).items()}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
