"""Held-out loss, in the policy's arithmetic and in fp32."""

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from halfulp.train.model import next_token_loss
from halfulp.train.parallel import settle
from halfulp.train.session import Session


@torch.no_grad()
def evaluate(s: Session) -> dict[str, float]:
    """Fields of the event `eval`: loss_nats, loss_nats_fp32 and the tokens both are means of.

    The batches are spread over the processes; the result is the same for any number of them.
    """
    train = s.config.train
    losses = torch.zeros(2, train.eval_batches, dtype=torch.float64, device=s.world.device)
    s.model.eval()
    try:
        for turn in range(math.ceil(train.eval_batches / s.world.size)):
            _one_batch(s, turn * s.world.size + s.world.rank, losses)
    finally:
        s.model.train()
        settle(s.shared, s.world)
    quantized, plain = s.world.sum(losses).mean(dim=1).tolist()
    tokens = train.eval_batches * train.rows * s.config.data.length
    return {"loss_nats": quantized, "loss_nats_fp32": plain, "tokens": tokens}


def _one_batch(s: Session, index: int, losses: Tensor) -> None:
    # A process without a batch of its own still runs one: sharded forwards are collective.
    counted = index < losses.shape[1]
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
            loss = next_token_loss(s.model, batch_BT)
        if counted:
            losses[row, index] = loss
