"""One optimizer step: micro-batches, gradients, the verdict on them, the update."""

import hashlib
import math
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from halfulp.errors import NonFiniteError
from halfulp.guard.detect import Trigger
from halfulp.guard.host import Pass
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.random import Key
from halfulp.processes import local
from halfulp.train import nonfinite
from halfulp.train.blockwise import squares_by_type
from halfulp.train.checkpoint import path_of
from halfulp.train.model import next_token_loss, random_state
from halfulp.train.nonfinite import Place
from halfulp.train.parallel import settle, synchronized
from halfulp.train.schedule import lr_at
from halfulp.train.session import Session


@dataclass(frozen=True)
class Outcome:
    """What one step gave; `skipped` means that the loss scale was too large and nothing moved."""

    loss_nats: float
    grad_norm: float  # before clipping
    lr: float
    skipped: bool
    interrupted: bool  # some process was asked to stop
    norms: Mapping[str, float] = field(default_factory=dict)  # gradient norm per block type
    units: Mapping[str, float] = field(default_factory=dict)  # gradient norm per unit of the guard
    weights: Mapping[str, float] = field(default_factory=dict)  # norm of each matrix before
    trigger: Trigger | None = None  # why the guard holds the step: nothing has moved

    @property
    def seen(self) -> Pass:
        """The step as the guard sees it."""
        return Pass(self.loss_nats, self.grad_norm, self.units, weights=self.weights)


def run_step(s: Session, *, interrupted: bool) -> Outcome:
    """Do step `s.step` (0-based); the same outcome on every process.

    A guard may hold the step: then nothing has moved, and the outcome has a `trigger`. Without one,
    NonFiniteError, with the event `nonfinite` written and no parameter changed, if the loss or a
    gradient is not finite and the loss scale cannot be the reason.
    """
    lr = _set_rates(s)
    for fault in s.faults:
        fault.before(s.step + 1, s.model, s.precision.handle, s.precision.optimizer)
    outcome = agree(s, forward_backward(s, look=True), interrupted=interrupted)
    loss, norm = outcome.loss_nats, outcome.grad_norm
    finite = math.isfinite(loss) and math.isfinite(norm)
    scaled = math.isfinite(loss) and s.precision.scaler.may_skip
    if s.guard is not None and (finite or not scaled):
        trigger = s.guard.judge(s.step + 1, outcome.seen)
        if trigger is not None:
            drop_gradients(s)
            return replace(outcome, lr=lr, trigger=trigger)
    if not math.isfinite(loss):
        _refuse(s, "loss", place_of_loss(s))
    if not finite and not scaled:
        _refuse(s, "gradient", nonfinite.in_gradients(s.model, s.blocks, s.world))
    if finite:
        _update(s, gradients_of(s), norm)
    s.precision.optimizer.zero_grad(set_to_none=True)
    s.precision.handle.end_step()
    return replace(outcome, lr=lr, skipped=not finite)


def drop_gradients(s: Session) -> None:
    """Forget the passes since the last update: gradients and what the delayed scales saw."""
    s.precision.optimizer.zero_grad(set_to_none=True)
    s.precision.handle.forget_seen()


def gradients_of(s: Session) -> list[Tensor]:
    """This process's part of every gradient there is, in the order of the parameters."""
    return [local(p.grad) for p in s.model.parameters() if p.grad is not None]


def batch_of(s: Session, micro: int, *, ahead: int = 0) -> Tensor:
    """Micro-batch `micro` (over all processes) of the next step, or of the one so far `ahead`.

    [rows, length + 1].
    """
    train = s.config.train
    position = s.cursor.ahead(ahead)
    index = position * s.micro_batches + micro
    rows, length = train.rows, s.config.data.length
    batch_BT = s.data.batch("train", index, rows=rows, length=length, seed=train.seed)
    for fault in s.faults:
        batch_BT = fault.tokens(position, batch_BT)
    return batch_BT.to(s.world.device)


