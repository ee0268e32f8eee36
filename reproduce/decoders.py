"""Random single-head decoders run in fp32 and fp64 side by side, many at once: the study's v1."""

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 20  # channels, tokens and hidden units of the feed-forward part alike
LAYERS = 40


@dataclass(frozen=True)
class Depths:
    """Errors: `linf` ‖d‖∞/‖x‖∞ after each block [L, models], over all tokens and channels; `comp`
    |d_i|/|x_i| of the last block [models, T·d].
    """

    linf: Tensor
    comp: Tensor


@torch.no_grad()
def run(
    sigma: float, *, qk: float = 1.0, precise_attention: bool = False, count: int = 1000
) -> Depths:
    """`count` decoders with weights N(0, sigma²/d), those of queries and keys times `qk`.

    `precise_attention`: queries, keys, scores and softmax of the fp32 run are computed in fp64.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float = 1.0) -> Tensor:
        w = torch.randn(count, WIDTH, WIDTH, generator=generator)
        return (w * (scale * sigma / WIDTH**0.5)).double()

    low = torch.randn(count, WIDTH, WIDTH, generator=generator)
    x, linf, d = low.double(), [], torch.empty(0)
    for _ in range(LAYERS):
        weights = [draw(qk), draw(qk), *(draw() for _ in range(4))]
        x, low = _block(x, weights), _block(low, weights, precise_attention)
        d = (low.double() - x).abs()
        linf.append(d.amax((1, 2)) / x.abs().amax((1, 2)))
    return Depths(torch.stack(linf), (d / x.abs()).flatten(1))


def _block(x: Tensor, weights: list[Tensor], precise: bool = False) -> Tensor:
    """x + attention(N(x)), then x + relu feed-forward(N(x)), in the dtype of x."""
    q, k, *others = weights
    v, o, up, down = (w.to(x.dtype) for w in others)
    y = _norm(x)
    wide = torch.float64 if precise else x.dtype
    q, k = y.to(wide) @ q.to(wide), y.to(wide) @ k.to(wide)
    hidden = torch.ones(WIDTH, WIDTH, dtype=torch.bool).triu(1)
    p = (q @ k.mT / WIDTH**0.5).masked_fill(hidden, -torch.inf).softmax(-1).to(x.dtype)
    x = x + p @ (y @ v) @ o
    return x + torch.relu(_norm(x) @ up) @ down


def _norm(x: Tensor) -> Tensor:
    c = x - x.mean(-1, keepdim=True)
    return c / c.square().mean(-1, keepdim=True).sqrt()
