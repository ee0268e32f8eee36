"""What a quantizer did to a tensor, in numbers: saturation, underflow, amax.

Definitions (per call, over all elements of the operand):

* saturated: share of elements with |x| · s > L (1 + 2^-20), s the scale and L the largest finite
  value; the margin leaves out the rounding of s itself.
* underflow: share of the nonzero elements that became zero.
* energy: Σ x².
* underflow_energy: the share of these elements in it.
* amax: max |x|.
"""

import torch
from torch import Tensor

from halfulp.numerics import kernel
from halfulp.numerics.apply import scales
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.rounding import use_c

NAMES = ("n", "saturated", "nonzero", "underflow", "energy", "lost_energy", "amax")


def quantizer_statistics(x: Tensor, y: Tensor, q: Quantizer, scale: Tensor | None = None) -> Tensor:
    """Sums behind the counters, fp64 [7] in the order of `NAMES`, without a host sync.

    `x`: the operand; `y`: what `apply_quantizer` made of it; `scale`: of a delayed quantizer.
    """
    if x.numel() == 0:
        return torch.zeros(len(NAMES), dtype=torch.float64, device=x.device)
    x = hadamard(x, q.hadamard) if q.hadamard else x
    if use_c(x, y) and x.is_contiguous():
        return _sums_c(x, y, q, scale)
    magnitude = x.abs()
    s = scales(x, q, scale)[0] if q.scale != "none" else 1.0
    beyond = (magnitude * s > _limit(q)).sum()
    nonzero = torch.count_nonzero(x)
    # A dropped element differs from y by all of itself, and y is zero there.
    dropped = torch.where(y == 0, x, 0.0)
    norms = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in (x, dropped))
    energy, lost = (norm.square() for norm in norms)
    sums = [torch.full_like(nonzero, x.numel()), beyond, nonzero, torch.count_nonzero(dropped)]
    return torch.stack([*(t.double() for t in sums), energy, lost, magnitude.amax().double()])


def _limit(q: Quantizer) -> float:
    return q.format.largest * (1 + 2.0**-20)


_CHUNK = 16384  # CHUNK of count.c


def _sums_c(x: Tensor, y: Tensor, q: Quantizer, scale: Tensor | None) -> Tensor:
    """As above, by count.c: one pass for the sums, and one for the scales of tiles."""
    status = kernel.status()
    assert status.library is not None
    tiles = q.scale not in ("none", "delayed", "static") and q.granularity != "tensor"
    s = 0.0 if tiles else (1.0 if q.scale == "none" else scales(x, q, scale)[0].item())
    parts = torch.empty(-(-x.numel() // _CHUNK), len(NAMES) - 1, dtype=torch.float64)
    pointers = status.parallel, x.data_ptr()
    status.library.halfulp_count(*pointers, y.data_ptr(), x.numel(), s, _limit(q), parts.data_ptr())
    sums = torch.empty(len(NAMES), dtype=torch.float64)
    sums[0], sums[1:-1], sums[-1] = x.numel(), parts[:, :-1].sum(0), parts[:, -1].amax()
    if tiles:
        rule = "p2" if q.power_of_two else q.scale
        plan = kernel.plan(q.format, q.rounding, True, rule, q.margin, q.tile)
        shape = x.numel() // x.shape[-1], x.shape[-1]
        amax = sums[-1].float().view(torch.int32).item()
        sums[1] = status.library.halfulp_beyond(*pointers, *shape, plan, amax, _limit(q))
    return sums


def merge(a: Tensor, b: Tensor) -> Tensor:
    """The statistics of two calls together: sums, and the larger amax."""
    return torch.cat([a[:-1] + b[:-1], torch.maximum(a[-1:], b[-1:])])


def shares(sums: Tensor) -> dict[str, float]:
    """The counters as the table of this module's docstring defines them."""
    n, saturated, nonzero, dropped, energy, lost, amax = sums.tolist()
    return {
        "n": n,
        "saturated": saturated / max(n, 1.0),
        "underflow": dropped / max(nonzero, 1.0),
        "energy": energy,
        "underflow_energy": lost / energy if energy else 0.0,
        "amax": amax,
    }
