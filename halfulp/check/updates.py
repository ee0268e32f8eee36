"""The optimizer sheet: what storing weights and moments in a format does to one AdamW step.

For an entry w on the grid of a format, with neighbors at distance d above or below, the update Δ is
lost under round-to-nearest iff |Δ| < d/2 on its side (at a tie: iff w is even). AdamW's Δ is linear
in the learning rate, Δ = −lr (u + λ w) with u = m̂ / (√v̂ + ε), so each entry has one learning rate
d / 2|u + λ w| below which it stands still. Their distribution says at which learning rate which
share of the updates is lost, without a second step (stability F1, F12).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfulp.blocks import block_map
from halfulp.errors import ConfigError, NonFiniteError
from halfulp.formats import format_quantizer
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.quantizer import Quantizer

WEIGHT_FORMATS = ("bf16", "fp16", "e4m3")
MOMENT_FORMATS = ("bf16", "fp16", "e4m3", "e4m3@1x128:current")
ALL = "all"  # the block name of the row over all blocks
_SHIFT = 14  # of fp32 bits: 512 bins an octave, so that a threshold is known to 0.2 %
_INFINITE = 0x7F800000 >> _SHIFT


@dataclass(frozen=True)
class Thresholds:
    """A distribution of learning rates: below its own, an entry does not change.

    `counts[i]` entries lie in bin `first + i` of fp32 bits >> 14; `never` change at any rate.
    """

    first: int
    counts: Tensor  # int64
    never: int = 0

    @classmethod
    def of(cls, values: Tensor) -> "Thresholds":
        """`values` fp32, positive or inf, without NaN."""
        bins = values.contiguous().view(torch.int32).flatten() >> _SHIFT
        finite = bins[bins < _INFINITE]
        never = bins.numel() - finite.numel()
        if not finite.numel():
            return cls(0, torch.zeros(1, dtype=torch.int64), never)
        first = int(finite.min())
        return cls(first, torch.bincount(finite - first), never)

    @property
    def entries(self) -> int:
        return int(self.counts.sum()) + self.never

    def __add__(self, other: "Thresholds") -> "Thresholds":
        parts = [t for t in (self, other) if t.counts.any()]
        if len(parts) < 2:
            base = parts[0] if parts else self
            return Thresholds(base.first, base.counts, self.never + other.never)
        first = min(t.first for t in parts)
        counts = torch.zeros(max(t.first + len(t.counts) for t in parts) - first, dtype=torch.int64)
        for t in parts:
            counts[t.first - first : t.first - first + len(t.counts)] += t.counts
        return Thresholds(first, counts, self.never + other.never)

    def lost_share(self, lr: float) -> float:
        """Share of the entries that do not change at `lr`; NaN when there is no entry."""
        if not self.entries:
            return math.nan
        at = int(torch.tensor(lr, dtype=torch.float32).view(torch.int32))
        whole, part = (at >> _SHIFT) - self.first, (at & (1 << _SHIFT) - 1) / (1 << _SHIFT)
        moved = int(self.counts[: max(whole, 0)].sum())
        inside = int(self.counts[whole]) if 0 <= whole < len(self.counts) else 0
        return 1 - (moved + part * inside) / self.entries

    def lr_at(self, lost: float) -> float:
        """The learning rate below which more than the share `lost` is lost, to 0.2 %.

        inf when a larger share never changes, 0 when there is no entry.
        """
        if not self.entries:
            return 0.0
        wanted = (1 - lost) * self.entries
        moved = self.counts.cumsum(0)
        if wanted > int(moved[-1]):
            return math.inf
        i = int(torch.searchsorted(moved, torch.tensor(wanted, dtype=torch.float64)))
        before = int(moved[i - 1]) if i else 0
        part = (wanted - before) / max(int(self.counts[i]), 1)
        bits = torch.tensor([self.first + i, self.first + i + 1], dtype=torch.int32) << _SHIFT
        low, high = bits.view(torch.float32).tolist()
        return low + part * (high - low)


@dataclass(frozen=True, kw_only=True)
class WeightRow:
    """One block with its weights stored in one format, updated to nearest.

    Shares are those of halfulp.optim.counters, over the block: `asked` changes before rounding;
    `lost_updates` of those asked; `lost_decay` of the nonzero weights that decay (NaN when none
    does). `updates` and `decays` hold the learning rates below which entries stand still, for
    formats with a scale as if the scale stayed.
    """

    block: str
    format: str
    elements: int
    asked: float
    lost_updates: float
    lost_decay: float
    relative_update: float  # rms(update) / rms(weight), before rounding
    updates: Thresholds = field(repr=False)
    decays: Thresholds = field(repr=False)

    @property
    def lr_half(self) -> float:
        """The learning rate below which more than half of the updates are lost."""
        return self.updates.lr_at(0.5)

    @property
    def lr_stop(self) -> float:
        """The learning rate below which more than 99 % of the updates are lost: no learning."""
        return self.updates.lr_at(0.99)


@dataclass(frozen=True, kw_only=True)
class MomentRow:
    """One block's second moment in one format: share of its elements that is zero under g ≠ 0."""

    block: str
    format: str
    elements: int
    underflow: float


