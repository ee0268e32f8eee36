"""Faults that a drill injects into a run, each as it happens in real ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.errors import ConfigError
from halfulp.numerics.quantizer import Quantizer
from halfulp.quantization import Quantized
from halfulp.site import History


@dataclass
class Fault:
    """Something that goes wrong at the (1-based) `step`; it happens once, as most faults do.

    Steps that are replayed after a rollback are not hit again, unless the docstring of the fault
    says so. A training loop calls `before` right before the forward pass of every step, once the
    learning rates are set, and `tokens` with every batch that it takes; `position` counts batches,
    so that a replayed batch is the same. Whole parameters only: no sharded ones.
    """

    step: int
    done: bool = field(default=False, init=False)

    def before(
        self, step: int, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer
    ) -> None:
        """Do the damage, the first time that `step` is reached."""
        if step == self.step and not self.done:
            self.done = True
            self.damage(model, handle, optimizer)

    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        """What happens to model, quantizers or optimizer."""

    def tokens(self, position: int, batch: Tensor) -> Tensor:
        """The batch as the run gets to see it."""
        return batch

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it: what has happened, but for hooks on the model."""
        return {f.name: getattr(self, f.name) for f in fields(self) if not f.init}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class LastingFault(Fault):
    """A fault of `steps` steps in a row, which ends when the run goes back before it."""

    steps: int = 20
    _last: int = field(default=0, init=False)

    def before(
        self, step: int, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer
    ) -> None:
        """Do the damage of this step, again where the step is repeated."""
        self.done = self.done or step < self._last or step >= self.step + self.steps
        self._last = step
        if step >= self.step and not self.done:
            self.damage(model, handle, optimizer)


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
class NanBatch(Fault):
    """One batch whose embeddings are not a number, whenever it is read.

    So acts a token beyond the table, or a record that was damaged after it was embedded.
    """

    _armed: bool = field(default=False, init=False)

    def before(
        self, step: int, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.done:
            self.done = True
            table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
            table.register_forward_hook(self._embed)

    def tokens(self, position: int, batch: Tensor) -> Tensor:
        self._armed = position == self.step - 1
        return batch

    def _embed(self, module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        armed, self._armed = self._armed, False  # evaluations read no batch of the run
        return output * float("nan") if armed else output


@dataclass
class FlippedBit(Fault):
    """The highest exponent bit of one weight flips: it becomes 2^128 times as large, and finite."""

    parameter: str = ""
    seed: int = 0

    @torch.no_grad()
    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        weight = model.get_parameter(self.parameter).view(-1)
        size = weight.abs()
        # From 1 on the bit is set already, or its neighbors make the result infinite.
        small = ((size >= torch.finfo(weight.dtype).tiny) & (size < 1)).nonzero().view(-1).cpu()
        random = torch.Generator().manual_seed(self.seed)
        chosen = small[torch.randint(len(small), (), generator=random)]
        kind, bit = {4: (torch.int32, 30), 2: (torch.int16, 14)}[weight.element_size()]
        weight.view(kind)[chosen] ^= 1 << bit


@dataclass
class ScaledWeight(Fault):
    """One matrix is multiplied, as by a wrong rescaling or a half-written checkpoint."""

    parameter: str = ""
    factor: float = 8.0

    @torch.no_grad()
    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        model.get_parameter(self.parameter).mul_(self.factor)


@dataclass
class StaleScale(Fault):
    """The amax history of a linear's input takes no new values in, and the tensor outgrows it.

    From `step` on `share` of the elements saturate; more as the tensor grows. It is broken software
    and outlasts rollbacks, but not the history: a block that changes its recipe is rid of it.
    ConfigError if the input of `gemm` has no delayed scale.
    """

    gemm: str = ""
    share: float = 0.19

    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        site = handle.sites.get(self.gemm)
        if site is None or "fprop_x" not in site.histories:
            raise ConfigError(
                f"a stale scale needs a delayed one, and the input of {self.gemm} has none. Use a "
                "recipe with delayed scaling, such as te_delayed, or drill other faults."
            )
        name = next(g.module for g, *_ in handle.resolution.gemms if g.name == self.gemm)

        def outgrow(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].detach().float().abs().flatten()
            old = size.kthvalue(max(1, round((1 - self.share) * size.numel()))).values
            stuck = _StuckHistory(torch.full_like(site.histories["fprop_x"].amaxes, old.item()))
            stuck.begin(site.quantizers["fprop_x"])
            site.histories["fprop_x"] = stuck
            hook.remove()

        hook = model.get_submodule(name).register_forward_pre_hook(outgrow)


class _StuckHistory(History):
    def __init__(self, amaxes: Tensor) -> None:
        super().__init__(amaxes, torch.ones(()))

    def begin(self, q: Quantizer) -> None:
        super().restore(q, self.amaxes)

    def restore(self, q: Quantizer, amaxes: Tensor) -> None:
        self.seen = None


@dataclass
class RateJump(LastingFault):
    """The learning rate is `factor` times what was asked, as from a broken scheduler."""

    factor: float = 30.0

    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            group["lr"] *= self.factor


@dataclass
class LostMoment(LastingFault):
    """Second moments underflow to 0 in storage, so that each update is a few gradients' m / |g|."""

    parameters: tuple[str, ...] = ()

    @torch.no_grad()
    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        for name in self.parameters:
            if state := optimizer.state.get(model.get_parameter(name)):
                state["v"].zero_()


@dataclass
class NoisyGemm(Fault):
    """One linear gives random relative errors, others each time: in one call, or from then on.

    `error` is their standard deviation; wrong exponents give large ones. Broken hardware
    (`lasting`) outlasts every rollback.
    """

    module: str = ""
    error: float = 100.0
    lasting: bool = False
    seed: int = 0

    def damage(self, model: nn.Module, handle: Quantized, optimizer: torch.optim.Optimizer) -> None:
        random = torch.Generator().manual_seed(self.seed)

        def err(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
            if not self.lasting:
                hook.remove()
            noise = torch.randn(output.shape, generator=random).to(output.device, output.dtype)
            return output * (1 + self.error * noise)

        hook = model.get_submodule(self.module).register_forward_hook(err)
