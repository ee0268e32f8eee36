"""What a measurement of sharpness found: traces per draw and piece, and rows for any grouping."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfulp.errors import ConfigError
from halfulp.pieces import PIECE_TYPES, Piece

GROUPINGS: Mapping[str, Callable[[Piece], str]] = {
    "type": lambda piece: piece.kind,
    "block": lambda piece: piece.block,
    "tensor": lambda piece: piece.name,
}
PAPER_TYPES = ("emb", "qk", "ffn", "vo", "norm")  # flattest first, as Wang et al. order them


@dataclass(frozen=True, kw_only=True)
class Row:
    """One block type, block or tensor.

    `sharpness` = trace / parameters, the mean diagonal entry of the curvature; `rel_se` is the
    relative standard error of both over the draws, and `rel_std` the relative deviation of one.
    """

    name: str
    kind: str
    layer: int | None
    parameters: int
    trace: float
    sharpness: float
    rel_se: float
    rel_std: float

    def draws_for(self, rel_se: float) -> int:
        """Draws needed for a relative standard error of `rel_se`."""
        return max(2, math.ceil((self.rel_std / rel_se) ** 2)) if self.rel_std > 0 else 2


@dataclass(frozen=True, kw_only=True)
class SharpnessReport:
    """Traces of the curvature per draw and piece, and how they were measured.

    * `traces` [draws, pieces], fp64: unbiased estimates unless `notes` say otherwise.
    * `positions`: predictions per draw; `cost_steps`: the time of the whole measurement in forward
      and backward passes of one of its batches.
    * `eigenvalues`: largest eigenvalue per block type, where the estimator is "lanczos".
    """

    model: str
    estimator: str
    pieces: tuple[Piece, ...] = field(repr=False)
    traces: Tensor = field(repr=False)
    positions: int
    loss_nats: float
    seed: int
    cost_steps: float = math.nan
    notes: tuple[str, ...] = ()
    eigenvalues: Mapping[str, float] = field(default_factory=dict)

    @property
    def draws(self) -> int:
        return len(self.traces)

    def rows(self, by: str = "type") -> tuple[Row, ...]:
        """One row per "type", "block" (a type in a layer) or "tensor", in the model's order."""
        if by not in GROUPINGS:
            raise ConfigError(f"by = {by!r} does not exist. Give {', '.join(GROUPINGS)}.")
        groups: dict[str, list[int]] = {}
        for i, piece in enumerate(self.pieces):
            groups.setdefault(GROUPINGS[by](piece), []).append(i)
        if by == "type":
            groups = dict(sorted(groups.items(), key=lambda item: PIECE_TYPES.index(item[0])))
        return tuple(self._row(name, members, by) for name, members in groups.items())

    def _row(self, name: str, members: Sequence[int], by: str) -> Row:
        first = self.pieces[members[0]]
        numel = sum(self.pieces[i].numel for i in members)
        sums = self.traces[:, list(members)].sum(1)
        mean, std = sums.mean().item(), sums.std().item() if self.draws > 1 else math.nan
        rel_std = std / abs(mean) if mean else math.nan
        return Row(
            name=name, kind=first.kind, layer=None if by == "type" else first.layer,
            parameters=numel, trace=mean, sharpness=mean / numel, rel_std=rel_std,
            rel_se=rel_std / math.sqrt(self.draws),
        )  # fmt: skip

    @cached_property
    def by_type(self) -> Mapping[str, Row]:
        """The rows of the block types, by name."""
        return {row.name: row for row in self.rows("type")}

    def order(self, z: float = 1.96) -> str:
        """The paper's five types, flattest first: "<" where they differ by `z` errors, else "~"."""
        rows = sorted(
            (r for r in self.rows("type") if r.kind in PAPER_TYPES), key=lambda r: r.sharpness
        )
        text = rows[0].name if rows else ""
        for low, high in pairwise(rows):
            error = math.hypot(low.sharpness * low.rel_se, high.sharpness * high.rel_se)
            apart = high.sharpness - low.sharpness > z * error
            text += f" {'<' if apart else '~'} {high.name}"
        return text

    def to_json(self) -> str:
        """Schema 1: every row of every grouping, and what measured them."""
        facts: dict[str, Any] = {"schema": 1, "order": self.order()}
        names = ("model", "estimator", "draws", "positions", "loss_nats", "seed", "cost_steps")
        facts |= {name: _plain(getattr(self, name)) for name in names} | {"notes": self.notes}
        facts |= {f"by_{by}": [_fields(row) for row in self.rows(by)] for by in GROUPINGS}
        facts["eigenvalues"] = dict(self.eigenvalues)
        facts["pieces"] = [vars(piece) for piece in self.pieces]
        facts["traces"] = self.traces.tolist()
        return json.dumps(facts, indent=1)

    def save(self, path: str | Path) -> None:
        """Write `to_json` to the file `path`."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @staticmethod
    def load(path: str | Path) -> "SharpnessReport":
        """The report that `save` wrote; ConfigError for any other file."""
        try:
            facts = json.loads(Path(path).read_text(encoding="utf-8"))
            names = ("model", "estimator", "positions", "loss_nats", "seed", "cost_steps")
            numbers = {name: facts[name] for name in names}
            for name in ("loss_nats", "cost_steps"):
                numbers[name] = math.nan if numbers[name] is None else numbers[name]
            return SharpnessReport(
                **numbers,
                pieces=tuple(Piece(**piece) for piece in facts["pieces"]),
                traces=torch.tensor(facts["traces"], dtype=torch.float64),
                notes=tuple(facts["notes"]),
                eigenvalues=facts["eigenvalues"],
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no report of `halfulp sharpness --json`: {error}. Measure again."
            ) from error


def _fields(row: Row) -> dict[str, Any]:
    return {name: _plain(value) for name, value in vars(row).items()}


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