@dataclass(frozen=True, kw_only=True)
class EpsRow:
    """Where Adam's eps rules one block: `floor` of the nonzero gradients have √v̂ < eps.

    `silent` is the share of elements without any gradient.
    """

    block: str
    elements: int
    floor: float
    silent: float


@dataclass(frozen=True, kw_only=True)
class UpdateSheet:
    """Rows per block, and one of block "all" per format, for one AdamW step at `lr`."""

    lr: float
    weight_decay: float
    betas: tuple[float, float]
    eps: float
    grad_norm: float
    weights: tuple[WeightRow, ...]
    moments: tuple[MomentRow, ...]
    floors: tuple[EpsRow, ...]

    def weight(self, block: str, format: str) -> WeightRow:
        """The row of a block (or "all") and a format as it was asked for."""
        return next(r for r in self.weights if (r.block, r.format) == (block, format))


class Moments(NamedTuple):
    """An AdamW state to continue from: m, v (shaped like the parameter) and the steps taken."""

    m: Tensor
    v: Tensor
    step: int


class _Step(NamedTuple):
    """One parameter's step in fp32, as halfulp.optim.AdamW computes it."""

    w: Tensor
    grad: Tensor
    v: Tensor
    root: Tensor  # √v̂
    direction: Tensor  # m̂ / (√v̂ + ε)
    update: Tensor  # lr times it, rounded as AdamW does
    decay: float  # λ of this parameter


def update_sheet(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    lr: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    clip: float | None = None,
    formats: Sequence[str] = WEIGHT_FORMATS,
    moment_formats: Sequence[str] = MOMENT_FORMATS,
    moments: Mapping[str, Moments] | None = None,
    hints: Mapping[str, str] | None = None,
) -> UpdateSheet:
    """What one AdamW step at `lr` would lose in each block and format; the model is unchanged.

    * `loss`: runs the forward pass of a training batch and returns the scalar to minimize.
    * `formats`, `moment_formats`: words of halfulp.formats; weights are rounded to nearest.
    * `clip`: the gradient norm above which all gradients are scaled down.
    * `moments`: by parameter, the state of a run; without it the step is the first one, whose
      update is lr · sign(g) wherever |g| ≫ eps. Later updates are smaller: a lower bound of loss.
    * Matrices decay, vectors do not, as in halfulp.optim.param_groups.

    Gradients that the model held are kept. Raises NonFiniteError when a gradient is not finite,
    ConfigError when a hyperparameter is out of range or nothing gets a gradient.
    """
    _check(lr, weight_decay, betas, eps)
    grads = _gradients(model, loss)
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    if not math.isfinite(norm):
        bad = next(n for n, g in grads.items() if not g.isfinite().all())
        raise NonFiniteError(
            f"the gradient of {bad} is not finite, so that no update can be judged. "
            "Run the batch in fp32 and look for the first inf or NaN."
        )
    factor = min(1.0, clip / norm) if clip and norm else 1.0
    blocks = block_map(model, hints).parameters
    sums = _Sums(formats, moment_formats)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in grads:
                state = (moments or {}).get(name)
                decay = weight_decay if p.ndim >= 2 else 0.0
                grad = grads.pop(name) * factor if factor != 1 else grads.pop(name)
                step = _adamw(p.detach().float(), grad, state, lr, decay, betas, eps)
                sums.add(blocks[name], step, lr, eps)
    weights, moment_rows, floors = sums.rows()
    return UpdateSheet(
        lr=lr, weight_decay=weight_decay, betas=betas, eps=eps, grad_norm=norm,
        weights=weights, moments=moment_rows, floors=floors,
    )  # fmt: skip


