"""Held-out loss and sharpness of the logits, in the policy's arithmetic and in fp32."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.sharpness.logits import logits_sums, state_of
from halfulp.train.model import next_token_logits
from halfulp.train.parallel import settle
from halfulp.train.session import Session

# Positions at which sharpness is measured: all of a small model would take up to a third of the
# time of its forward pass.
_POSITIONS = 1024


@torch.no_grad()
def evaluate(s: Session) -> dict[str, Any]:
    """Fields of the event `eval`.

    * `loss_nats`, `loss_nats_fp32`, and the `tokens` that both are means of;
    * `logits`, `logits_fp32`: sharpness, sharpness_centered and logz (halfulp/sharpness/logits.py)
      at evenly spaced positions of the same batches, all of them up to 1024.

    The batches are spread over the processes; the result is the same for any number of them.
    """
    train = s.config.train
    # For each arithmetic and batch: the loss, then the sums over its logits.
    found = torch.zeros(2, train.eval_batches, 6, dtype=torch.float64, device=s.world.device)
    s.model.eval()
    try:
        for turn in range(math.ceil(train.eval_batches / s.world.size)):
            _one_batch(s, turn * s.world.size + s.world.rank, found)
    finally:
        s.model.train()
        settle(s.shared, s.world)
    found = s.world.sum(found)
    quantized, plain = found[:, :, 0].contiguous().mean(dim=1).tolist()
    logits, logits_fp32 = (state_of(sums).fields() for sums in found[:, :, 1:].sum(dim=1))
    return {
        "loss_nats": quantized,
        "loss_nats_fp32": plain,
        "tokens": train.eval_batches * train.rows * s.config.data.length,
        "logits": logits,
        "logits_fp32": logits_fp32,
    }


def _one_batch(s: Session, index: int, found: Tensor) -> None:
    # A process without a batch of its own still runs one: sharded forwards are collective.
    counted = index < found.shape[1]
    train, length = s.config.train, s.config.data.length
    index = index if counted else 0
    # Runs that differ in train.seed only are judged on the same tokens.
    seed = s.config.data.seed
    batch_BT = s.data.batch("val", index, rows=train.rows, length=length, seed=seed)
    batch_BT = batch_BT.to(s.world.device)
    handle = s.precision.handle
    handle.set_step(s.step, micro=s.micro_batches + index)
    for row, arithmetic in enumerate((nullcontext(), handle.off())):
        with arithmetic:
            logits_NV, targets_N = next_token_logits(s.model, batch_BT)
        if counted:
            found[row, index, 0] = nn.functional.cross_entropy(logits_NV, targets_N)
            some = _spaced(index, len(targets_N), train.eval_batches)
            found[row, index, 1:] = logits_sums(logits_NV[some], targets_N[some])


def _spaced(index: int, positions: int, batches: int) -> slice:
    """Evenly spaced positions of batch `index`; batches start apart, to meet every column."""
    stride = min(math.ceil(batches * positions / _POSITIONS), positions)
    return slice(index % stride, None, stride)
