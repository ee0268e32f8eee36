"""Forward passes as the user made them, kept so that they can be made again."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from halfulp.quantization import Quantized
from halfulp.site import histories

Scales = dict[str, tuple[Tensor, Tensor, Tensor | None, Tensor | None]]


@dataclass
class Call:
    """One forward pass: its inputs, and all else that decided its result but the weights.

    Inputs are kept by reference: a loop that writes into its batches cannot be replayed.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    random: tuple[Tensor, Tensor | None]  # states of the CPU's and the device's generators
    autocast: torch.dtype | None  # None: off
    time: tuple[int, int]  # step and micro-batch of the quantizers' clock
    scales: Scales
    loss: Tensor | None = None  # the `loss` of the output, where it has one
    ended: bool = False  # False: an exception left it


class Recorder:
    """Keeps every forward pass of `model` in training mode until `take`."""

    def __init__(self, model: nn.Module, handle: Quantized | None) -> None:
        self.model, self.handle, self.on = model, handle, True
        self.device = next(model.parameters()).device
        self.calls: list[Call] = []
        before: Any = torch.compiler.disable(self._before)
        after: Any = torch.compiler.disable(self._after)
        self._hooks = [
            model.register_forward_pre_hook(before, with_kwargs=True),
            model.register_forward_hook(after),
        ]

    def take(self) -> list[Call]:
        """The calls since the last `take` that came to an end."""
        calls, self.calls = self.calls, []
        return [call for call in calls if call.ended]

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @property
    def _listening(self) -> bool:
        return self.on and self.model.training and torch.is_grad_enabled()

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._listening:
            return
        device = self.device.type
        on = torch.is_autocast_enabled(device)
        self.calls.append(
            Call(
                tree_map_only(Tensor, Tensor.detach, args),
                tree_map_only(Tensor, Tensor.detach, kwargs),
                random_state(self.device),
                torch.get_autocast_dtype(device) if on else None,
                time_of(self.handle),
                scales_of(self.handle),
            )
        )

    def _after(self, model: nn.Module, args: object, output: object) -> None:
        loss = loss_in(output)
        if self._listening and self.calls:
            self.calls[-1].ended = True
            self.calls[-1].loss = None if loss is None else loss.detach()


def loss_in(output: object) -> Tensor | None:
    """The `loss` that a model's output carries; None if it has none."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


@contextmanager
def made_as(call: Call, handle: Quantized | None, device: torch.device) -> Iterator[None]:
    """Inside, a forward and backward pass has the random numbers and the scales of `call`."""
    set_random(call.random, device)
    with nullcontext() if handle is None else handle.at(*call.time):
        if handle is not None:
            put_scales(handle, call.scales)
        yield


def autocast(call: Call, device: torch.device) -> AbstractContextManager[Any]:
    """The autocast in which `call` was made."""
    if call.autocast is None:
        return nullcontext()
    # A weight that was cast in an earlier pass must not come from the cache.
    return torch.autocast(device.type, dtype=call.autocast, cache_enabled=False)


def random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """States of the generators that a model on `device` draws from."""
    own = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), own


def set_random(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """The inverse of `random_state`."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def time_of(handle: Quantized | None) -> tuple[int, int]:
    """Step and micro-batch of the quantizers' clock; (0, 0) without quantizers."""
    if handle is None:
        return 0, 0
    step, micro = handle.clock.tensor.tolist()
    return step, micro


def scales_of(handle: Quantized | None) -> Scales:
    """The delayed scales in force and what they are made of; never written to in place."""
    if handle is None:
        return {}
    found = histories(handle.sites)
    return {name: (h.amaxes, h.scale, h.seen, h.copy) for name, (h, _) in found.items()}


def put_scales(handle: Quantized, scales: Scales) -> None:
    """The inverse of `scales_of`, for the histories that are still there."""
    for name, (history, _) in histories(handle.sites).items():
        if name in scales:
            history.amaxes, history.scale, history.seen, history.copy = scales[name]


def synchronized(model: nn.Module, on: bool) -> AbstractContextManager[Any]:
    """Inside, a backward pass averages the gradients over the processes only if `on`."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if on else model.no_sync()
    sync: Callable[[bool], None] | None = getattr(model, "set_requires_gradient_sync", None)
    if sync is not None:  # fully_shard
        sync(on)
    return nullcontext()
