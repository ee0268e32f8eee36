"""Sharpness from gradients alone: Gauss-Newton-Bartlett and the mini-batch empirical Fisher.

With labels ŷ sampled from the model's own distribution and L̂ the mean loss over B positions,
B ‖∇_b L̂‖² is an unbiased estimate of the trace of the block's Gauss-Newton matrix (Liu et al.,
Sophia, arXiv:2305.14342, §2.3; Wang et al., arXiv:2502.19002, eq. 1). With the true labels it is
the empirical Fisher, which is not invariant to B: it adds B ‖E g‖².
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, Predictions, predict
from halfulp.errors import NonFiniteError
from halfulp.pieces import Piece


def sampled_labels(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row, drawn from softmax(logits) by inverting its distribution in fp32."""
    below_NV = logits_NV.detach().float().softmax(-1).cumsum(-1)
    draw = torch.rand(len(below_NV), 1, generator=generator, device=generator.device)
    # The last sum is 1 up to rounding; scaling by it keeps every draw inside.
    at = draw.to(below_NV.device) * below_NV[:, -1:]
    return (
        torch.searchsorted(below_NV, at, right=True).squeeze(-1).clamp_(max=below_NV.shape[1] - 1)
    )


def gradients(
    model: nn.Module,
    batches: Sequence[Batch],
    parameters: Sequence[nn.Parameter],
    *,
    draws: int,
    generator: torch.Generator,
    sampled: bool = True,
) -> Iterator[tuple[list[Tensor], int]]:
    """(gradients of the mean loss, number B of positions) of each of `draws` draws.

    Batches take turns; those drawn from several times run forward once. `sampled`: labels come
    from the model, else they are the true ones. `.grad` and the global random state are untouched.
    NonFiniteError for a batch whose loss is not finite.
    """
    turns = [range(i, draws, len(batches)) for i in range(len(batches))]
    for batch, turn in zip(batches, turns, strict=True):
        if not turn:
            continue
        predictions = predict(model, batch)
        for n in turn:
            loss = _loss(predictions, generator, sampled=sampled)
            more = n != turn[-1]
            grads = torch.autograd.grad(
                loss, parameters, retain_graph=more, allow_unused=True, materialize_grads=True
            )
            yield list(grads), len(predictions.targets_N)


def _loss(predictions: Predictions, generator: torch.Generator, *, sampled: bool) -> Tensor:
    logits_NV, labels_N = predictions.logits_NV, predictions.targets_N
    if sampled:
        labels_N = sampled_labels(logits_NV, generator)
    loss = nn.functional.cross_entropy(logits_NV.float(), labels_N)
    if not bool(torch.isfinite(loss)):
        raise NonFiniteError(
            f"the loss of a batch of {len(labels_N)} positions is {loss.item()}: no curvature can "
            "be measured there. Leave the batch out, or find its source with `halfulp check`."
        )
    return loss


def traces(gradients: Sequence[Tensor], positions: int, pieces: Sequence[Piece]) -> Tensor:
    """B ‖∇‖² of each piece [pieces], fp64; `gradients` of its parameter, one per piece."""
    norms = [torch.linalg.vector_norm(p.of(g)) for p, g in zip(pieces, gradients, strict=True)]
    return positions * torch.stack(norms).double().square().cpu()