def key_of(*numbers: int) -> int:
    """A seed below 2**63 that depends on all `numbers` and their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _set_rates(s: Session) -> float:
    """Give every group its learning rate; the run's."""
    lr = lr_at(s.step, s.config.train)
    slowed = s.guard.factors(s.step) if s.guard else {}
    for group in s.precision.optimizer.param_groups:
        group["lr"] = s.blockwise.lr(s.step, group["lr_type"]) if s.blockwise else lr
        group["lr"] *= slowed.get(group["block"], 1.0)
    return lr


def forward_backward(
    s: Session, *, ahead: int = 0, plain: Collection[str] = (), look: bool = False
) -> Tensor:
    """Losses of this process's micro-batches at their places among all, elsewhere 0.

    The mean gradient is left in the parameters; those of the blocks `plain` keep it unrounded.
    `ahead`: of a batch so many places further on. `look`: the guard may look inside.
    """
    losses = torch.zeros(s.micro_batches, dtype=torch.float64, device=s.world.device)
    for i in range(s.accumulate):
        micro = s.world.rank + s.world.size * i
        s.precision.handle.set_step(s.step, micro=micro)
        looks = s.guard.looks.around(i) if s.guard and look else nullcontext()
        last = i == s.accumulate - 1
        key = key_of(s.config.train.seed, s.step, micro)
        with random_state(key), synchronized(s.shared, s.world, last):
            with looks:
                loss = next_token_loss(s.shared, batch_of(s, micro, ahead=ahead))
            (loss * s.precision.scaler.scale).backward()
        losses[micro] = loss.detach()
    _finish_gradients(s, gradients_of(s), plain)
    return losses


def _finish_gradients(s: Session, gradients: list[Tensor], plain: Collection[str]) -> None:
    """From sums over micro-batches of the scaled loss to the mean of the loss.

    The loss itself is not divided by the number of micro-batches: what the quantizers see must
    not depend on how a batch is split.
    """
    scale = s.precision.scaler.scale
    quantizers = s.precision.gradient_quantizers
    if not quantizers:
        _multiply(gradients, 1.0 / (s.accumulate * scale))
        return
    # A stored gradient is the scaled one: scaling is there to lift it into the format's range.
    _multiply(gradients, 1.0 / s.accumulate)
    for name, parameter in s.model.named_parameters():
        if name in quantizers and parameter.grad is not None and s.blocks[name] not in plain:
            gradient, q = local(parameter.grad), quantizers[name]
            key = Key.of(s.config.train.seed, f"{name}.gradient").fold(s.step)
            apply_quantizer(gradient, q, key=key if q.stochastic else None, out=gradient)
    _multiply(gradients, 1.0 / scale)


@torch.no_grad()
def forward_only(s: Session, *, ahead: int = 0) -> Tensor:
    """As `forward_backward`, without gradients; the model is afterwards sharded as before."""
    losses = torch.zeros(s.micro_batches, dtype=torch.float64, device=s.world.device)
    for i in range(s.accumulate):
        micro = s.world.rank + s.world.size * i
        s.precision.handle.set_step(s.step, micro=micro)
        with random_state(key_of(s.config.train.seed, s.step, micro)):
            losses[micro] = next_token_loss(s.model, batch_of(s, micro, ahead=ahead))
    settle(s.shared, s.world)
    return losses


def agree(s: Session, losses: Tensor, *, interrupted: bool) -> Outcome:
    """Loss and gradient norms over all processes, and whether one is to stop; one all-reduce."""
    kinds, by_kind = _squares_by_type(s)
    named = [(n, local(p.grad)) for n, p in s.model.named_parameters() if p.grad is not None]
    each = _squares([gradient for _, gradient in named], s.world.device)
    units, by_unit = s.guard.sums(named, each) if s.guard else ((), each[:0])
    matrices, by_matrix = _squares_of_matrices(s)
    squares = torch.cat([by_kind, by_unit, by_matrix, each.sum().reshape(1)])
    if s.world.mode == "ddp" and not s.world.main:
        squares = torch.zeros_like(squares)  # each process has the whole gradient
        squares[len(by_kind) + len(by_unit) : -1] = by_matrix  # whose copies may have come apart
    flag = torch.tensor([float(interrupted)], dtype=torch.float64, device=s.world.device)
    packed = s.world.sum(torch.cat([losses, squares, flag]))
    loss, roots = packed[: s.micro_batches].mean(), packed[s.micro_batches : -1].sqrt().tolist()
    return Outcome(
        loss_nats=loss.item(),
        grad_norm=roots[-1],
        lr=math.nan,
        skipped=False,
        interrupted=packed[-1].item() > 0,
        norms=dict(zip(kinds, roots, strict=False)),
        units=dict(zip(units, roots[len(kinds) :], strict=False)),
        # Under ddp times the root of the number of processes: only the change of it counts.
        weights=dict(zip(matrices, roots[len(kinds) + len(units) :], strict=False)),
    )


