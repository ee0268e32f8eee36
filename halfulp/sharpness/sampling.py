"""Labels drawn from a model's own distribution, fast enough for one set per backward pass.

Inverting the distribution of every row costs a softmax and a running sum over the vocabulary. The
sums of runs of 64 probabilities do instead: they are made once for all draws, and a draw inverts
them first and the 64 probabilities of the run that it hit second.
"""

import torch
from torch import Tensor

_RUN = 64
_CHUNK = 1 << 20  # probabilities at a time: they stay in the cache


class LabelSampler:
    """Draws one label per row of log probabilities [N, V]; keeps [N, V / 64] numbers."""

    def __init__(self, log_p_NV: Tensor):
        self.log_p_NV = log_p_NV.detach()
        self.sums_NR = _run_sums(self.log_p_NV)

    def draw(self, generator: torch.Generator) -> Tensor:
        """Labels [N], int64; two uniform numbers a row are taken from `generator`."""
        vocab = self.log_p_NV.shape[1]
        run_N1 = _invert(self.sums_NR, generator)
        at = run_N1 * _RUN + torch.arange(_RUN, device=run_N1.device)
        p = self.log_p_NV.gather(1, at.clamp(max=vocab - 1)).exp_().masked_fill_(at >= vocab, 0.0)
        # Rows that are not finite give the last index of all, for the loss to find.
        return (run_N1 * _RUN + _invert(p, generator)).squeeze(1).clamp_(max=vocab - 1)


def _run_sums(log_p_NV: Tensor) -> Tensor:
    rows, vocab = log_p_NV.shape
    full = vocab // _RUN
    sums = log_p_NV.new_empty(rows, -(-vocab // _RUN))
    step = max(1, _CHUNK // vocab)
    for i in range(0, rows, step):
        p = log_p_NV[i : i + step].exp()
        torch.sum(p[:, : full * _RUN].unflatten(1, (full, _RUN)), -1, out=sums[i : i + step, :full])
        sums[i : i + step, full:] = p[:, full * _RUN :].sum(-1, keepdim=True)
    return sums


def _invert(weights: Tensor, generator: torch.Generator) -> Tensor:
    """A column [N, 1] of indices, drawn in proportion to the weights of each row."""
    below = weights.cumsum(-1)
    draw = torch.rand(len(below), 1, generator=generator, device=generator.device)
    # Scaling by the last sum, which is not exactly 1, keeps every draw inside.
    at = draw.to(below) * below[:, -1:]
    return torch.searchsorted(below, at, right=True).clamp_(max=weights.shape[1] - 1)