def _check(lr: float, weight_decay: float, betas: tuple[float, float], eps: float) -> None:
    ok = {
        "lr": lr > 0,
        "weight_decay": weight_decay >= 0,
        "betas": all(0 <= b < 1 for b in betas),
        "eps": eps > 0,
    }
    given = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    for name, fine in ok.items():
        if not fine:
            raise ConfigError(f"{name} = {given[name]} is out of range. Correct its value.")


def _gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """fp32 gradients by parameter name of one backward pass."""
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    found: Sequence[Tensor | None] = ()
    if named:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), list(named.values()), allow_unused=True)
    grads = {n: g.float() for n, g in zip(named, found, strict=True) if g is not None}
    if not grads:
        raise ConfigError(
            "no parameter gets a gradient from this loss. Set requires_grad on what should be "
            "trained, and return a loss that depends on it."
        )
    return grads


def _adamw(
    w: Tensor, grad: Tensor, state: Moments | None, lr: float, decay: float,
    betas: tuple[float, float], eps: float,
) -> _Step:  # fmt: skip
    """The arithmetic of halfulp.optim.AdamW, operation by operation."""
    zeros = torch.zeros_like(w)
    m, v, before = state or Moments(zeros, zeros, 0)
    step = before + 1
    m = m.float() + (grad - m.float()) * (1 - betas[0])
    v = v.float() * betas[1] + (grad * grad) * (1 - betas[1])
    root = v.double().sqrt().float() * (1 / math.sqrt(1 - betas[1] ** step))
    direction = m / (root + eps)
    update = direction * (lr / (1 - betas[0] ** step))
    return _Step(w, grad, v, root, direction / (1 - betas[0] ** step), update, decay)


class _Sums:
    """Counts by (block, format) while the parameters pass by."""

    def __init__(self, weights: Sequence[str], moments: Sequence[str]) -> None:
        self.weights = {name: format_quantizer(name) for name in weights}
        self.moments = {name: format_quantizer(name) for name in moments}
        self.weight_sums: dict[tuple[str, str], list] = {}
        self.underflow: dict[tuple[str, str], list[int]] = {}
        self.floors: dict[str, list[int]] = {}

    def add(self, block: str, step: _Step, lr: float, eps: float) -> None:
        for name, q in self.weights.items():
            _accumulate(self.weight_sums, (block, name), _weight_sums(step, q, lr))
        n, present = step.v.numel(), step.grad != 0
        for name, q in self.moments.items():
            stored = step.v if q.is_identity else apply_quantizer(step.v.contiguous(), q)
            _accumulate(self.underflow, (block, name), [n, int(((stored == 0) & present).sum())])
        below = int(((step.root < eps) & present).sum())
        _accumulate(self.floors, block, [n, int(present.sum()), below])

    def rows(
        self,
    ) -> tuple[tuple[WeightRow, ...], tuple[MomentRow, ...], tuple[EpsRow, ...]]:
        """All rows, those of block "all" last."""
        for sums in (self.weight_sums, self.underflow):
            for (_, name), values in list(sums.items()):
                _accumulate(sums, (ALL, name), values)
        for values in list(self.floors.values()):
            _accumulate(self.floors, ALL, values)
        weights = tuple(_weight_row(*key, sums) for key, sums in self.weight_sums.items())
        moments = tuple(
            MomentRow(block=block, format=name, elements=n, underflow=lost / max(n, 1))
            for (block, name), (n, lost) in self.underflow.items()
        )
        floors = tuple(
            EpsRow(block=b, elements=n, floor=below / max(present, 1), silent=1 - present / n)
            for b, (n, present, below) in self.floors.items()
        )
        return weights, moments, floors


