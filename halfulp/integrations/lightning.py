"""The guard in Lightning."""

from typing import Any

import torch
from lightning.pytorch import (  # pyright: ignore[reportMissingImports]
    Callback,
    LightningModule,
    Trainer,
)
from torch import Tensor

from halfulp.errors import ConfigError
from halfulp.guard.loop import Guard


class GuardCallback(Callback):
    """`Trainer(…, callbacks=[halfulp.Guard(module.net, policy=…).lightning()])`.

    The guard's model is the nn.Module that `training_step` calls, once per micro-batch: the
    LightningModule itself, or a part that holds all its trainable weights. It judges the gradients
    before Lightning clips them. An update that is withheld is not made: no weight and no moment
    moves. Where the loss is not the `loss` of the model's output, give the guard `loss=`.

    What it cannot do there:

    * Lightning's data does not rewind. After a rollback weights, moments and scales are as they
      were, and training goes on with the next batch; `global_step` and the learning rate's schedule
      go on as well, after a withheld update too.
    * One device, one optimizer, automatic optimization, no fp16 loss scaling: ConfigError at the
      beginning of training for anything else.

    The guard's state is in Lightning's checkpoints. StoppedError ends `trainer.fit`.
    """

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self._loss: Tensor | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check(trainer, pl_module)
        if self.guard.optimizer is not trainer.optimizers[0]:
            self.guard.attach(trainer.optimizers[0])

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        # Lightning has divided it by the number of micro-batches.
        loss = loss.detach()
        self._loss = loss if self._loss is None else self._loss + loss

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        loss, self._loss = self._loss, None
        self.guard.step(loss)

    def state_dict(self) -> dict[str, Any]:
        return self.guard.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.guard.load_state_dict(state_dict)


def _check(trainer: Trainer, module: LightningModule) -> None:
    refused = {
        f"{trainer.world_size} processes": trainer.world_size > 1,
        f"{len(trainer.optimizers)} optimizers": len(trainer.optimizers) != 1,
        "manual optimization": not module.automatic_optimization,
        "fp16, whose gradients are scaled": str(trainer.precision).startswith("16"),
    }
    if found := [what for what, there in refused.items() if there]:
        raise ConfigError(
            f"the guard cannot work in a Lightning Trainer with {', '.join(found)}. Use one device "
            "in fp32 or bf16 and one optimizer, halfulp.Guard in your own loop, or `halfulp train`."
        )
