"""What two passes over the same batch have to do with each other, for any training loop."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from halfulp.guard.calls import put_scales, scales_of
from halfulp.guard.host import Pass
from halfulp.guard.units import Units
from halfulp.quantization import Quantized


def compared(
    found: Pass,
    units: Units,
    gradients: Sequence[tuple[str, Tensor]],
    kept: Sequence[Tensor],
    add: Callable[[Tensor], Tensor],
) -> Pass:
    """`found` with what separates its gradient from the kept one, unit by unit.

    `gradients` are (parameter, this process's part), `kept` those of the other pass in the same
    order; `add` sums [units, 3] over the processes that hold different parts.
    """
    device = gradients[0][1].device if gradients else torch.device("cpu")
    rows = torch.zeros(len(units.names), 3, dtype=torch.float64, device=device)
    for (name, new), old in zip(gradients, kept, strict=True):
        a, b = new.double(), old.double()
        three = torch.stack([(a - b).square().sum(), (a * b).sum(), b.square().sum()])
        rows[units.names.index(units.parameters[name])] += three
    differences, cosines = {}, {}
    for unit, (square, dot, old) in zip(units.names, add(rows).tolist(), strict=True):
        norm = found.units[unit] * math.sqrt(old) if old >= 0 else math.nan
        differences[unit] = math.sqrt(square) if square >= 0 else math.nan
        cosines[unit] = dot / norm if norm else 0.0
    return replace(found, differences=differences, cosines=cosines)


def outputs(model: nn.Module, forward: Callable[[], object]) -> dict[str, Tensor]:
    """The first output of every leaf module in the passes that `forward` makes, by module."""
    found: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable[..., None]:
        def hook(module: object, inputs: object, output: object) -> None:
            if isinstance(output, Tensor) and name not in found:
                found[name] = output.detach().clone()

        return hook

    leaves = [(n, m) for n, m in model.named_modules() if n and not list(m.children())]
    hooks = [module.register_forward_hook(keeper(name)) for name, module in leaves]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def differing(runs: Iterable[dict[str, Tensor]]) -> list[str]:
    """The modules whose outputs are not the same bits in two passes, in the order of the first."""
    first, second = runs
    return [name for name, value in first.items() if not torch.equal(value, second[name])]


@contextmanager
def untouched(model: nn.Module, handle: Quantized | None) -> Iterator[None]:
    """Gradients, scales, counters and buffers are as before after it; inside, nothing counts."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters]
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    scales, counting = scales_of(handle), handle is not None and handle.clock.counting
    for p in parameters:
        p.grad = None
    if handle is not None:
        handle.count(False)
    try:
        yield
    finally:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
        if handle is not None:
            put_scales(handle, scales)
            handle.count(counting)
