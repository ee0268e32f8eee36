"""Where a loss or gradient stopped being finite."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfulp.block_names import block_type, layer_of
from halfulp.processes import local
from halfulp.train.parallel import World

# The backward pass reaches the blocks of a layer in this order.
_WITHIN = ("ffn", "vo", "qk", "norm")


@dataclass(frozen=True)
class Place:
    """The block, and the parameter or module in it; both empty if every single one was finite."""

    block: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.block} ({self.name})" if self.block else "no single block"


def in_gradients(model: nn.Module, blocks: Mapping[str, str], world: World) -> Place:
    """The non-finite gradient nearest to the loss: where the backward pass met it first.

    `blocks` gives each parameter's block. The same answer on every process.
    """
    named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    flags = torch.tensor([_broken(local(g)) for _, g in named], dtype=torch.float32)
    world.sum(flags := flags.to(world.device))
    found = [name for (name, _), flag in zip(named, flags.tolist(), strict=True) if flag]
    if not found:
        return Place()
    order = {name: i for i, (name, _) in enumerate(named)}
    first = min(found, key=lambda name: (_way_back(blocks.get(name, "")), -order[name]))
    return Place(blocks.get(first, first), first)


@contextmanager
def watched(model: nn.Module, blocks: Mapping[str, str]) -> Iterator[list[Place]]:
    """A list that receives the places of non-finite module outputs, in the order they happen."""
    places: list[Place] = []
    hooks = [
        module.register_forward_hook(_watcher(name, blocks, places))
        for name, module in model.named_modules()
        if name and not any(True for _ in module.children())
    ]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield places
    finally:
        for hook in hooks:
            hook.remove()


def _watcher(name: str, blocks: Mapping[str, str], places: list[Place]):
    inside = [block for fqn, block in blocks.items() if fqn.startswith(f"{name}.")]

    def hook(module: nn.Module, inputs: object, output: object) -> None:
        if isinstance(output, Tensor) and _broken(local(output)):
            places.append(Place(inside[0] if inside else name, name))

    return hook


def _broken(tensor: Tensor) -> bool:
    return not bool(torch.isfinite(tensor).all())


def _way_back(block: str) -> tuple[int, int]:
    """Sort key of a block: how early the backward pass reaches it."""
    layer, kind = layer_of(block), block_type(block)
    if layer is None:
        return (1, 0) if kind == "emb" else (-(1 << 30), 0 if kind == "head" else 1)
    return -layer, _WITHIN.index(kind) if kind in _WITHIN else len(_WITHIN)
