"""Sharpness by block: which order, when it comes, and what of it is counting parameters.

Set-up. The GPT-2 style decoder of reproduce/models.py (0.65 M parameters: 4 layers of 96 channels,
64 tokens) on the Python standard library, vocabulary 2048, 1024 tokens a step, AdamW at 2e-3 with
decay 0.1, warm-up of 50 steps and cosine over 2400 steps. There are 5 seeds, because 3 could not
tell whether the order persists, and 3 with other vocabularies. Sharpness is the mean diagonal of
the Gauss-Newton matrix by Gauss-Newton-Bartlett, 12 draws on batches of their own (64 at step 400).
Ratios of sharpness are geometric means over the seeds. Positions are a block of their own here, and
nothing is claimed of them.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence

from halfulp.sharpness.ratios import rule
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
from reproduce.courses import BYTES, Course, Courses, Measured
from reproduce.runs import open_pool

KEEPS_RUNS = True
PAPER = "arXiv:2502.19002"
FIGURE = f"figures of {PAPER}"
SEEDS, FEW = (0, 1, 2, 3, 4), (0, 1, 2)
STEPS, LR = 2400, 2e-3
TYPES: tuple[str, ...] = ("emb", "qk", "ffn", "vo", "norm")
VOCABULARIES = (BYTES, 2048, 8192)
EARLY, SETTLED = 100, 400
POINTS = (0, 50, EARLY, 200, SETTLED, 800, 1200, 1600, 2000, STEPS)
ORDER = (("qk", "vo"), ("ffn", "vo"), ("vo", "norm"))  # flatter, sharper

# Read off the figures of the paper: sharpness after 20 000 of 50 000 steps.
LLAMA_20K = {"emb": 5.6e-7, "qk": 1.2e-6, "ffn": 1.9e-6, "vo": 3.5e-6, "norm": 2.6e-5}
GPT2_20K = {"emb": 1.4e-12, "qk": 3.2e-9, "ffn": 1.8e-8, "vo": 2.4e-8, "norm": 3.9e-7}
PUBLISHED = {"emb": 10.0, "qk": 8.0, "ffn": 6.0, "vo": 4.0}

_FREE = len(TYPES) * (len(SEEDS) - 1)
_CHI2 = (9.591, 34.170)  # 2.5% and 97.5% quantiles of chi-square, 20 degrees of freedom

Found = dict[int, Measured]  # by step, of one seed


def claims() -> Iterator[Result]:
    """All claims; trains in two processes."""
    with open_pool() as pool:
        yield from decide(Courses(pool))


def decide(run: Courses) -> Iterator[Result]:
    """All claims, from the courses of `run`."""
    long = [long_run(seed) for seed in SEEDS]
    others = [vocab for vocab in VOCABULARIES if vocab != 2048]
    run.start(long + [short_run(seed, vocab) for vocab in others for seed in FEW])
    seeds = [outcome.measured for outcome in run(long)]
    yield _late_claim(seeds)
    yield _attention_claim(seeds)
    yield _flattest_claim(seeds)
    yield _early_claim(seeds)
    yield _emergence_claim(seeds)
    yield _persistence_claim(seeds)
    yield _growth_claim(seeds)
    yield _vocabulary_claim(run, seeds)
    yield _spread_claim(seeds)
    yield _published_claim()
    yield _power_claim(seeds)


def long_run(seed: int) -> Course:
    measured = tuple((step, 64 if step == SETTLED else 12) for step in POINTS)
    return Course("whole run", seed, STEPS, LR, evaluated=POINTS, measured=measured)


def short_run(seed: int, vocab: int) -> Course:
    """The first steps of a run with another vocabulary."""
    label = f"vocabulary {vocab}"
    return Course(label, seed, STEPS, LR, vocab=vocab, until=EARLY, measured=((EARLY, 12),))


def log_ratio(seeds: Sequence[Found], sharp: str, flat: str, step: int) -> Interval:
    """ln S(sharp) / S(flat) at `step`, over the seeds."""
    pairs = [found[step].sharpness for found in seeds]
    return interval([math.log(s[sharp] / s[flat]) for s in pairs])


def ratio_text(x: Interval) -> str:
    """The ratio of which `x` is the logarithm."""
    low, mean, high = (math.exp(v) for v in (x.low, x.mean, x.high))
    return f"{mean:.3g} [{low:.3g}, {high:.3g}]"


def _ordered(
    seeds: Sequence[Found], pairs: Sequence[tuple[str, str]], step: int
) -> tuple[str, str]:
    """(measured, verdict) on S(flat) < S(sharp) for all (flat, sharp) at `step`."""
    ratios = {(f, s): log_ratio(seeds, s, f, step) for f, s in pairs}
    text = ", ".join(f"{s}/{f} {ratio_text(x)}" for (f, s), x in ratios.items())
    return text, together(*(judge(x, above=0.0) for x in ratios.values()))


def _late_claim(seeds: Sequence[Found]) -> Result:
    text, verdict = _ordered(seeds, ORDER, STEPS)
    return Result(
        "At the end S(qk), S(ffn) < S(vo) < S(norm)",
        PAPER,
        f"{text} ({len(seeds)} seeds). {_levels(seeds, STEPS)}",
        verdict,
    )


def _attention_claim(seeds: Sequence[Found]) -> Result:
    text, verdict = _ordered(seeds, [("qk", "ffn")], STEPS)
    return Result("At the end S(qk) < S(ffn)", PAPER, f"{text} ({len(seeds)} seeds)", verdict)


def _flattest_claim(seeds: Sequence[Found]) -> Result:
    text, verdict = _ordered(seeds, [("emb", kind) for kind in TYPES[1:]], STEPS)
    return Result(
        "At the end the embedding is the flattest block, with a vocabulary of 2048 here",
        PAPER,
        f"{text} ({len(seeds)} seeds)",
        verdict,
    )


def _early_claim(seeds: Sequence[Found]) -> Result:
    start, start_verdict = _ordered(seeds, [("norm", "ffn")], 0)
    early, early_verdict = _ordered(seeds, [("norm", "vo")], EARLY)
    return Result(
        f"The order is not there early: S(norm) < S(ffn) at step 0, and S(norm) < S(vo) at {EARLY}",
        FIGURE,
        f"step 0: {start}; step {EARLY}: {early} ({len(seeds)} seeds). {_levels(seeds, EARLY)}",
        together(start_verdict, early_verdict),
    )


def in_order(measured: Measured) -> bool:
    return all(measured.sharpness[flat] < measured.sharpness[sharp] for flat, sharp in ORDER)


def emergence(found: Found) -> float:
    """The first measured step from which on the blocks are in order; infinite if they never are."""
    after = math.inf
    for step in sorted(found, reverse=True):
        if not in_order(found[step]):
            break
        after = step
    return after


def _emergence_claim(seeds: Sequence[Found]) -> Result:
    steps = [emergence(found) for found in seeds]
    where = ", ".join(f"{step:g}" for step in steps)
    early = [step <= 0.02 * STEPS for step in steps]
    verdict = REPRODUCED if all(early) else REFUTED if not any(early) else "could not tell"
    return Result(
        "The order comes within the first 2% of training, and stays",
        f"{PAPER}: the first 1000 of 50 000 steps",
        f"from step {where} of {STEPS} on (measured at {', '.join(map(str, POINTS))}): "
        f"{min(steps) / STEPS:.0%} to {max(steps) / STEPS:.0%} ({len(seeds)} seeds)",
        verdict,
    )


def _persistence_claim(seeds: Sequence[Found]) -> Result:
    late = [step for step in POINTS if 2 * step >= STEPS]
    parts, verdicts = zip(*(_ordered(seeds, ORDER, step) for step in late), strict=True)
    return Result(
        "The order persists: S(qk), S(ffn) < S(vo) < S(norm) from half-way on",
        PAPER,
        "; ".join(f"step {step}: {part}" for step, part in zip(late, parts, strict=True)),
        together(*verdicts),
    )


def _growth_claim(seeds: Sequence[Found]) -> Result:
    parts, verdicts = [], []
    for flat in ("qk", "ffn", "vo"):
        gaps = [
            [math.log(m.sharpness["norm"] / m.sharpness[flat]) for m in (f[SETTLED], f[STEPS])]
            for f in seeds
        ]
        growth = interval([end - start for start, end in gaps])
        parts.append(f"norm/{flat} ×{ratio_text(growth)}")
        verdicts.append(judge(growth, above=0.0))
    return Result(
        f"The gaps to the norms are made late: they grow from step {SETTLED} to the end "
        "(gate: above ×1)",
        f"{FIGURE}: 4 to 15 times from 2% to 40% of training",
        f"{', '.join(parts)} ({len(seeds)} seeds)",
        together(*verdicts),
    )


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line."""
    return statistics.linear_regression(x, y).slope


