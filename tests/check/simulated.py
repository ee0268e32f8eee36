"""Every elementary operation of a kernel, rounded to a format one at a time, in fp64 carriers.

Nothing here comes from halfulp: this is the low-precision program that the bounds speak of.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """p significant bits, smallest exponent, largest number."""

    bits: int
    smallest: int
    largest: float

    @property
    def u(self) -> float:
        return 2.0**-self.bits

    def __call__(self, x: Tensor) -> Tensor:
        """Nearest, ties to even; ±inf beyond the largest."""
        exponent = (torch.frexp(x)[1] - 1).clamp(min=self.smallest)
        step = torch.exp2((exponent - self.bits + 1).double())
        y = torch.round(x / step) * step
        return torch.where(y.abs() > self.largest, y.sign() * math.inf, y)


GRIDS = {
    "fp32": Grid(24, -126, (2 - 2.0**-23) * 2.0**127),
    "fp16": Grid(11, -14, 65504.0),
    "bf16": Grid(8, -126, (2 - 2.0**-7) * 2.0**127),
    "e4m3": Grid(4, -6, 448.0),
    "e5m2": Grid(3, -14, 57344.0),
}


def total(x: Tensor, fl: Grid) -> Tensor:
    """Sum over the last axis, first to last."""
    s = x[..., 0]
    for k in range(1, x.shape[-1]):
        s = fl(s + x[..., k])
    return s


def dot(a: Tensor, b: Tensor, fl: Grid) -> Tensor:
    return total(fl(a * b), fl)


def rms_norm(x: Tensor, gain: Tensor, eps: float, fl: Grid) -> Tensor:
    v = fl(fl(total(fl(x * x), fl) / x.shape[-1]) + eps)
    return fl(gain * fl(x / fl(v.sqrt())[..., None]))


def layer_norm(x: Tensor, gain: Tensor, bias: Tensor, eps: float, fl: Grid) -> Tensor:
    n = x.shape[-1]
    c = fl(x - fl(total(x, fl) / n)[..., None])
    v = fl(fl(total(fl(c * c), fl) / n) + eps)
    return fl(fl(gain * fl(c / fl(v.sqrt())[..., None])) + bias)


def softmax(x: Tensor, fl: Grid, *, shifted: bool) -> Tensor:
    z = fl(torch.exp(fl(x - x.amax(-1, keepdim=True)) if shifted else x))
    return fl(z / total(z, fl)[..., None])


def silu(x: Tensor, fl: Grid) -> Tensor:
    return fl(x / fl(1 + fl(torch.exp(-x))))


def gelu_tanh(x: Tensor, fl: Grid) -> Tensor:
    cube = fl(fl(x * x) * x)
    z = fl(math.sqrt(2 / math.pi) * fl(x + fl(0.044715 * cube)))
    return fl(fl(0.5 * x) * fl(1 + fl(torch.tanh(z))))


def attention(q: Tensor, k: Tensor, v: Tensor, fl: Grid, visible: Tensor) -> Tensor:
    """q, k, v [T, d]: every product, sum, exponential and division rounded."""
    s = dot(q[:, None, :], k[None, :, :], fl)
    s = fl(s * q.shape[-1] ** -0.5).masked_fill(~visible, -math.inf)
    p = softmax(s, fl, shifted=True)
    return dot(p[:, None, :], v.T[None, :, :], fl)
