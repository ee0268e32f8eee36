"""Scales: how the elements that share one choose it, in torch ops (the definition).

A scale s multiplies x before rounding and its inverse multiplies the result, so that
y = Q(x · s) · (1/s). All rules start from the bits of amax = max |x| over the group:

* current: s = L / amax · 2^-margin, L the largest finite value of the format; at least 2^-128
  and a bit, where the inverse is still finite.
* p2: the largest power of two with s · amax ≤ L, times 2^-margin; from bits, never from log2.
* e8m0_up: s = 2^-E with E = ceil(log2(amax / L)): nothing is clamped (MXFP8 recipes, 2506.08027).
* e8m0_floor: E = floor(log2 amax) − floor(log2 L): OCP's rule; the top of the block may be clamped.
* nvfp4: two levels (Transformer Engine's reference): g = 2688 / amax(tensor); per block
  d = Q_e4m3(amax · g / 6) / g, s = 1/d, inverse = d.
* given: delayed and static scales come from outside.

A group of zeros has s = 1. A group that holds inf or NaN becomes NaN: loud, never hidden.
"""

import math

import torch
from torch import Tensor

from halfulp.numerics.format import get_format
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.rounding import round_definition

_MOST = 3.4028234663852886e38  # largest finite fp32
_LEAST = 2.0**-128 + 2.0**-149  # the smallest fp32 number whose inverse is finite
_EXPONENT = 0x7F800000
_E4M3 = get_format("e4m3")


def amax_bits(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Bits (int32) of max |x| over `dim`; NaN wins over inf, inf over numbers; of nothing, 0."""
    bits = x.contiguous().view(torch.int32) & 0x7FFFFFFF
    if not x.numel():
        return bits.sum(dim, keepdim=dim is not None, dtype=torch.int32)
    return bits.amax() if dim is None else bits.amax(dim, keepdim=True)


def scale_of(
    amax: Tensor, q: Quantizer, tensor_amax: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(s, 1/s) in fp32 for groups whose max |x| has the int32 bits `amax`.

    `tensor_amax`: bits of the whole tensor's amax, needed by nvfp4.
    """
    a = amax.view(torch.float32)
    if q.scale == "nvfp4":
        assert tensor_amax is not None
        up, down = _nvfp4(a, tensor_amax)
        amax = torch.where(tensor_amax >= _EXPONENT, tensor_amax, amax)
    elif q.scale in ("current", "delayed") and not q.power_of_two:
        up = divide(q.format.largest, a) * 2.0**-q.margin
        up = up.clamp(_LEAST, _MOST)
        down = divide(1.0, up)
    else:
        e = _e8m0_exponent(amax, q)
        up, down = _power(-e), _power(e)
    up, down = (torch.where(amax == 0, 1.0, t) for t in (up, down))
    bad = amax >= _EXPONENT
    return torch.where(bad, math.nan, up), torch.where(bad, math.nan, down)


def _nvfp4(a: Tensor, tensor_amax: Tensor) -> tuple[Tensor, Tensor]:
    """The order of operations is the contract: it is Transformer Engine's, bit for bit."""
    g = divide(2688.0, tensor_amax.view(torch.float32))
    g = torch.where(tensor_amax == 0, 1.0, torch.where(g < _MOST, g, _MOST))
    block = round_definition(a * (g * (1.0 / 6.0)), _E4M3, "nearest", True, None)
    down = block * divide(1.0, g)
    up = divide(1.0, down)
    return torch.where(up < _MOST, up, _MOST), down


def divide(number: float, x: Tensor) -> Tensor:
    """`number` / x for an fp32 number and tensor, rounded once, everywhere.

    torch computes `number / x` as 1/x times number, and Triton approximates fp32 divisions. A
    quotient of fp32 numbers rounded to fp64 is never so close to a tie that a second rounding errs.
    """
    return (torch.full_like(x, number, dtype=torch.float64) / x.double()).float()


def _e8m0_exponent(amax: Tensor, q: Quantizer) -> Tensor:
    # In plain numbers: reading them off a tensor would break a traced graph.
    top = q.format.largest_exponent
    fraction = int((q.format.largest / 2.0**top - 1) * 2**23)
    e = (amax >> 23) - (top + 127)
    if q.scale != "e8m0_floor":
        e = e + ((amax & 0x7FFFFF) > fraction).to(torch.int32)
    e = e.clamp(-127, 127)
    return (e + q.margin).clamp(max=127) if q.power_of_two else e


def _power(e: Tensor) -> Tensor:
    """2^e, exactly, for int32 e in [-149, 127]."""
    subnormal = torch.ones_like(e) << ((e + 149) & 31)
    return torch.where(e >= -126, (e + 127) << 23, subnormal).view(torch.float32)
