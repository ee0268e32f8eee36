"""The guard in transformers.Trainer."""

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from halfulp.errors import ConfigError
from halfulp.guard.loop import Guard
from halfulp.guard.own_loop import unwrapped


class GuardCallback(TrainerCallback):
    """`Trainer(model, …, callbacks=[halfulp.Guard(model, policy=…).hf()])`.

    It judges the gradients before they are clipped, so it takes the clipping over from the Trainer,
    with its `max_grad_norm`. An update that is withheld is not made: no weight and no moment moves.
    The model's output must have a `loss` that is the one trained on.

    What it cannot do there:

    * The Trainer's data does not rewind. After a rollback weights, moments and scales are as they
      were, and training goes on with the next batch; `global_step` and the learning rate's schedule
      go on as well, after a withheld update too.
    * Its state is not in the Trainer's checkpoints: save `guard.state_dict()` beside them.
    * One process on one device, without fp16 loss scaling, DeepSpeed or FSDP: ConfigError at the
      beginning of training for anything else.

    StoppedError ends `trainer.train()` when the guard can do no more.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard, self.clip = guard, 0.0

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        **_: Any,
    ) -> None:
        _check(args)
        if unwrapped(model) is not self.guard.model:
            raise ConfigError(
                "the Trainer trains another model than the one that the guard was made for. Give "
                "both the same model."
            )
        own: Any = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if self.guard.optimizer is not own:
            self.guard.attach(own)
        self.clip, args.max_grad_norm = args.max_grad_norm or 0.0, 0.0

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any
    ) -> None:
        if self.guard.step() and self.clip > 0:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        args.max_grad_norm = self.clip


def _check(args: Any) -> None:
    refused = {
        f"{args.world_size} processes": args.world_size > 1,
        f"{args.n_gpu} GPUs in one process": args.n_gpu > 1,
        "fp16, whose gradients are scaled": args.fp16,
        "DeepSpeed": bool(args.deepspeed),
        "FSDP": bool(args.fsdp),
    }
    if found := [what for what, there in refused.items() if there]:
        raise ConfigError(
            f"the guard cannot work in a Trainer with {', '.join(found)}. Use one process on one "
            "device in fp32 or bf16, halfulp.Guard in your own loop, or `halfulp train`."
        )
