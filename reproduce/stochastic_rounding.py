"""Stochastic rounding: unbiased, with error that grows as √N, and small updates that survive.

Set-up. Exactness: 64 random values in each of five formats, 16 384 draws each; a claim that rests
on scores fails by chance with probability 0.001. Sums: N equal terms of 1 to 2 ulp, added one by
one in e8m13 inside the binade [1, 2), so that the ulp does not grow; 1024 sums, exponent fitted to
N = 16 … 2048, interval over 16 groups of sums. Training: byte-level Llama of 0.13 M parameters on
the Python standard library, 512 tokens a step, AdamW at a constant rate; only the stored weights
are bf16, all else is fp32; paired by seed. The claims about training are those of
arXiv:2502.20566; the gates were set beforehand on another model (2 layers of 128 channels, 1200
steps of 1024 tokens). There are 3 seeds, and 8 where 3 could not tell.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from halfulp.numerics.format import get_format
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to
from reproduce.common import (
    REFUTED,
    REPRODUCED,
    Interval,
    Result,
    difference,
    interval,
    judge,
    judge_scores,
    judge_share,
    show,
    together,
)
from reproduce.runs import Job, Trainer, open_runs, policy

PAPER = "arXiv:2502.20566"
FORMATS = ("bf16", "fp16", "e4m3", "e5m2", "e2m1")
VALUES, DRAWS = 64, 1 << 14
SUM_FORMAT, LENGTHS = "e8m13", tuple(2**k for k in range(4, 12))
TRIALS = 20_000  # sums of the accumulator test
FEW, MANY = range(3), range(8)  # seeds
STEPS = 600


def quick() -> Iterator[Result]:
    """The claims that need no training."""
    yield _mean_claim()
    yield _variance_claim()
    yield _growth_claim("nearest", 1.0)
    yield _growth_claim("stochastic", 0.5)
    yield _stall_claim()


def trained(runs: Trainer) -> Iterator[Result]:
    """The claims that train."""
    yield _dead_claim(runs)
    yield from _training_claims(runs)


@dataclass(frozen=True)
class Draws:
    """Roundings of random values: errors in ulp [values, draws] and P(away from 0) [values]."""

    errors: Tensor
    p: Tensor

    @property
    def scores(self) -> list[float]:
        """Mean errors over their standard errors."""
        spread = (self.p * (1 - self.p)).clamp(min=1e-12)
        return (self.errors.mean(1) / (spread / self.errors.shape[1]).sqrt()).tolist()

    @property
    def variance_ratio(self) -> float:
        """Sum of the variances over that of p (1 − p)."""
        return (self.errors.var(1).sum() / (self.p * (1 - self.p)).sum()).item()


def draw(name: str, rounding: str, seed: int = 0) -> Draws:
    """`DRAWS` roundings each of `VALUES` random values, in several binades of the format."""
    fmt = get_format(name)
    x = torch.randn(VALUES, generator=torch.Generator().manual_seed(seed)) * fmt.largest**0.125
    key = Key.of(seed, f"reproduce/{name}")
    drawn = round_to(x[:, None].expand(-1, DRAWS).contiguous(), fmt, rounding=rounding, key=key)
    wide = x.double()
    exponent = torch.frexp(wide)[1].clamp(min=fmt.smallest_exponent + 1) - 1
    ulp = torch.exp2(exponent.double() - fmt.mantissa_bits)
    return Draws((drawn.double() - wide[:, None]) / ulp[:, None], (wide.abs() / ulp).frac())


def _mean_claim() -> Result:
    scores = [z for name in FORMATS for z in draw(name, "stochastic").scores]
    control = max(abs(z) for name in FORMATS for z in draw(name, "nearest").scores)
    worst, chance, verdict = judge_scores(scores)
    measured = (
        f"largest of {len(scores)} scores |z| = {worst:.2f}, as large by chance with probability "
        f"{chance:.2f}; nearest on the same values: |z| = {control:.0f}"
    )
    return Result("E[SR(x)] = x", "definition", measured, verdict)


def _variance_claim() -> Result:
    drawn = [draw(name, "stochastic") for name in FORMATS]
    ratio = interval([d.variance_ratio for d in drawn])
    strays = sum(int((d.errors.abs() >= 1).sum()) for d in drawn)
    measured = (
        f"measured variance over expected {ratio.text('.4f')} "
        f"over {len(FORMATS)} formats (gate 1 ± 0.01); {strays} of "
        f"{len(FORMATS) * VALUES * DRAWS} draws were no neighbor of x"
    )
    verdict = together(judge(ratio, above=0.99, below=1.01), REFUTED if strays else REPRODUCED)
    return Result("Var[SR(x)] = p (1 − p) ulp²", "definition", measured, verdict)


def growth_exponent(rounding: str, terms: str, seed: int = 0) -> Interval:
    """The slope of log rms error over log N for sums of `terms` ("equal" or "random")."""
    squares = _sum_errors(rounding, terms, seed).square()
    rms = squares.view(len(LENGTHS), 16, -1).mean(2).sqrt().log2()
    x = torch.tensor(LENGTHS, dtype=torch.float64).log2()
    x = x - x.mean()
    return interval(((x[:, None] * rms).sum(0) / x.square().sum()).tolist())


def _sum_errors(rounding: str, terms: str, seed: int, sums: int = 1024) -> Tensor:
    """Errors in ulp [lengths, sums]. The sums stay in [1, 2): equal terms add up to ½ at most."""
    fmt, generator = get_format(SUM_FORMAT), torch.Generator().manual_seed(seed)
    key = Key.of(seed, f"reproduce/{terms}")
    ulp = 2.0**-fmt.mantissa_bits
    term = (1 + torch.rand(sums, generator=generator)) * ulp
    total = torch.full((sums,), 1.0 if terms == "equal" else 1.5)
    exact, errors = total.double(), []
    for n in range(1, LENGTHS[-1] + 1):
        if terms == "random":
            term = torch.randn(sums, generator=generator) * 3 * ulp
        total = round_to(total + term, fmt, rounding=rounding, key=key.fold(n))
        exact = exact + term.double()
        if n in LENGTHS:
            errors.append((total.double() - exact) / ulp)
    return torch.stack(errors)


def _growth_claim(rounding: str, exponent: float) -> Result:
    equal, random = (growth_exponent(rounding, terms) for terms in ("equal", "random"))
    how = "to nearest" if rounding == "nearest" else "stochastically"
    return Result(
        f"The error of a sum of N terms grows as N^{exponent:g} when rounded {how}",
        "probabilistic error analysis",
        f"equal terms: exponent {equal} (gate {exponent:g} ± 0.05); terms of random size and sign: "
        f"{random}",
        judge(equal, above=exponent - 0.05, below=exponent + 0.05),
    )


def accumulate_small(rounding: str, count: int, trials: int, seed: int = 0) -> Tensor:
    """1 + count · 0.001, accumulated in bf16, once per trial."""
    total, key = torch.ones(trials), Key.of(seed, "reproduce/accumulate")
    for n in range(count):
        total = round_to(total + 0.001, "bf16", rounding=rounding, key=key.fold(n))
    return total


def _stall_claim() -> Result:
    parts, scores = [], []
    for count in (256, 1024, 4096):
        sums = accumulate_small("stochastic", count, TRIALS).double()
        exact = 1 + count * float(torch.tensor(0.001))
        scores.append(((sums.mean() - exact) / sums.std() * len(sums) ** 0.5).item())
        rms = (sums - exact).square().mean().sqrt()
        parts.append(f"N = {count}: {sums.mean():.3f}, exact {exact:.3f}, rms error {rms:.3f}")
    stalled = bool((accumulate_small("nearest", 4096, 1) == 1).all())
    _, chance, verdict = judge_scores(scores)
    measured = (
        f"nearest {'stays at 1' if stalled else 'moves'}; stochastic, mean of {TRIALS} sums: "
        f"{'; '.join(parts)}; as far off by chance with probability {chance:.2f}"
    )
    verdict = together(verdict, REPRODUCED if stalled else REFUTED)
    return Result(
        "1 + N × 0.001 in bf16 never leaves 1 when rounded to nearest, and is right on average "
        "when rounded stochastically",
        "derived",
        measured,
        verdict,
    )


def unchanged_share(run: Path) -> float:
    """Share of the weights of at least 0.016 in the layers that the last step left as they were."""
    from safetensors.torch import load_file

    before, after = (
        load_file(folder / "model.safetensors")
        for folder in sorted((run / "checkpoints").glob("step-*"))
    )
    names = [name for name, w in before.items() if ".layers." in name and w.dim() == 2]
    old, new = (torch.cat([w[name].flatten() for name in names]) for w in (before, after))
    large = old.abs() >= 0.016
    return (old == new)[large].double().mean().item()


def _dead_claim(runs: Trainer) -> Result:
    jobs = [
        Job(
            "bf16_weights",
            policy("bf16_weights"),
            seed,
            lr=3e-5,
            steps=100,
            constant_lr=True,
            probe=unchanged_share,
        )
        for seed in FEW
    ]
    shares = [outcome.probed for outcome in runs(jobs)]
    dead = interval(shares)
    return Result(
        "bf16 weights rounded to nearest, lr 3e-5: at least 80% of the updates of weights ≥ 0.016 "
        "are lost",
        PAPER,
        f"{dead.text('.1%')} of them unchanged by step 100 ({dead.n} seeds)",
        judge(dead, above=0.8),
    )


def _stored(name: str, seeds: Sequence[int]) -> list[Job]:
    text = policy(name)
    return [Job(name, text, seed, lr=5e-5, steps=STEPS, constant_lr=True) for seed in seeds]


def _training_claims(runs: Trainer) -> Iterator[Result]:
    fp32 = runs.losses(_stored("fp32", MANY))
    nearest = runs.losses(_stored("bf16_weights", FEW))
    stochastic = runs.losses(_stored("bf16_weights_sr", MANY))
    stalled = difference(nearest, fp32[: len(FEW)])
    yield Result(
        "bf16 weights updated to nearest stall: far above fp32 (gate +0.1 nats)",
        PAPER,
        f"nearest − fp32 = {stalled} nats after {STEPS} steps at lr 5e-5 ({stalled.n} seeds); "
        f"fp32 {interval(fp32).text('.3f')}",
        judge(stalled, above=0.1),
    )
    kept = difference(stochastic, fp32)
    yield Result(
        "bf16 weights updated stochastically train as fp32 (gate ± 0.01 nats)",
        PAPER,
        f"stochastic − fp32 = {kept.text('+.4f')} nats after the same steps ({kept.n} seeds)",
        judge(kept, above=-0.01, below=0.01),
    )
    pairs = zip(nearest, stochastic, fp32, strict=False)  # only some seeds have `nearest`
    recovered, gap = zip(*((low - sr, low - high) for low, sr, high in pairs), strict=True)
    measured, verdict = judge_share(recovered, gap, 0.8)
    yield Result(
        "Stochastic updates recover at least 80% of the gap to fp32 weights",
        PAPER,
        f"{measured} nats ({len(gap)} seeds)",
        verdict,
    )


if __name__ == "__main__":
    with open_runs() as opened:
        opened.start(trained)
        show(quick())
        show(trained(opened))
