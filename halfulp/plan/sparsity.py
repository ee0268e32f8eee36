"""How many parameters of a trained model can be zeroed before the loss rises by a budget.

Kausik (arXiv:2402.14746) starts from the premise that most parameters of trained models are
negligible. Here it is measured: the parameters of least saliency are set to zero, and the loss on
held-out text says how many that may be. Saliency is w² ("magnitude") or ½ h w² with the diagonal h
of the Gauss-Newton matrix ("sharpness"; LeCun, Denker & Solla 1990, Optimal Brain Damage). Nothing
is trained again.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfulp.batch import predict
from halfulp.errors import CheckError, ConfigError
from halfulp.pieces import PIECE_TYPES, Piece
from halfulp.sharpness.curvature import measure_curvature
from halfulp.sharpness.setup import check_draws, prepared, refuse

RULES = ("magnitude", "sharpness")
BUDGET_NATS = 0.01
ALL = "all"
_HALVINGS = 8  # of the share: it is known to 1/256
_WINDOWS = 8  # per forward pass

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Zeroed:
    """The most parameters of one block that were zeroed within the budget, by one rule.

    * `rise_nats`: measured change of the held-out loss, `rise_se` its standard error over windows.
    * `above`: the smallest share tried whose rise is over the budget; 1 for none.
    * `by_type`: zeroed parameters of each block type; of several only where `block` is ALL.
    """

    block: str
    rule: str
    parameters: int
    zeroed: int
    rise_nats: float
    rise_se: float
    above: float
    by_type: Mapping[str, int]

    @property
    def share(self) -> float:
        return self.zeroed / self.parameters


@dataclass(frozen=True, kw_only=True)
class Sparsity:
    """Rows per block and rule, each block alone and then all together, and how they were found."""

    rows: tuple[Zeroed, ...]
    parameters: Mapping[str, int]  # per block type
    zero_before: int  # parameters that were zero as they came
    budget_nats: float
    loss_nats: float
    tokens: int  # held-out predictions that every loss is the mean of
    windows: int
    draws: int
    seed: int
    passes: int  # over the held-out text
    seconds: float
    notes: tuple[str, ...]

    def row(self, block: str, rule: str) -> Zeroed:
        """The row of a block, or of ALL."""
        return next(r for r in self.rows if (r.block, r.rule) == (block, rule))


def sparsity(
    model: nn.Module,
    text: Tensor,
    held_out: Tensor,
    *,
    budget_nats: float = BUDGET_NATS,
    by: str = "type",
    draws: int = 16,
    seed: int = 0,
    hints: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Sparsity:
    """The shares that can be zeroed while the loss on `held_out` rises by `budget_nats` at most.

    * `text` [B, T] ids give the curvature, `held_out` [B, T] ids, other windows, every loss.
    * `by`: rows per block "type" or per "block" (a type in a layer).

    The share is found by halving, so that it takes the rise to grow with the share. The model is
    bit for bit the same afterwards. Raises CheckError for a model or text that cannot be measured,
    ConfigError for numbers out of range, PolicyError for parameters in no block, NonFiniteError.
    """
    _check(text, held_out, budget_nats, by)
    refuse(model, [text, held_out])
    check_draws(draws, seed)
    say = progress or (lambda _: None)
    start, model = time.perf_counter(), getattr(model, "_orig_mod", model)
    with prepared(model) as notes:
        say("curvature")
        batches = list(text.split(_WINDOWS))
        known = measure_curvature(model, batches, draws=draws, seed=seed, hints=hints, say=say)
        search = _Search(model, held_out, budget_nats)
        ranks = {rule: _saliency(model, known.diagonal, rule, draws) for rule in RULES}
        rows = []
        for name, parts in _groups(known.pieces, by).items():
            for rule, saliency in ranks.items():
                say(f"{name} by {rule}")
                rows.append(search.most(name, rule, parts, saliency))
    weights = list(model.parameters())
    return Sparsity(
        rows=tuple(rows), parameters=_sizes(known.pieces),
        zero_before=sum(int((w == 0).sum()) for w in weights), budget_nats=budget_nats,
        loss_nats=float(search.before.mean()), tokens=held_out[:, 1:].numel(),
        windows=len(held_out), draws=draws, seed=seed, passes=search.passes,
        seconds=time.perf_counter() - start, notes=tuple(notes),
    )  # fmt: skip


class _Search:
    """Losses of a model with some of its parameters zeroed, on the same windows."""

    def __init__(self, model: nn.Module, held_out: Tensor, budget_nats: float) -> None:
        self.model, self.held_out, self.budget_nats = model, held_out, budget_nats
        self.weights = dict(model.named_parameters())
        self.passes = 0
        self.before = self._losses()

    def most(
        self, name: str, rule: str, parts: Sequence[Piece], saliency: Mapping[str, Tensor]
    ) -> Zeroed:
        """The largest share within the budget, to 1 / 2^_HALVINGS of the parameters."""
        each = [part.of(saliency[part.parameter]) for part in parts]
        ranked = torch.cat([s.flatten() for s in each]).sort().values
        low, high, found = 0.0, 1.0, self._zeroed(parts, [s < 0 for s in each])
        share = 1.0
        for _ in range(_HALVINGS + 1):
            limit = ranked[max(0, round(share * len(ranked)) - 1)]
            tried = self._zeroed(parts, [s <= limit for s in each])
            if tried[1] <= self.budget_nats:
                low, found = share, tried
            else:
                high = share
            if low == high:
                break
            share = (low + high) / 2
        counts, rise, se = found
        return Zeroed(
            block=name, rule=rule, parameters=len(ranked), zeroed=sum(counts.values()),
            rise_nats=rise, rise_se=se, above=high, by_type=counts,
        )  # fmt: skip

    def _zeroed(
        self, parts: Sequence[Piece], masks: Sequence[Tensor]
    ) -> tuple[dict[str, int], float, float]:
        """(zeroed parameters by type, rise of the loss in nats, its standard error)."""
        counts: dict[str, int] = {}
        for part, mask in zip(parts, masks, strict=True):
            counts[part.kind] = counts.get(part.kind, 0) + int(mask.sum())
        with zeroed(self.weights, parts, masks):
            rise = self._losses() - self.before
        error = float(rise.std()) / math.sqrt(len(rise))
        # A loss that is not finite is over any budget.
        return counts, float(rise.mean()) if bool(rise.isfinite().all()) else math.inf, error

    @torch.no_grad()
    def _losses(self) -> Tensor:
        """Mean loss of each window [windows], fp64."""
        self.passes += 1
        found = []
        for batch in self.held_out.split(_WINDOWS):
            predictions = predict(self.model, batch)
            losses_N = nn.functional.cross_entropy(
                predictions.logits_NV.float(), predictions.targets_N, reduction="none"
            )
            found.append(losses_N.double().view(len(batch), -1).mean(1))
        return torch.cat(found)


@contextmanager
def zeroed(
    weights: Mapping[str, Tensor], parts: Sequence[Piece], masks: Sequence[Tensor]
) -> Iterator[None]:
    """Inside, the masked elements of the parts are zero; afterwards all are as they were."""
    kept = {name: weights[name].detach().clone() for name in {p.parameter for p in parts}}
    try:
        for part, mask in zip(parts, masks, strict=True):
            part.of(weights[part.parameter].detach()).masked_fill_(mask, 0)
        yield
    finally:
        for name, before in kept.items():
            weights[name].detach().copy_(before)


def _saliency(
    model: nn.Module, diagonal: Mapping[str, Tensor], rule: str, draws: int
) -> dict[str, Tensor]:
    squares = {name: p.detach().square() for name, p in model.named_parameters()}
    if rule == "magnitude":
        return squares
    # One more draw in which every h is its tensor's mean: a weight is not free because a few draws
    # did not need it, such as the embedding of a token that the text does not hold.
    return {
        name: (diagonal[name] * draws + diagonal[name].mean()) / (draws + 1) * square / 2
        for name, square in squares.items()
    }


def _groups(parts: Sequence[Piece], by: str) -> dict[str, list[Piece]]:
    groups: dict[str, list[Piece]] = {}
    for part in parts:
        groups.setdefault(part.kind if by == "type" else part.block, []).append(part)
    if by == "type":
        groups = {kind: groups[kind] for kind in PIECE_TYPES if kind in groups}
    return groups | {ALL: list(parts)}


def _sizes(parts: Sequence[Piece]) -> dict[str, int]:
    kinds = [kind for kind in PIECE_TYPES if any(p.kind == kind for p in parts)]
    return {kind: sum(p.numel for p in parts if p.kind == kind) for kind in kinds}


def _check(text: Tensor, held_out: Tensor, budget_nats: float, by: str) -> None:
    for name, ids in (("text", text), ("held_out", held_out)):
        if not isinstance(ids, Tensor) or ids.ndim != 2 or min(ids.shape) < 2:
            found = f"shape {tuple(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise CheckError(f"{name} is {found}. Give token ids [B, T], two windows or more.")
    if not 0 < budget_nats < math.inf:
        raise ConfigError(f"budget_nats = {budget_nats} leaves no room. Give nats above 0.")
    if by not in ("type", "block"):
        raise ConfigError(f"by = {by!r} does not exist. Give type or block.")
