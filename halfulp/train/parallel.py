"""The processes of one run: DDP and FSDP2 under torchrun, and what they agree on."""

import gc
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from halfulp.errors import ConfigError, HalfulpError
from halfulp.train.config import TrainSection
from halfulp.train.model import layers_of

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """One process among `size`; `mode` is "single", "ddp" or "fsdp2"."""

    mode: str
    device: torch.device
    size: int = 1
    rank: int = 0

    @property
    def main(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """`values` added over all processes, in place, the same bits on each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` returns on process 0, given to all; its HalfulpError is raised on all."""
        if self.size == 1:
            return make()
        box: list[Any] = [None, None]
        if self.main:
            try:
                box[0] = make()
            except HalfulpError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0)
        if box[1] is not None:
            raise box[1]
        return cast(T, box[0])


@contextmanager
def open_world(train: TrainSection) -> Iterator[World]:
    """This process's place according to torchrun's environment; one process without it.

    A process group that is already open is used and left open.
    """
    device = device_of(train.device)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World("single", device)
        return
    opened = not dist.is_initialized()
    if opened:
        _join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(train.parallel, device, dist.get_world_size(), dist.get_rank())
    finally:
        if opened:
            # A reducer that is freed last would join gloo's threads while it holds the GIL.
            gc.collect()
            dist.destroy_process_group()


def share(model: nn.Module, world: World) -> nn.Module:
    """`model` as the processes train it: wrapped (ddp), sharded in place (fsdp2) or as it is."""
    if world.mode == "ddp":
        ids = [world.device.index] if world.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, forward_sync_buffers=False
        )
    if world.mode == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        # Nothing here writes into the logits in place, which is what this warns of.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(world.device.type, (world.size,))
        for module in (*layers_of(model), model):
            fully_shard(module, mesh=mesh)
    return model


class _Sharded(Protocol):
    def set_requires_gradient_sync(self, on: bool) -> None: ...
    def reshard(self) -> None: ...


def synchronized(model: nn.Module, world: World, on: bool) -> AbstractContextManager[None]:
    """Inside, a backward pass averages the gradients over the processes only if `on`."""
    if world.mode == "fsdp2":
        cast(_Sharded, model).set_requires_gradient_sync(on)
    elif world.mode == "ddp" and not on:
        return cast(nn.parallel.DistributedDataParallel, model).no_sync()  # pyright: ignore
    return nullcontext()


def settle(model: nn.Module, world: World) -> None:
    """After a forward pass without a backward one: `model`'s parameters are the sharded ones."""
    if world.mode == "fsdp2":
        cast(_Sharded, model).reshard()


def differing(named: Iterable[tuple[str, Tensor]], world: World) -> list[str]:
    """Names of the tensors whose bits are not the same on every process of ddp; collective."""
    if world.mode != "ddp":
        return []
    sums = {name: _sum_of_bits(tensor) for name, tensor in named}
    found = world.gather(sums)
    return [name for name in sums if any(other[name] != sums[name] for other in found)]


def _sum_of_bits(tensor: Tensor) -> int:
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().flatten()
    return int(flat.view(integers[tensor.element_size()]).sum(dtype=torch.int64))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a sharded one, on every process (a collective call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(full: Tensor, example: Tensor) -> Tensor:
    """`full` distributed as `example` is; every process must hold the same `full`."""
    full = full.to(example.device)
    if not isinstance(example, DTensor):
        return full
    mesh, placements = example.device_mesh, example.placements
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def part_of(part: Tensor, example: Tensor | None) -> Tensor:
    """The sharded tensor whose part on this process is `part`; `part` itself without an example."""
    if not isinstance(example, DTensor):
        return part
    return DTensor.from_local(
        part.to(example.device),
        example.device_mesh,
        example.placements,
        shape=example.shape,
        stride=example.stride(),
    )


def _join(backend: str) -> None:
    try:
        dist.init_process_group(backend)
    except (ValueError, dist.DistError) as error:
        raise ConfigError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several processes, which cannot meet: "
            f"{error}. Start them with: torchrun --nproc_per_node N -m halfulp train …, or unset "
            "WORLD_SIZE."
        ) from error


def device_of(asked: str) -> torch.device:
    """The device of this process for "auto", "cpu" or "cuda"; ConfigError where there is none."""
    if asked == "cpu" or (asked == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            "train.device = 'cuda', and this PyTorch sees no GPU. Use 'auto' or 'cpu'."
        )
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(device)
    return device
