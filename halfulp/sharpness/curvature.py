"""The diagonal of the curvature and the mean gradient at every weight, kept for forecasts."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, predict
from halfulp.errors import NonFiniteError
from halfulp.pieces import Piece, pieces
from halfulp.sharpness.first_order import gradients, traces


@dataclass(frozen=True)
class Curvature:
    """What the loss does at each weight of a model, by parameter name; fp32 unless weights are not.

    * `diagonal` h: the diagonal of the Gauss-Newton matrix of the mean loss, mean over the draws.
    * `gradient` g: of the mean loss with the true labels.
    * `traces` [draws, pieces] fp64: Σ h over each piece, per draw.
    """

    pieces: tuple[Piece, ...]
    diagonal: Mapping[str, Tensor]
    gradient: Mapping[str, Tensor]
    traces: Tensor
    loss_nats: float
    positions: int

    def rel_se(self, members: Sequence[int]) -> float:
        """Relative standard error of the summed trace of these pieces."""
        sums = self.traces[:, list(members)].sum(1)
        mean = sums.mean().item()
        return (sums.std() / len(sums) ** 0.5).item() / mean if mean else 0.0


def measure_curvature(
    model: nn.Module,
    batches: Sequence[Batch],
    *,
    draws: int,
    seed: int,
    hints: Mapping[str, str] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Curvature:
    """The curvature of `model` as it stands; one backward pass per draw, one per batch.

    Keeps two numbers per weight. Draws take the batches in turns. NonFiniteError for losses and
    gradients that are not finite.
    """
    named, parts = dict(model.named_parameters()), pieces(model, hints)
    parameters = list(named.values())
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    diagonal = [torch.zeros_like(p) for p in parameters]
    found = []
    at = {name: i for i, name in enumerate(named)}
    for grads, positions in gradients(model, batches, parameters, draws=draws, generator=generator):
        for h, g in zip(diagonal, grads, strict=True):
            h.addcmul_(g, g, value=positions / draws)
        found.append(traces([grads[at[p.parameter]] for p in parts], positions, parts))
        say(f"draw {len(found)} of {draws}")
    gradient, loss, positions = _true_gradient(model, batches, parameters)
    for name, h, g in zip(named, diagonal, gradient, strict=True):
        if not bool(torch.isfinite(h).all() and torch.isfinite(g).all()):
            raise NonFiniteError(
                f"the gradient of {name} is not finite: nothing can be forecast for it. Measure in "
                "fp32 (model.float()), or leave the batch out."
            )
    return Curvature(
        parts,
        dict(zip(named, diagonal, strict=True)),
        dict(zip(named, gradient, strict=True)),
        torch.stack(found),
        loss,
        positions,
    )


def _true_gradient(
    model: nn.Module, batches: Sequence[Batch], parameters: list[nn.Parameter]
) -> tuple[list[Tensor], float, int]:
    """(gradient of the mean loss over all positions, that loss, their number)."""
    total, loss, positions = [torch.zeros_like(p) for p in parameters], 0.0, 0
    for batch in batches:
        predictions = predict(model, batch)
        value = nn.functional.cross_entropy(
            predictions.logits_NV.float(), predictions.targets_N, reduction="sum"
        )
        grads = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
        for t, g in zip(total, grads, strict=True):
            t.add_(g)
        loss, positions = loss + value.item(), positions + len(predictions.targets_N)
    return [t.div_(positions) for t in total], loss / positions, positions


def loss_on(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The mean loss of the true labels in nats, over all positions of all batches.

    NonFiniteError where it is not finite.
    """
    total, positions = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            predictions = predict(model, batch)
            losses_N = nn.functional.cross_entropy(
                predictions.logits_NV.float(), predictions.targets_N, reduction="none"
            )
            total += losses_N.sum(dtype=torch.float64).item()
            positions += len(losses_N)
    if not math.isfinite(total):
        raise NonFiniteError(
            f"the loss of {positions} positions is {total / positions}: no change of it can be "
            "measured. Leave the batch out, or find its source with `halfulp check`."
        )
    return total / positions
