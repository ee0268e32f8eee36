"""Sharpness for nothing: the spread of the gradients of micro-batches, in one's own loop.

A micro-batch of b positions has a gradient g with E ‖g‖² = ‖μ‖² + tr Σ / b, where μ is the mean
gradient and Σ the covariance over positions; the average of A of them has tr Σ / (A b). The
difference gives tr Σ without another pass. With true labels Σ is the Fisher of the data and not of
the model: late in training it is close to the Gauss-Newton matrix up to one common factor.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from halfulp.errors import CheckError, ConfigError
from halfulp.pieces import pieces
from halfulp.sharpness.report import Row, SharpnessReport

CALIBRATED_FROM = 0.1  # of the run
_RELATIVE = (
    "Compare blocks only: true labels make every value larger than the Gauss-Newton one, by a "
    "factor that the blocks share once the first fifth of a run is over."
)


def noise_trace(micro: Tensor, average: Tensor, positions: Sequence[float]) -> Tensor:
    """Unbiased tr Σ [pieces] of the gradient of one position.

    `micro` [A, pieces]: squared norms of the gradients of the mean loss of A ≥ 2 micro-batches of
    `positions` each; `average` [pieces]: of the average of these gradients. May be negative.
    """
    count = len(micro)
    inverse = sum(1 / n for n in positions) / count
    return (micro.mean(0) - average) / (inverse * (1 - 1 / count))


class SharpnessMonitor:
    """Watches the gradients of a model that is trained with several micro-batches per step.

    Call `on_microbatch(positions)` after each backward pass and `on_step()` after the last one,
    before gradients are clipped or unscaled. It costs a norm of each gradient per micro-batch and
    no pass. `model` may be a DistributedDataParallel, whose processes are micro-batches as well.
    `total_steps` lets it say when a run is too young for the result to mean anything.

    CheckError for sharded parameters (fsdp): measure those with `halfulp train` or
    `halfulp.sharpness`.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        total_steps: int | None = None,
        window: int = 32,
        hints: Mapping[str, str] | None = None,
    ) -> None:
        if window < 2:
            raise ConfigError(f"window = {window} steps give no standard error. Give 2 or more.")
        self._shared = isinstance(model, nn.parallel.DistributedDataParallel)
        self._model = cast(nn.Module, model.module) if self._shared else model
        named = dict(self._model.named_parameters())
        if any(isinstance(p, DTensor) for p in named.values()):
            raise CheckError(
                "the model's parameters are sharded, and each process sees a part of a gradient. "
                "Use the measurement of `halfulp train`, or halfulp.sharpness on the whole model."
            )
        self._pieces = pieces(self._model, hints)
        self._parameters = [named[p.parameter] for p in self._pieces]
        self._total_steps = total_steps
        self._traces: deque[Tensor] = deque(maxlen=window)
        self._steps = 0
        self._norms: dict[int, Tensor] = {}  # of the backward pass, by piece
        self._micro: list[Tensor] = []
        self._positions: list[float] = []
        self._size = 0
        self._hooks = [
            p.register_hook(self._hook(i))
            for i, p in enumerate(self._parameters)
            if p.requires_grad
        ]

    def on_microbatch(self, positions: int) -> None:
        """After the backward pass of a micro-batch with `positions` predictions."""
        if not self._norms:
            raise CheckError(
                "no gradient has reached the model since the last micro-batch. Call "
                "on_microbatch after loss.backward()."
            )
        if not 0 < positions < math.inf:
            raise CheckError(f"positions = {positions} are none. Give the predictions that count.")
        self._micro.append(self._stack(self._norms))
        self._positions.append(float(positions))
        self._norms = {}

    def on_step(self, *, weight: float | None = None) -> None:
        """After the step's last micro-batch, while `.grad` holds the sum of their gradients.

        `weight`: what the mean loss of a micro-batch was multiplied by before backward();
        1 / accumulate unless it is given. A loss scale belongs in it.
        """
        count = len(self._micro)
        if self._norms or not count:
            raise CheckError(
                "a backward pass was not followed by on_microbatch, or there was none. Call it "
                "after each loss.backward()."
            )
        weight = 1 / count if weight is None else weight
        if not 0 < weight < math.inf:
            raise CheckError(
                f"weight = {weight} is no factor of a loss. Give what the mean loss of a "
                "micro-batch was multiplied by."
            )
        micro = torch.stack(self._micro) / weight**2
        summed = self._stack(
            {
                i: torch.linalg.vector_norm(piece.of(p.grad))
                for i, (piece, p) in enumerate(zip(self._pieces, self._parameters, strict=True))
                if p.grad is not None
            }
        )
        positions = self._positions
        self._micro, self._positions = [], []
        if self._shared:
            micro, positions = _gathered(micro, positions)
        if len(micro) < 2:
            raise CheckError(
                "one micro-batch per step has no spread. Accumulate gradients over two or more, "
                "or measure with halfulp.sharpness."
            )
        self._traces.append(noise_trace(micro, summed / (weight * count) ** 2, positions))
        self._steps += 1
        self._size = round(sum(positions))

    @property
    def calibrated(self) -> bool | None:
        """Whether the blocks can be compared yet; None where the length of the run is unknown."""
        if self._total_steps is None:
            return None
        return self._steps >= CALIBRATED_FROM * self._total_steps

    def report(self) -> SharpnessReport:
        """The traces of the last `window` steps; their scatter is the standard error."""
        if not self._traces:
            raise CheckError("no step has been watched yet. Call on_step first.")
        notes = [_RELATIVE]
        if self.calibrated is False:
            notes.append(
                f"Not calibrated: step {self._steps} of {self._total_steps}. Before "
                f"{CALIBRATED_FROM:.0%} of a run the blocks cannot be compared."
            )
        return SharpnessReport(
            model=type(self._model).__name__, estimator="noise", pieces=self._pieces,
            traces=torch.stack(list(self._traces)).cpu(), positions=self._size,
            loss_nats=float("nan"), seed=0, cost_steps=0.0, notes=tuple(notes),
        )  # fmt: skip

    def rows(self, by: str = "type") -> tuple[Row, ...]:
        """One row per block "type", "block" or "tensor"."""
        return self.report().rows(by)

    def state_dict(self) -> dict[str, Any]:
        """What continues the window in another process."""
        return {"steps": self._steps, "positions": self._size, "traces": list(self._traces)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._steps, self._size = state["steps"], state["positions"]
        self._traces = deque(state["traces"], maxlen=self._traces.maxlen)

    def close(self) -> None:
        """Leave the model alone."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _hook(self, index: int):
        piece = self._pieces[index]

        # On a leaf the hook sees the sum over all uses of this backward pass, not yet added up.
        def keep(gradient: Tensor) -> None:
            self._norms[index] = torch.linalg.vector_norm(piece.of(gradient))

        return keep

    def _stack(self, norms: Mapping[int, Tensor]) -> Tensor:
        """Squares [pieces], fp64; 0 where there is no gradient."""
        zero = torch.zeros((), device=self._parameters[0].device)
        return torch.stack([norms.get(i, zero).double() for i in range(len(self._pieces))]).square()


def _gathered(micro: Tensor, positions: list[float]) -> tuple[Tensor, list[float]]:
    """The micro-batches of all processes."""
    size = dist.get_world_size()
    parts = [torch.empty_like(micro) for _ in range(size)]
    dist.all_gather(parts, micro.contiguous())
    counts: list[Any] = [None] * size
    dist.all_gather_object(counts, positions)
    return torch.cat(parts), [n for part in counts for n in part]
