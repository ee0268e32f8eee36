"""The processes that torch.distributed has joined, and what each of them holds."""

from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

T = TypeVar("T")


def joined() -> bool:
    """Whether there are processes to speak with."""
    return dist.is_available() and dist.is_initialized()


def count() -> int:
    """How many processes there are; 1 where none has been joined."""
    return dist.get_world_size() if joined() else 1


def is_main() -> bool:
    """Whether this is the first process, or the only one."""
    return not joined() or dist.get_rank() == 0


def gathered(value: T) -> list[T]:
    """`value` of every process, in the order of their ranks (a collective call)."""
    if count() == 1:
        return [value]
    parts: list[Any] = [None] * count()
    dist.all_gather_object(parts, value)
    return parts


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, sharing its memory; other tensors as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
