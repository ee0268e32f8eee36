"""What a step of one's own loop changes: copies of it, and the way back."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.processes import local

# In a group of the optimizer: what neither schedulers nor users change, or the guard itself does.
_OWN = ("params", "names", "param_names", "weight", "update_rounding", "moment_m", "moment_v")


def model_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def optimizer_states(optimizer: torch.optim.Optimizer | None) -> Iterator[tuple[str, Any]]:
    """The states of all parameters by "group.place/key"."""
    for i, group in enumerate(optimizer.param_groups if optimizer else ()):
        for j, p in enumerate(group["params"]):
            assert optimizer is not None
            for key, value in optimizer.state.get(p, {}).items():
                yield f"{i}.{j}/{key}", value


def plain_groups(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    """What schedulers and users change in the groups; not the guard's own storage formats."""
    groups = optimizer.param_groups if optimizer else ()
    return [{k: copy.deepcopy(v) for k, v in group.items() if k not in _OWN} for group in groups]


def on_cpu(tensor: Tensor) -> Tensor:
    """A copy; from a GPU into pinned memory, in the order of its stream."""
    if tensor.device.type != "cuda":
        return tensor.detach().to("cpu", copy=True)
    copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return copied.copy_(tensor.detach(), non_blocking=True)


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `model_tensors` gave, under "model/"."""
    for name, tensor in model_tensors(model):
        local(tensor).copy_(tensors[f"model/{name}"])


def restore_optimizer(
    optimizer: torch.optim.Optimizer | None,
    states: Mapping[str, Any],
    groups: list[dict[str, Any]],
    *,
    scheduled: bool,
) -> None:
    """Put back what `optimizer_states` and `plain_groups` gave, the first under "optimizer/".

    Learning rates go back only where they are `scheduled`.
    """
    if optimizer is None:
        return
    for i, (group, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        group.update({k: copy.deepcopy(v) for k, v in saved.items() if k != "lr" or scheduled})
        for j, p in enumerate(group["params"]):
            _restore_state(optimizer.state, p, f"optimizer/{i}.{j}/", states)


def _restore_state(into: Any, p: Tensor, path: str, states: Mapping[str, Any]) -> None:
    saved = {k[len(path) :]: v for k, v in states.items() if k.startswith(path)}
    if not saved:
        into.pop(p, None)  # before its first update
        return
    for key, value in saved.items():
        if isinstance(value, Tensor):
            local(into[p][key]).copy_(value)
        else:
            into[p][key] = copy.deepcopy(value)


def is_loader(o: object) -> bool:
    """Whether an object gives batches, and not only state."""
    return hasattr(o, "__iter__")
