"""Fewer bits in the GEMMs: which bits matter, why truncation hurts, and when to be precise.

Set-up. Byte-level Llama of 0.13 M parameters on the Python standard library, 240 steps of 512
tokens, cosine to a tenth of the rate, validation on 32 768 held-out tokens in the precision of the
last stage; values are paired by seed. As in arXiv:2405.18710 the operands of every linear, the head
included, are reduced in all three GEMMs without a scale: mantissas truncated (or rounded to
nearest, where it says so), exponents clipped to the range that is left. Deviations: the reduced
formats have gradual underflow, which the paper's masks need not have; models and runs are about
1000 times smaller; attention products stay fp32. "Gradients of 2^19 tokens" means that the loss is
scaled by 2^-10, so that gradients are as small as in a step of half a million tokens, the usual
size; the update divides the scale out. The gates were set beforehand on another tiny model at
lr 3e-3. Here that is beyond the best rate of fp32 (about 2e-3), and seeds differ by 0.1 nats; at
1e-3 they agree to 0.03. There are 3 seeds, and 8 where 3 or 6 could not tell.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.rounding import round_to
from halfulp.numerics.statistics import quantizer_statistics, shares
from reproduce.common import (
    Interval,
    Result,
    difference,
    interval,
    judge,
    judge_share,
    show,
    together,
)
from reproduce.runs import Job, Trainer, open_runs, policy

PAPER, MX_PAPER = "arXiv:2405.18710", "arXiv:2506.20752"
LR, BEST_LR, SLOW_LR = 3e-3, 2e-3, 1e-3
FEW, MANY = range(3), range(8)  # seeds
SMALL, LARGE = 512, 1 << 19  # tokens over which the gradient is a mean
CURRENT = """[recipes.here.linear]
fprop = "e4m3@tensor:current"
dgrad_g = "e5m2@tensor:current"
dgrad_w = "e4m3@tensor:current"
wgrad_g = "e5m2@tensor:current"
wgrad_x = "e4m3@tensor:current"
"""
MX_ROUND_UP = """embed = "e4m3@1x32:e8m0_up"
norm = "e4m3@1x32:e8m0_up"
[recipes.here.linear]
operands = "e4m3@1x32:e8m0_up"
"""


def quick() -> Iterator[Result]:
    """The claims that need no training."""
    yield _bias_law_claim()
    yield _nearest_claim()
    yield _gain_claim("truncate", 0.905, 0.925)
    yield _gain_claim("nearest", 0.997, 1.003)
    yield _clamp_claim("e8m0_floor")
    yield _clamp_claim("e8m0_up")


def trained(runs: Trainer) -> Iterator[Result]:
    """The claims that train."""
    yield from _exponent_claims(runs)
    yield from _mantissa_claims(runs)
    yield from _staged_claims(runs)
    yield _floor_claim(runs)


def mean_relative_error(mantissa: int, rounding: str) -> Interval:
    """Of E8Mk on values whose logarithm is uniform, over 8 samples of 2^18 values."""
    errors = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        x = torch.exp2(16 * torch.rand(1 << 18, generator=generator) - 8)
        y = round_to(x, f"e8m{mantissa}", rounding=rounding)
        errors.append(((y.double() - x.double()) / x.double()).mean().item())
    return interval(errors)


def gemm_gain(mantissa: int, rounding: str) -> Interval:
    """⟨ŷ, y⟩ / ⟨y, y⟩ of a GEMM with both operands reduced, over 8 normal samples."""
    gains = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        a, b = (torch.randn(256, 256, generator=generator) for _ in "ab")
        low = (round_to(t, f"e8m{mantissa}", rounding=rounding).double() for t in (a, b))
        exact, reduced = a.double() @ b.double(), torch.matmul(*low)
        gains.append(((reduced * exact).sum() / exact.square().sum()).item())
    return interval(gains)


def _bias_law_claim() -> Result:
    parts, verdicts = [], []
    for mantissa in (3, 4, 5, 7):
        law = -0.7213 * 2.0 ** -(mantissa + 1)
        measured = mean_relative_error(mantissa, "truncate")
        parts.append(f"k = {mantissa}: {measured.text('+.2%')}, law {law:.2%}")
        verdicts.append(judge(measured, above=1.04 * law, below=0.96 * law))
    return Result(
        "Truncating to E8Mk shrinks by 0.7213 · 2^-(k+1) on average (gate: within 4%)",
        f"derived; masks of {PAPER}",
        "; ".join(parts),
        together(*verdicts),
    )


def _nearest_claim() -> Result:
    measured = {k: mean_relative_error(k, "nearest") for k in (3, 4, 5, 7)}
    worst = max(measured.values(), key=lambda x: abs(x.mean))
    verdicts = [judge(x, above=-1e-3, below=1e-3) for x in measured.values()]
    return Result(
        "Rounding to nearest has no such bias (gate: 0.1%, k ≥ 3)",
        "derived",
        f"largest for k = 3, 4, 5, 7: {worst.text('+.3%')}",
        together(*verdicts),
    )


def _gain_claim(rounding: str, above: float, below: float) -> Result:
    gain, one = gemm_gain(3, rounding), gemm_gain(1, rounding)
    word = "truncated" if rounding == "truncate" else "rounded to nearest"
    return Result(
        f"A GEMM of operands {word} to E8M3 has a gain between {above:g} and {below:g}",
        "derived",
        f"{gain.text('.4f')}; E8M1: {one.mean:.3f}",
        judge(gain, above=above, below=below),
    )


def clamp(scale: str, mean: float, seed: int) -> tuple[float, float, int]:
    """(clamped share, mean relative error, codes in use) of γ ~ N(mean, 0.01²) in MXFP8."""
    generator = torch.Generator().manual_seed(seed)
    gamma = mean + 0.01 * torch.randn(1 << 16, generator=generator)
    q = parse_quantizer(f"e4m3@1x32:{scale}")
    y = apply_quantizer(gamma, q)
    clamped = shares(quantizer_statistics(gamma, y, q))["saturated"]
    return clamped, _relative(y, gamma), len(y.unique())


def _relative(y: Tensor, x: Tensor) -> float:
    return ((y.double() - x.double()) / x.double()).mean().item()


def _clamp_claim(scale: str) -> Result:
    drawn = [clamp(scale, 0.97, seed) for seed in range(8)]
    clamped, bias = (interval([d[i] for d in drawn]) for i in (0, 1))
    above_one = interval([clamp(scale, 1.05, seed)[1] for seed in range(8)])
    codes = max(d[2] for d in drawn)
    if scale == "e8m0_floor":
        claim = "clamps norm weights γ = 0.97 ± 0.01: at least 95% of them, bias at most −8%"
        verdicts = judge(clamped, above=0.95), judge(bias, below=-0.08)
    else:
        claim = "clamps none of them, |bias| at most 1%"
        verdicts = judge(clamped, below=0.0), judge(bias, above=-0.01, below=0.01)
    name = {"e8m0_floor": "OCP's floor scale of MXFP8", "e8m0_up": "A scale rounded up"}[scale]
    measured = (
        f"{clamped.text('.1%')} clamped, bias {bias.text('+.2%')}, {codes} codes in use; "
        f"γ = 1.05 ± 0.01: bias {above_one.text('+.2%')}"
    )
    return Result(f"{name} {claim}", MX_PAPER, measured, together(*verdicts))


def masked(
    name: str,
    seeds: Sequence[int],
    *,
    lr: float = LR,
    tokens: int = SMALL,
    head: bool = True,
) -> list[Job]:
    """One run per seed with every linear in the recipe `name`; the head too unless told."""
    text = policy(name, head=head, gradient_tokens=tokens)
    label = name + ("" if head else ", head fp32") + (", 2^19 tokens" if tokens == LARGE else "")
    return [Job(label, text, seed, lr) for seed in seeds]


def reference(seeds: Sequence[int], lr: float = LR) -> list[Job]:
    """The fp32 runs."""
    return [Job("fp32", policy("fp32"), seed, lr) for seed in seeds]


def _exponent_claims(runs: Trainer) -> Iterator[Result]:
    for tokens in (SMALL, LARGE):
        yield _five_bits_claim(runs, tokens)
        yield _four_bits_claim(runs, tokens)
    yield _six_bits_claim(runs)
    yield from _scaling_claims(runs)


def _gradients(tokens: int) -> str:
    return f"gradients of {'2^19' if tokens == LARGE else tokens} tokens"


def _five_bits_claim(runs: Trainer, tokens: int) -> Result:
    five = runs.losses(masked("mask_e5m7", FEW, tokens=tokens))
    one = runs.losses(masked("mask_e8m1_nearest", FEW))
    fp32 = runs.losses(reference(FEW))
    gap = difference(five, one)
    return Result(
        f"Exponent bits matter more than mantissa bits: E5M7 (13 bits) is at least 0.5 nats above "
        f"E8M1 nearest (10 bits), {_gradients(tokens)}",
        PAPER,
        f"E5M7 {_level(five)}, E8M1 {_level(one)}, fp32 {_level(fp32)}; difference {gap} nats "
        f"({gap.n} seeds)",
        judge(gap, above=0.5),
    )


def _four_bits_claim(runs: Trainer, tokens: int) -> Result:
    four = interval(runs.losses(masked("mask_e4m7", FEW, tokens=tokens)))
    return Result(
        f"E4M7 learns nothing: at least 5.0 nats (uniform is 5.55), {_gradients(tokens)}",
        PAPER,
        f"{four.text('.3f')} nats ({four.n} seeds)",
        judge(four, above=5.0),
    )


def _six_bits_claim(runs: Trainer) -> Result:
    six = runs.losses(masked("mask_e6m7", MANY, tokens=LARGE))
    gap = difference(six, runs.losses(reference(MANY)))
    return Result(
        f"E6M7 trains as fp32 (gate ± 0.03 nats), {_gradients(LARGE)}",
        PAPER,
        f"difference {gap} nats ({gap.n} seeds)",
        judge(gap, above=-0.03, below=0.03),
    )


def _scaling_claims(runs: Trainer) -> Iterator[Result]:
    text = policy("fp32", head=True, lines=CURRENT)
    scaled = runs.losses([Job("fp8, current scales", text, seed, LR) for seed in MANY])
    gap = difference(runs.losses(masked("fp8_unscaled", MANY)), scaled)
    yield Result(
        f"E4M3 / E5M2 without scales is at least 0.08 nats above current scaling, "
        f"{_gradients(SMALL)}",
        PAPER,
        f"difference {gap} nats ({gap.n} seeds)",
        judge(gap, above=0.08),
    )
    rest = difference(scaled, runs.losses(reference(MANY)))
    yield Result(
        "E4M3 / E5M2 with current scaling per tensor trains as fp32 (gate ± 0.03 nats)",
        PAPER,
        f"difference {rest} nats ({rest.n} seeds)",
        judge(rest, above=-0.03, below=0.03),
    )


def _mantissa_claims(runs: Trainer) -> Iterator[Result]:
    for lr, seeds in ((LR, MANY), (SLOW_LR, FEW)):
        for mantissa, gate in ((2, 0.6), (1, 0.5)):
            yield _bias_share_claim(runs, mantissa, gate, lr, seeds)
    for lr, seeds in ((LR, MANY), (BEST_LR, FEW), (SLOW_LR, FEW)):
        yield _head_claim(runs, lr, seeds)


def _bias_share_claim(
    runs: Trainer, mantissa: int, gate: float, lr: float, seeds: Sequence[int]
) -> Result:
    truncated = runs.losses(masked(f"mask_e8m{mantissa}", seeds, lr=lr))
    nearest = runs.losses(masked(f"mask_e8m{mantissa}_nearest", seeds, lr=lr))
    fp32 = runs.losses(reference(seeds, lr))
    measured, verdict = judge_share(_minus(truncated, nearest), _minus(truncated, fp32), gate)
    return Result(
        f"At least {gate:.0%} of what E8M{mantissa} truncation costs is its bias (truncate − "
        f"nearest over truncate − fp32), lr {lr:g}",
        f"derived; masks of {PAPER}",
        f"{measured} nats ({len(seeds)} seeds)",
        verdict,
    )


def _head_claim(runs: Trainer, lr: float, seeds: Sequence[int]) -> Result:
    low = runs.losses(masked("mask_e8m1", seeds, lr=lr, head=False))
    fp32 = runs.losses(reference(seeds, lr))
    gap = difference(low, fp32)
    return Result(
        f"Truncation to E8M1 costs loss also where the head stays fp32, lr {lr:g}",
        PAPER,
        f"E8M1 − fp32 = {gap} nats ({gap.n} seeds); fp32 {_level(fp32)}",
        judge(gap, above=0.0),
    )


def _level(losses: Sequence[float]) -> str:
    return interval(losses).text(".3f")


def _minus(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a - b for a, b in zip(left, right, strict=True)]


def _staged(first: str, until: float, last: str, seeds: Sequence[int], lr: float) -> list[Job]:
    texts = {"fp32": policy("fp32"), "e8m1": policy("mask_e8m1", head=True)}
    label = f"{first} until {until:.0%}, then {last}"
    return [Job(label, texts[last], s, lr, first=texts[first], until=until) for s in seeds]


def _staged_claims(runs: Trainer) -> Iterator[Result]:
    for lr, seeds in ((LR, MANY), (SLOW_LR, FEW)):
        low = runs.losses(masked("mask_e8m1", seeds, lr=lr))
        fp32 = runs.losses(reference(seeds, lr))
        early = runs.losses(_staged("fp32", 0.2, "e8m1", seeds, lr))
        late = runs.losses(_staged("e8m1", 0.8, "fp32", seeds, lr))
        measured, verdict = judge_share(_minus(low, early), _minus(low, fp32), 0.6)
        yield Result(
            f"fp32 for the first 20% closes at least 60% of the gap of E8M1 truncation, "
            f"although evaluated in E8M1, lr {lr:g}",
            f"proposed, not tested, in {PAPER}",
            f"{measured} nats ({len(seeds)} seeds)",
            verdict,
        )
        gap = difference(late, early)
        yield Result(
            f"fp32 for the first 20% is better than fp32 for the last 20%, lr {lr:g}",
            f"proposed, not tested, in {PAPER}",
            f"late − early = {gap} nats, early {_level(early)}, late {_level(late)} "
            f"({gap.n} seeds)",
            judge(gap, above=0.0),
        )


def _floor_claim(runs: Trainer) -> Result:
    floor = [Job("MXFP8, floor scales", policy("mx_ocp"), seed, LR) for seed in MANY]
    up = policy("mx_ocp", lines=MX_ROUND_UP)
    gap = difference(
        runs.losses(floor),
        runs.losses([Job("MXFP8, scales rounded up", up, seed, LR) for seed in MANY]),
    )
    return Result(
        "MXFP8 everywhere (embedding, norms, attention and head too) trains worse with OCP's floor "
        "scale than with the scale rounded up",
        f"{MX_PAPER}; arXiv:2506.08027",
        f"floor − up = {gap} nats ({gap.n} seeds)",
        judge(gap, above=0.0),
    )


if __name__ == "__main__":
    with open_runs() as opened:
        opened.start(trained)
        show(quick())
        show(trained(opened))