def _accumulate(sums: dict, key: object, values: list) -> None:
    sums[key] = [a + b for a, b in zip(sums[key], values, strict=True)] if key in sums else values


def _weight_row(block: str, name: str, sums: list) -> WeightRow:
    n, asked, lost, nonzero, undecayed, update, weight, updates, decays = sums
    return WeightRow(
        block=block,
        format=name,
        elements=n,
        asked=asked / max(n, 1),
        lost_updates=lost / max(asked, 1),
        lost_decay=undecayed / nonzero if nonzero else math.nan,
        relative_update=math.sqrt(update / weight) if weight else math.inf,
        updates=updates,
        decays=decays,
    )


def _weight_sums(step: _Step, q: Quantizer, lr: float) -> list:
    """What `_weight_row` needs of one parameter, additive over parameters."""
    old = _store(step.w, q)
    factor = 1 - lr * step.decay
    exact = old * factor - step.update
    asked = exact != old
    lost = int((asked & (_store(exact, q) == old)).sum())
    decays = Thresholds.of(old.new_empty(0))
    nonzero = undecayed = 0
    up, down = neighbors(old, q)
    if step.decay:
        nonzero = int((old != 0).sum())
        undecayed = int(((old != 0) & (_store(old * factor, q) == old)).sum())
        decays = _thresholds(step.decay * old, up, down)
    updates = _thresholds(step.direction + step.decay * old, up, down)
    squares = [float(t.double().square().sum()) for t in (exact - old, old)]
    return [old.numel(), int(asked.sum()), lost, nonzero, undecayed, *squares, updates, decays]


def _thresholds(descent: Tensor, up: Tensor, down: Tensor) -> Thresholds:
    """The learning rates at which −lr · descent reaches half the gap on its side; 0 is no entry."""
    half = torch.where(descent > 0, down, up) / 2
    return Thresholds.of((half / descent.abs())[descent != 0])


def _store(x: Tensor, q: Quantizer) -> Tensor:
    return x if q.is_identity else apply_quantizer(x.contiguous(), q)


def neighbors(x: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """Distances from `x` (fp32, on the grid of `q`) to the next larger and smaller grid values.

    With a scale: at the scale that `x` has. Beyond the largest value the distance is inf.
    """
    s, inverse = scales(x, q) if q.scale != "none" else (1.0, 1.0)
    y = x * s
    f = q.format
    magnitude, exponent = torch.frexp(y)
    exponent = torch.where(y == 0, f.smallest_exponent, exponent - 1).clamp(f.smallest_exponent)
    gap = torch.ldexp(torch.ones_like(y), exponent - f.mantissa_bits)
    # Toward zero from a power of two, the binade below begins at once, except among subnormals.
    narrow = (magnitude.abs() == 0.5) & (exponent > f.smallest_exponent)
    inward = torch.where(narrow, gap / 2, gap)
    outward = torch.where(y.abs() >= f.largest, math.inf, gap)
    above = torch.where(y >= 0, outward, inward) * inverse
    return above, torch.where(y > 0, inward, outward) * inverse