def _vocabulary_claim(run: Courses, seeds: Sequence[Found]) -> Result:
    embedding: dict[int, list[float]] = {2048: [seeds[i][EARLY].sharpness["emb"] for i in FEW]}
    for vocab in VOCABULARIES:
        if vocab not in embedding:
            outcomes = run([short_run(seed, vocab) for seed in FEW])
            embedding[vocab] = [o.measured[EARLY].sharpness["emb"] for o in outcomes]
    logs = [math.log(vocab) for vocab in VOCABULARIES]
    by_seed = zip(*(embedding[vocab] for vocab in VOCABULARIES), strict=True)
    slopes = interval([slope(logs, [math.log(s) for s in found]) for found in by_seed])
    traces = (f"{v}: {v * 96 * statistics.fmean(embedding[v]):.0f}" for v in VOCABULARIES)
    return Result(
        f"S(emb) goes as 1 / vocabulary at step {EARLY}: its trace does not depend on it (slope of "
        "the logarithms −1, gate −1.15 to −0.85)",
        "derived",
        f"slope {slopes} ({slopes.n} seeds); trace by vocabulary {', '.join(traces)}. "
        f"All claims together: {run.cost()}",
        judge(slopes, above=-1.15, below=-0.85),
    )


def _spread_claim(seeds: Sequence[Found]) -> Result:
    spread = {kind: _variation(seeds, lambda m, k=kind: m.sharpness[k]) for kind in TYPES}
    noise = {kind: statistics.fmean(f[SETTLED].rel_se[kind] for f in seeds) for kind in TYPES}
    pooled = pooled_variation(list(spread.values()))
    parts = (f"{k} {spread[k]:.1%} ({noise[k]:.1%})" for k in TYPES)
    return Result(
        f"Seeds differ little at step {SETTLED}: coefficient of variation, root mean square over "
        "the types, at most 8%",
        "derived",
        f"{pooled.text('.1%')}, the types taken as independent; by type, "
        f"with the relative error of one measurement: {', '.join(parts)} ({len(seeds)} seeds)",
        judge(pooled, below=0.08),
    )


