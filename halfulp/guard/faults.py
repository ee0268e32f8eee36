"""Faults that a drill injects into a run, each as it happens in real ones."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfulp.quantization import Quantized


@dataclass
class Fault:
    """Something that goes wrong at the (1-based) `step`; it happens once, as most faults do.

    A training loop calls `before` right before the forward pass of every step, and `tokens` with
    every batch that it takes; `position` counts batches, so that a replayed batch is the same.
    """

    step: int
    done: bool = field(default=False, init=False)

    def before(
        self, step: int, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer
    ) -> None:
        """Do the damage to the state, the first time that `step` is reached."""
        if step == self.step and not self.done:
            self.done = True
            self.damage(model, handle, optimizer)

    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        """What happens to model, quantizers or optimizer."""

    def tokens(self, position: int, batch: Tensor) -> Tensor:
        """The batch as the run gets to see it."""
        return batch


@dataclass
class ScaledWeight(Fault):
    """One matrix is multiplied, as by a wrong rescaling or a half-written checkpoint."""

    parameter: str = ""
    factor: float = 8.0

    @torch.no_grad()
    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        model.get_parameter(self.parameter).mul_(self.factor)


@dataclass
class BadBatch(Fault):
    """One batch is noise: random tokens, the same ones whenever it is read."""

    vocab: int = 2

    def tokens(self, position: int, batch: Tensor) -> Tensor:
        if position != self.step - 1:
            return batch
        random = torch.Generator().manual_seed(position)
        noise = torch.randint(self.vocab, batch.shape, generator=random)
        return noise.to(batch.device, batch.dtype)


@dataclass
class StaleScale(Fault):
    """The delayed scale of one operand is `factor` times too large, and stays so: its tensor has
    outgrown a history that a long window still remembers."""

    gemm: str = ""
    operand: str = "fprop_x"
    factor: float = 16.0

    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        history = handle.sites[self.gemm].histories[self.operand]
        history.scale = history.scale * self.factor
