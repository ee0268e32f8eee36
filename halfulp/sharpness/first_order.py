"""Sharpness from gradients alone: Gauss-Newton-Bartlett and the mini-batch empirical Fisher.

With labels ŷ sampled from the model's own distribution and L̂ the mean loss over B positions,
B ‖∇_b L̂‖² is an unbiased estimate of the trace of the block's Gauss-Newton matrix (Liu et al.,
Sophia, arXiv:2305.14342, §2.3; Wang et al., arXiv:2502.19002, eq. 1). With the true labels it is
the empirical Fisher, which is not invariant to B: it adds B ‖E g‖².
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, predict
from halfulp.errors import NonFiniteError
from halfulp.pieces import Piece
from halfulp.sharpness.sampling import LabelSampler
from halfulp.sharpness.setup import is_compiled


def sampled_labels(logits_NV: Tensor, generator: torch.Generator) -> Tensor:
    """One label per row, drawn from softmax(logits) by inverting its distribution."""
    return LabelSampler(log_probabilities(logits_NV.detach())).draw(generator)


def log_probabilities(logits_NV: Tensor) -> Tensor:
    """log softmax of the logits, in fp32 at least."""
    wide = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    return wide.log_softmax(-1)


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

    Batches take turns; those drawn from several times run forward once, but a compiled model, whose
    graph lasts for one backward pass, each time. `sampled`: labels come from the model, else they
    are the true ones. `.grad` and the global random state are untouched.
    NonFiniteError for a batch whose loss is not finite.
    """
    shared = not is_compiled(model)
    for batch, count in turns(batches, draws):
        for n in (count,) if shared else (1,) * count:
            predictions = predict(model, batch)
            log_p_NV, labels_N = log_probabilities(predictions.logits_NV), predictions.targets_N
            sampler = LabelSampler(log_p_NV) if sampled else None
            for left in reversed(range(n)):
                loss = mean_loss(log_p_NV, sampler.draw(generator) if sampler else labels_N)
                found = torch.autograd.grad(
                    loss, parameters, retain_graph=left > 0,
                    allow_unused=True, materialize_grads=True,
                )  # fmt: skip
                yield list(found), len(labels_N)


def turns(batches: Sequence[Batch], draws: int) -> list[tuple[Batch, int]]:
    """The batches that `draws` draws in turns use, each with the number of its draws."""
    counts = [len(range(i, draws, len(batches))) for i in range(len(batches))]
    return [(batch, n) for batch, n in zip(batches, counts, strict=True) if n]


def mean_loss(log_p_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Mean loss in nats of `labels_N`; NonFiniteError where it is not finite."""
    loss = nn.functional.nll_loss(log_p_NV, labels_N)
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
