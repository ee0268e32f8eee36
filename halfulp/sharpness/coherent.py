"""The curvature along one direction, cross terms included: errors that move together.

Gains of norms sit near 1, so that rounding moves them the same way; the diagonal of the curvature
knows nothing of that. The quadratic form of the Gauss-Newton matrix G of the mean loss does:
½ δᵀGδ = mean over positions of ½ Var_p(Jδ), J the Jacobian of the logits and p their softmax.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, predict
from halfulp.sharpness.weights import Weights

_REACH = 2.0**-7
"""‖step‖ / ‖weights‖: the round-off of fp32 logits and the third derivative both stay below 1 %."""


def quadratic_form(
    model: nn.Module, batches: Sequence[Batch], weights: Weights, direction: Mapping[str, Tensor]
) -> float:
    """½ δᵀGδ for δ = `direction` (parameter → δ, the others stand still), in nats.

    Jδ by a central difference of the logits: two forward passes per batch, of any attention kernel.
    Parameters are bit for bit what they were afterwards.
    """
    size = _norm(direction.values())
    if size == 0.0:
        return 0.0
    reach = _norm(weights.tensors[name].detach() for name in direction)
    step = _REACH * (reach or size) / size
    total, positions = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            up = _logits(model, batch, weights, direction, step)
            down = _logits(model, batch, weights, direction, -step)
            change_NV = (up - down) / (2 * step)
            p_NV = ((up + down) / 2).softmax(-1)
            mean_N1 = (p_NV * change_NV).sum(-1, keepdim=True)
            total += (p_NV * (change_NV - mean_N1).square()).sum(dtype=torch.float64).item() / 2
            positions += len(up)
    return total / positions


def _logits(
    model: nn.Module, batch: Batch, weights: Weights, direction: Mapping[str, Tensor], step: float
) -> Tensor:
    """The logits [N, V] with the weights moved by step · δ."""
    kept = {name: weights.tensors[name].detach().clone() for name in direction}
    try:
        for name, delta in direction.items():
            weights.tensors[name].detach().add_(delta, alpha=step)
        return predict(model, batch).logits_NV
    finally:
        for name, before in kept.items():
            weights.tensors[name].detach().copy_(before)


def _norm(tensors) -> float:
    return sum(torch.linalg.vector_norm(t).double().item() ** 2 for t in tensors) ** 0.5
