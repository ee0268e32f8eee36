"""The numbers that the guard judges a step of one's own loop by, over all processes."""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halfulp.guard.host import Pass
from halfulp.guard.units import Units, UnitSums
from halfulp.processes import joined, local


class Measure:
    """Norms of the gradients and matrices of `model`, unit by unit."""

    def __init__(self, model: nn.Module, units: Units) -> None:
        self.model, self.units, self._sums = model, units, UnitSums(units)

    def gradients(self) -> list[tuple[str, Tensor]]:
        """This process's part of every gradient that is there, by parameter."""
        named = self.model.named_parameters()
        return [(name, local(p.grad)) for name, p in named if p.grad is not None]

    def values(self, loss: Tensor) -> Tensor:
        """[loss, squares of the gradient norm of each unit and of all, of each matrix's norm].

        fp64, over all processes.
        """
        named, matrices = self.gradients(), [local(p.detach()) for _, p in self._matrices()]
        device = next(self.model.parameters()).device
        squares = torch.zeros(len(self.units.names), dtype=torch.float64, device=device)
        if named:
            squares = self._sums.add([n for n, _ in named], _norms([g for _, g in named]).square())
        weights = _norms(matrices).square() if matrices else squares[:0]
        loss = loss.detach().double().reshape(1).to(device)
        return self.over_processes(torch.cat([loss, squares, squares.sum().reshape(1), weights]))

    def over_processes(self, values: Tensor) -> Tensor:
        """The mean of the first value, and sums of squares of the others over whole tensors."""
        if not joined():
            return values
        size = dist.get_world_size()
        if any(isinstance(p, DTensor) for p in self.model.parameters()):
            values[0] /= size
        else:  # each process has whole tensors
            values /= size
        dist.all_reduce(values)
        return values

    def add(self, rows: Tensor) -> Tensor:
        """Sums of squares [units, 3] over whole tensors."""
        values = torch.cat([rows.new_zeros(1), rows.flatten()])
        return self.over_processes(values)[1:].view(rows.shape)

    def as_pass(self, values: Tensor | Sequence[float]) -> Pass:
        """What `values` gave, on the host."""
        numbers = values.tolist() if isinstance(values, Tensor) else list(values)
        loss, *squares = numbers
        roots = [math.sqrt(s) if s >= 0 else math.nan for s in squares]
        count = len(self.units.names)
        names = [name for name, _ in self._matrices()]
        return Pass(
            loss,
            roots[count],
            dict(zip(self.units.names, roots[:count], strict=True)),
            weights=dict(zip(names, roots[count + 1 :], strict=True)),
        )

    def _matrices(self) -> list[tuple[str, Tensor]]:
        named = self.model.named_parameters()
        return [(name, p) for name, p in named if p.ndim >= 2 and p.requires_grad]


def _norms(tensors: list[Tensor]) -> Tensor:
    """The norm of each tensor, fp64, from sums in fp32 or better."""
    narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    dtype = torch.float32 if narrow else None
    each = torch._foreach_norm(tensors, 2, dtype)  # pyright: ignore
    return torch.stack(list(each)).double()
