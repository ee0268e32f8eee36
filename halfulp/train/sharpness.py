"""Sharpness of every block while a run trains, without touching it.

A draw is a forward and backward pass of a micro-batch that the run has not seen yet, with labels
sampled from the model (halfulp/sharpness/first_order.py). Quantizers are off, random numbers are
functions of (seed, step, key) and gradients never meet those of the step: a run that is measured
has the same bits as one that is not.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfulp.pieces import Piece
from halfulp.processes import local
from halfulp.sharpness.first_order import sampled_labels
from halfulp.sharpness.logits import LogitsState, logits_sums, state_of
from halfulp.sharpness.report import SharpnessReport
from halfulp.train.model import random_state
from halfulp.train.parallel import synchronized, whole
from halfulp.train.session import Session
from halfulp.train.step import batch_of, key_of

MONITOR = 0  # the key of the measurements that a run takes by itself


@dataclass(frozen=True)
class Measured:
    """Traces of each block, and the logits of the same forward passes."""

    report: SharpnessReport
    logits: LogitsState
    seconds: float


def measure_gnb(s: Session, *, draws: int, key: int) -> SharpnessReport:
    """Gauss-Newton traces of the run's model between two steps; a collective call.

    Each draw takes the next micro-batch (one per process) that the run will train on, and labels
    that depend on `key`; equal arguments at equal steps give equal bits. The result is the same on
    every process. Values that are not finite are returned as they are: what to do with a diverging
    run is the run's own business. With one draw there is no standard error (nan).
    """
    return measure(s, draws=draws, key=key).report


def measure(s: Session, *, draws: int, key: int) -> Measured:
    """What `measure_gnb` measures, with the sharpness of the logits and the time it took."""
    start = time.perf_counter()
    traces, sums = [], torch.zeros(5, dtype=torch.float64, device=s.world.device)
    with _prepared(s):
        for draw in range(draws):
            found, logits = _one_draw(s, draw, key)
            traces.append(found)
            sums += logits
    packed = s.world.sum(torch.cat([torch.stack(traces).flatten(), sums]))
    state = state_of(packed[-5:])
    seconds = time.perf_counter() - start
    report = SharpnessReport(
        model=type(s.model).__name__, estimator="gnb", pieces=s.pieces,
        traces=packed[:-5].view(draws, -1).cpu(), positions=state.positions // draws,
        loss_nats=state.loss_nats, seed=s.config.train.seed,
        cost_steps=seconds * s.step / s.seconds if s.seconds else math.nan,
        notes=("Measured on training data, in the model's own precision.",),
    )  # fmt: skip
    return Measured(report, state, seconds)


def fields_of(measured: Measured) -> dict[str, object]:
    """The fields of the event `sharpness`."""
    report = measured.report
    return {
        "blocks": [
            {"block": row.name, "parameters": row.parameters, "sharpness": row.sharpness}
            for row in report.rows("block")
        ],
        "draws": report.draws,
        "positions": report.positions,
        "logits": measured.logits.fields(),
        "seconds": measured.seconds,
    }


def _one_draw(s: Session, draw: int, key: int) -> tuple[Tensor, Tensor]:
    """(this process's addend to the trace of each piece [pieces], sums over its logits)."""
    ahead, i = divmod(draw, s.accumulate)
    micro = s.world.rank + s.world.size * i
    batch_BT = batch_of(s, micro, ahead=ahead)
    seed = key_of(s.config.train.seed, s.step, ahead * s.micro_batches + micro, key)
    generator = torch.Generator(s.world.device).manual_seed(seed)
    with random_state(seed):
        logits = s.model(input_ids=batch_BT[:, :-1], use_cache=False).logits
        logits_NV = logits.float().flatten(0, -2)
        labels_N = sampled_labels(logits_NV, generator)
        loss = nn.functional.cross_entropy(logits_NV, labels_N)
        gradients = _gradients(s, loss)
    sums = logits_sums(logits_NV, batch_BT[:, 1:].flatten())
    return _addends(s, gradients, len(labels_N)), sums


def _gradients(s: Session, loss: Tensor) -> list[Tensor]:
    """The gradient of each piece's parameter; under fsdp2 averaged over the processes."""
    if s.world.mode != "fsdp2":
        return list(
            torch.autograd.grad(loss, _parameters(s), allow_unused=True, materialize_grads=True)
        )
    with synchronized(s.shared, s.world, True):
        loss.backward()
    sharded = _parameters(s)  # only now: between forward and backward they are whole
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in sharded]
    for parameter in sharded:
        parameter.grad = None
    return found


def _parameters(s: Session) -> list[nn.Parameter]:
    named = dict(s.model.named_parameters())
    return [named[piece.parameter] for piece in s.pieces]


def _addends(s: Session, gradients: Sequence[Tensor], positions: int) -> Tensor:
    """What adds up over the processes to B ‖∇‖² of each piece.

    Every process of ddp has a gradient of its own and B positions: the mean over them counts.
    Sharded gradients are those of all positions, and each process holds a part.
    """
    squares = [_square(s, p, g) for p, g in zip(s.pieces, gradients, strict=True)]
    sharded = s.world.mode == "fsdp2"
    weight = positions * (s.world.size if sharded else 1 / s.world.size)
    return weight * torch.stack(squares)


def _square(s: Session, piece: Piece, gradient: Tensor) -> Tensor:
    if piece.groups and s.world.mode == "fsdp2":
        # The channels of a slice are spread over the shards.
        part = piece.of(whole(gradient))
        return torch.linalg.vector_norm(part).double().square() * float(s.world.main)
    return torch.linalg.vector_norm(piece.of(local(gradient))).double().square()


@contextmanager
def _prepared(s: Session) -> Iterator[None]:
    """Quantizers and dropout off and compiled graphs aside."""
    modes = [(module, module.training) for module in s.model.modules()]
    with ExitStack() as stack:
        stack.enter_context(s.precision.handle.off())
        if s.config.train.compile:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        s.precision.handle.set_step(s.step)  # else a forward pass would begin a step of its own
        for module, _ in modes:
            # Layers that recompute their activations do so in training mode only.
            module.training = getattr(module, "gradient_checkpointing", False) is True
        try:
            yield
        finally:
            for module, mode in modes:
                module.training = mode
