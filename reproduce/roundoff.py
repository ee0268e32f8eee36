"""Round-off of random decoders and of single operations: what grows, and what is stable.

Set-up. Random models are those of the study: single-head decoders with LayerNorm, a residual stream
and a ReLU feed-forward part, 20 channels, 20 tokens, 40 blocks, fp32 against fp64; 1000 of them,
intervals over 8 groups. The other claims are about single operations: 8 draws of random inputs.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from halfulp.check import bounds
from halfulp.check.profile import log_slope
from reproduce import decoders
from reproduce.common import (
    REFUTED,
    REPRODUCED,
    Interval,
    Result,
    interval,
    judge,
    show,
    together,
)

V1, V2 = "arXiv:2503.10251v1", "arXiv:2503.10251v2"
LAMP = "arXiv:2601.21623"
GROUPS = 8


def claims(count: int = 1000) -> Iterator[Result]:
    """The claims that need no trained model; `count` random decoders each."""
    plain = decoders.run(1.0, count=count)
    large = decoders.run(4.0, count=count)
    yield _growth(plain, large)
    yield _mean_and_median(plain)
    yield _query_key(plain, decoders.run(1.0, qk=8.0, count=count))
    precise = [decoders.run(sigma, precise_attention=True, count=count) for sigma in (1.0, 4.0)]
    yield _precise_attention([plain, large], precise)
    yield _norms()
    yield _sink()


def grouped(f: Callable[[Tensor], float], errors: Tensor) -> list[float]:
    """`f` of each of GROUPS groups of models; the models are the first axis."""
    return [f(part) for part in errors.chunk(GROUPS)]


def powers(logs: Interval) -> str:
    """Geometric mean and its interval, from those of logarithms."""
    return "{:.3g} [{:.3g}, {:.3g}]".format(*map(math.exp, (logs.mean, logs.low, logs.high)))


def _growth(plain: decoders.Depths, large: decoders.Depths) -> Result:
    def slope(linf: Tensor) -> float:
        return log_slope(linf.mean(0).tolist())

    one, four = (grouped(slope, d.linf.T) for d in (plain, large))
    excess = interval([b - 3 * a for a, b in zip(one, four, strict=True)])
    return Result(
        "The mean error of random decoders grows exponentially with depth, faster for larger "
        "weights (slope at σ = 4 above 3 × that at σ = 1)",
        V1,
        f"log error per block: σ = 1 {interval(one)}, σ = 4 {interval(four)}; "
        f"slope(4) − 3 slope(1) = {excess}; after 40 blocks "
        f"{plain.linf[-1].mean():.1e} and {large.linf[-1].mean():.1e} (first: "
        f"{plain.linf[0].mean():.1e}, {large.linf[0].mean():.1e})",
        together(judge(excess, above=0.0), judge(interval(one), above=0.0)),
    )


def _mean_and_median(plain: decoders.Depths) -> Result:
    def ratio(e: Tensor) -> float:
        return (e.mean() / e.median()).log().item()

    # Logarithms: the mean of |d_i|/|x_i| has a tail of its own.
    comp, linf = (interval(grouped(ratio, e)) for e in (plain.comp, plain.linf[-1]))
    return Result(
        "The median error is far below the mean: true componentwise (gate 2 ×), not of "
        "‖d‖∞/‖x‖∞ (gate: at most 2 ×)",
        V1,
        f"mean/median at σ = 1: componentwise {powers(comp)}, max norm {powers(linf)}: small "
        "x_i make the tails",
        together(judge(comp, above=math.log(2)), judge(linf, below=math.log(2))),
    )


def _gain(numerator: decoders.Depths, denominator: decoders.Depths) -> Interval:
    def median(e: Tensor) -> float:
        return e.median().item()

    pairs = zip(
        grouped(median, numerator.linf[-1]), grouped(median, denominator.linf[-1]), strict=True
    )
    return interval([a / b for a, b in pairs])


def _query_key(plain: decoders.Depths, large: decoders.Depths) -> Result:
    gain = _gain(large, plain)
    return Result(
        "Growth is tied to the query-key product: W_Q and W_K 8 × larger, all else equal, raise "
        "the error by far (gate 300 ×)",
        V1,
        f"median ‖d‖∞/‖x‖∞ after 40 blocks × {gain.text('.0f')} "
        f"({plain.linf[-1].median():.1e} → {large.linf[-1].median():.1e})",
        judge(gain, above=300),
    )


def _precise_attention(plain: list[decoders.Depths], precise: list[decoders.Depths]) -> Result:
    one, four = (_gain(a, b) for a, b in zip(plain, precise, strict=True))
    return Result(
        "Queries, keys, scores and softmax in fp64 help large weights (σ = 4), but not by much "
        "(gate 1 to 2.5 ×): errors made elsewhere are amplified all the same",
        V1,
        f"median ‖d‖∞/‖x‖∞ after 40 blocks divided by {four.text('.2f')}; at σ = 1 by "
        f"{one.text('.2f')}",
        judge(four, above=1.0, below=2.5),
    )


def _norms() -> Result:
    rounded, kappa = [], 0.0
    for seed in range(GROUPS):
        x = torch.randn(64, 256, generator=torch.Generator().manual_seed(seed)).double()
        x = x + 4
        rounded.append(_amplified(x, _layer) / _amplified(x, _rms))
        x[:, 0] = 10.0**seed
        kappa = max(kappa, bounds.condition_rms(x).max().item(), _amplified(x, _rms, worst=True))
    ratio = interval(rounded)
    outlier = [_outlier(m) for m in (1.0, 100.0, 1e3, 1e4)]
    return Result(
        "RMSNorm is stable for every input (condition ≤ 2); LayerNorm is sensitive to a common "
        "mean (mean = 4 σ: gate 3 × RMSNorm), not to an outlier",
        V2,
        f"largest amplification of a relative rounding by RMSNorm {kappa:.3f}; LayerNorm over "
        f"RMSNorm at mean 4 σ: {ratio.text('.1f')}; LayerNorm with an outlier of 1, 100, 1e3, 1e4 "
        f"σ: {', '.join(f'{a:.2f}' for a in outlier)}",
        together(judge(ratio, above=3), REPRODUCED if kappa <= 2 * (1 + 2**-8) else REFUTED),
    )


def _rms(x: Tensor) -> Tensor:
    return x / x.square().mean(-1, keepdim=True).sqrt()


def _layer(x: Tensor) -> Tensor:
    return _rms(x - x.mean(-1, keepdim=True))


def _amplified(x: Tensor, norm: Callable[[Tensor], Tensor], *, worst: bool = False) -> float:
    """Relative error of norm(x) over that of x when x is stored in bf16: medians or maxima.

    The first channel, the outlier, is left out of medians.
    """
    generator = torch.Generator().manual_seed(0)
    x = x * (1 + 0.5 * torch.rand(x.shape, generator=generator).double())  # off the grid
    low = x.bfloat16().double()
    before, after = ((b - a).abs() / a.abs() for a, b in ((x, low), (norm(x), norm(low))))
    if worst:
        return (after.max() / before.max()).item()
    return (after[:, 1:].median() / before[:, 1:].median()).item()


def _outlier(size: float) -> float:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).double()
    x[:, 0] = size
    return _amplified(x, _layer)


def sink_slack(sink: float, seed: int) -> tuple[float, float, float]:
    """(bound/worst found, worst/generic bound 2 w, largest p) for one row of 128 scores."""
    x = torch.randn(128, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x[0], w = sink, torch.full((128,), 0.01, dtype=torch.float64)
    p, worst = x.softmax(0), 0.0
    for cut in range(1, 128):  # the worst signs split the entries in two sets
        sign = torch.where(p >= p.sort(descending=True).values[cut - 1], 1.0, -1.0)
        worst = max(worst, ((x + w * sign).softmax(0) - p).abs().sum().item())
    return bounds.sink_bound(p, w).item() / worst, worst / 0.02, p.max().item()


def _sink() -> Result:
    rows = {sink: [sink_slack(sink, seed) for seed in range(GROUPS)] for sink in (0.0, 8.0, 12.0)}
    slack = interval([row[0] for row in rows[8.0]])
    text = "; ".join(
        f"sink {sink:+.0f}: bound/worst {interval([r[0] for r in found]).text('.3f')}, "
        f"worst/(2 w) {sum(r[1] for r in found) / GROUPS:.4f}, p_max {found[0][2]:.3f}"
        for sink, found in rows.items()
    )
    valid = all(row[0] >= 1 for found in rows.values() for row in found)
    return Result(
        "An attention sink tightens the softmax: ‖δp‖₁ ≤ 2 Σ p (1 − p) w, within 1.1 × of the "
        "worst case at sink +8",
        V2,
        text,
        together(judge(slack, above=1.0, below=1.1), REPRODUCED if valid else REFUTED),
    )


if __name__ == "__main__":
    show(claims())