def _squares_of_matrices(s: Session) -> tuple[list[str], Tensor]:
    """The matrices that are trained, and the sums of squares of this process's part of each."""
    if s.guard is None:
        return [], torch.zeros(0, dtype=torch.float64, device=s.world.device)
    named = [(n, p) for n, p in s.model.named_parameters() if p.ndim >= 2 and p.requires_grad]
    return [n for n, _ in named], _squares([local(p.detach()) for _, p in named], s.world.device)


def _squares_by_type(s: Session) -> tuple[list[str], Tensor]:
    """The block types, and the sums of squares of this process's gradients of each."""
    if s.blockwise is None or not s.config.blockwise.guard:
        return [], torch.zeros(0, dtype=torch.float64, device=s.world.device)
    named = s.model.named_parameters()
    gradients = {name: local(p.grad) for name, p in named if p.grad is not None}
    squares = squares_by_type(s.blockwise.kinds, gradients)
    return list(squares), torch.stack(list(squares.values()))


def _multiply(tensors: list[Tensor], factor: float) -> None:
    torch._foreach_mul_(tensors, factor)  # pyright: ignore[reportPrivateImportUsage]


def _squares(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The sum of squares of each gradient, fp64."""
    if not gradients:
        return torch.zeros(0, dtype=torch.float64, device=device)
    each = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    norms = torch.stack(list(each)).double()
    if not torch.isfinite(norms).all():  # the fp32 sum of squares may have overflowed alone
        norms = torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients])
    return norms.square()


def _update(s: Session, gradients: list[Tensor], norm: float) -> None:
    clip = s.config.train.clip
    if clip and norm > clip:
        _multiply(gradients, clip / norm)
    s.precision.optimizer.step()


def place_of_loss(s: Session) -> Place:
    """Where the forward pass of the step's micro-batches first left the finite numbers."""
    with nonfinite.watched(s.model, s.blocks) as places, torch.no_grad():
        for i in range(s.accumulate):
            micro = s.world.rank + s.world.size * i
            s.precision.handle.set_step(s.step, micro=micro)
            with random_state(key_of(s.config.train.seed, s.step, micro)):
                next_token_loss(s.model, batch_of(s, micro))
    found = [place for part in s.world.gather(places[:1]) for place in part]
    return found[0] if found else Place()


def _refuse(s: Session, what: str, place: Place) -> None:
    step = s.step + 1
    s.emit("nonfinite", step=step, what=what, block=place.block)
    cure = f"halve train.lr (it is {s.config.train.lr:g})"
    if s.blockwise is not None:
        kind, ratio = max(s.blockwise.effective().items(), key=lambda item: item[1])
        cure += f" or lower the ratios of blockwise.ratios (the highest is {kind} = {ratio:g})"
    if place.block:
        cure += f", or give the block a wider recipe with a rule that matches {place.block!r}"
    good = "Last good checkpoint: none."
    if s.saved:
        path = path_of(s.run.path / "checkpoints", s.saved)
        good = f"Last good checkpoint: step {s.saved}; start from its weights with --model {path}"
    raise NonFiniteError(
        f"step {step}: the {what} is not finite; first in {place}. Nothing was updated or saved. "
        f"The same configuration would fail again: {cure}. {good}"
    )