def _variation(seeds: Sequence[Found], value: Callable[[Measured], float]) -> float:
    values = [value(found[SETTLED]) for found in seeds]
    return statistics.stdev(values) / statistics.fmean(values)


def pooled_variation(spread: Sequence[float]) -> Interval:
    """Root mean square of a coefficient of variation per type, taken as independent."""
    mean = math.sqrt(statistics.fmean(v * v for v in spread))
    low, high = (mean * math.sqrt(_FREE / quantile) for quantile in reversed(_CHI2))
    return Interval(mean, low, high, len(spread))


def _published_claim() -> Result:
    exact = dict.fromkeys(TYPES, 0.0)
    llama = rule(LLAMA_20K, exact, 2 / 3, 10)
    gpt2 = rule(GPT2_20K, exact, 1 / 2, 10)
    worst = max(abs(llama[kind] / PUBLISHED[kind] - 1) for kind in PUBLISHED)
    other = max(abs(gpt2[kind] / PUBLISHED[kind] - 1) for kind in ("ffn", "vo"))
    parts = ", ".join(f"{kind} {llama[kind]:.1f}" for kind in PUBLISHED)
    return Result(
        "The published ratios 10, 8, 6, 4 are (S(norm) / S)^p with the published sharpness: "
        "Llama 0.25B with p = 2/3 within 8%, ffn and vo of GPT-2 small with p = 1/2 within 25%",
        "derived",
        f"Llama {parts} (worst {worst:.0%}); GPT-2 ffn {gpt2['ffn']:.1f}, vo {gpt2['vo']:.1f} "
        f"(worst {other:.0%}). Sharpness read off figures to ±3%",
        REPRODUCED if worst <= 0.08 and other <= 0.25 else REFUTED,
    )


def fitted_power(sharpness: dict[str, float]) -> float:
    """The p of (S(norm) / S)^p closest to the published ratios of qk, ffn and vo, in logarithms."""
    pairs = [
        (math.log(sharpness["norm"] / sharpness[kind]), math.log(PUBLISHED[kind]))
        for kind in ("qk", "ffn", "vo")
    ]
    return sum(x * y for x, y in pairs) / sum(x * x for x, _ in pairs)


def _power_claim(seeds: Sequence[Found]) -> Result:
    power = interval([fitted_power(found[STEPS].sharpness) for found in seeds])
    early = interval([fitted_power(found[SETTLED].sharpness) for found in seeds])
    return Result(
        "The same rule takes the sharpness measured here at the end to the published ratios of qk, "
        "ffn and vo (gate: the closest p is between 0.45 and 0.75)",
        "derived",
        f"p = {power.text('.2f')}, at step {SETTLED} {early.text('.2f')} ({power.n} seeds)",
        judge(power, above=0.45, below=0.75),
    )


def _levels(seeds: Sequence[Found], step: int) -> str:
    parts = (
        f"{kind} {statistics.geometric_mean(f[step].sharpness[kind] for f in seeds):.1e}"
        for kind in TYPES
    )
    return f"S at step {step}: {', '.join(parts)}"


if __name__ == "__main__":
    show(claims())
