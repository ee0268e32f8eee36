"""One optimizer step: micro-batches, gradients, the verdict on them, the update."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from halfulp.errors import NonFiniteError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.random import Key
from halfulp.train import nonfinite
from halfulp.train.blockwise import squares_by_type
from halfulp.train.checkpoint import path_of
from halfulp.train.model import next_token_loss, random_state
from halfulp.train.nonfinite import Place
from halfulp.train.parallel import local, synchronized
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


def run_step(s: Session, *, interrupted: bool) -> Outcome:
    """Do step `s.step` (0-based); the same outcome on every process.

    NonFiniteError, with the event `nonfinite` written and no parameter changed, if the loss or a
    gradient is not finite and the loss scale cannot be the reason.
    """
    lr = _set_rates(s)
    losses = _forward_backward(s)
    parameters = [p for p in s.model.parameters() if p.grad is not None]
    gradients = [local(p.grad) for p in parameters if p.grad is not None]
    _finish_gradients(s, gradients)
    loss, norm, stop, norms = _agree(s, losses, gradients, interrupted)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if not math.isfinite(loss):
        _refuse(s, "loss", _place_of_loss(s))
    if not finite and not s.precision.scaler.may_skip:
        _refuse(s, "gradient", nonfinite.in_gradients(s.model, s.blocks, s.world))
    if finite:
        _update(s, gradients, norm)
    s.precision.optimizer.zero_grad(set_to_none=True)
    s.precision.handle.end_step()
    return Outcome(loss, norm, lr, skipped=not finite, interrupted=stop, norms=norms)


def batch_of(s: Session, micro: int) -> Tensor:
    """Micro-batch `micro` (over all processes) of step `s.step`, [rows, length + 1]."""
    train = s.config.train
    index = s.step * s.micro_batches + micro
    rows, length = train.rows, s.config.data.length
    batch_BT = s.data.batch("train", index, rows=rows, length=length, seed=train.seed)
    return batch_BT.to(s.world.device)


def key_of(*numbers: int) -> int:
    """A seed below 2**63 that depends on all `numbers` and their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _set_rates(s: Session) -> float:
    """Give every group its learning rate; the run's."""
    lr = lr_at(s.step, s.config.train)
    for group in s.precision.optimizer.param_groups:
        group["lr"] = s.blockwise.lr(s.step, group["lr_type"]) if s.blockwise else lr
    return lr


def _forward_backward(s: Session) -> Tensor:
    """Losses of this process's micro-batches at their places among all, elsewhere 0."""
    losses = torch.zeros(s.micro_batches, dtype=torch.float64, device=s.world.device)
    for i in range(s.accumulate):
        micro = s.world.rank + s.world.size * i
        s.precision.handle.set_step(s.step, micro=micro)
        last = i == s.accumulate - 1
        key = key_of(s.config.train.seed, s.step, micro)
        with random_state(key), synchronized(s.shared, s.world, last):
            loss = next_token_loss(s.shared, batch_of(s, micro))
            (loss * s.precision.scaler.scale).backward()
        losses[micro] = loss.detach()
    return losses


def _finish_gradients(s: Session, gradients: list[Tensor]) -> None:
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
        if name in quantizers and parameter.grad is not None:
            gradient, q = local(parameter.grad), quantizers[name]
            key = Key.of(s.config.train.seed, f"{name}.gradient").fold(s.step)
            apply_quantizer(gradient, q, key=key if q.stochastic else None, out=gradient)
    _multiply(gradients, 1.0 / scale)


def _agree(
    s: Session, losses: Tensor, gradients: list[Tensor], interrupted: bool
) -> tuple[float, float, bool, dict[str, float]]:
    """(loss, gradient norm, stop?, norm per block type) over all processes, in one all-reduce."""
    kinds, by_kind = _squares_by_type(s)
    squares = torch.cat([by_kind, _square(gradients, s.world.device).reshape(1)])
    if s.world.mode == "ddp" and not s.world.main:
        squares = torch.zeros_like(squares)  # each process has the whole gradient
    flag = torch.tensor([float(interrupted)], dtype=torch.float64, device=s.world.device)
    packed = s.world.sum(torch.cat([losses, squares, flag]))
    loss, roots = packed[: s.micro_batches].mean(), packed[s.micro_batches : -1].sqrt()
    norms = dict(zip(kinds, roots[:-1].tolist(), strict=True))
    return loss.item(), roots[-1].item(), packed[-1].item() > 0, norms


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


def _square(gradients: list[Tensor], device: torch.device) -> Tensor:
    if not gradients:
        return torch.zeros((), dtype=torch.float64, device=device)
    each = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    norms = torch.stack(list(each)).double()
    if not torch.isfinite(norms).all():  # the fp32 sum of squares may have overflowed alone
        norms = torch.stack([torch.linalg.vector_norm(g.double()) for g in gradients])
    return norms.square().sum()


def _update(s: Session, gradients: list[Tensor], norm: float) -> None:
    clip = s.config.train.clip
    if clip and norm > clip:
        _multiply(gradients, clip / norm)
    s.precision.optimizer.step()


def _place_of_loss(s: Session) -> Place:
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
