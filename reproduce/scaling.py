"""Scaling laws: published ones recomputed, how distinct sequences grow, and a small isoFLOP set.

Set-up. Published laws are evaluated by halfulp.plan and compared with what the papers print. The
corpus is that of the environment's own Python files, different ones in a random order;
distinct n-token sequences (BPE of 32 768 tokens, trained on the standard library) are counted by
halfulp.corpus with documents in random order, and the local exponent is f1 / U, the share of the
distinct sequences that lie in one document only, ± its jackknife error over 16 groups of documents.
The isoFLOP set is `halfulp train` in fp32 on bytes of the standard library, less than one epoch:
qwen3-tiny in two layers of width 32, 64 or 96, five budgets of compute, a second seed at two of
them, rate 0.25 / width, cosine, 512 tokens a step, evaluated on the same 65 536 held-out tokens; N
counts all parameters. A first set that mixed models of one and of two layers left residuals of 3%,
which is why shape has a claim of its own. Bands are of 1000 resamples of the fitted runs.
"""

import math
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from reproduce.common import REFUTED, REPRODUCED, UNKNOWN, Interval, Result, judge, show, together
from reproduce.isoflop import LENGTH, cpu_seconds, fitted, held_out, shallow, trained
from reproduce.local_text import python_files
from reproduce.published_laws import HOFFMANN, KAUSIK, published

if TYPE_CHECKING:
    from halfulp.corpus.tally import Tally
    from halfulp.plan.bootstrap import Bootstrap
    from halfulp.plan.runs_table import Runs

KEEPS_RUNS = True
ORDERS = (1, 2, 3, 4, 5, 8, 16)
DRAWS = 1000
HALVES = 16
HELD_OUT_TOKENS = 8192  # of the model whose parameters are zeroed


def claims() -> Iterator[Result]:
    """What the papers print, what a corpus does, and what our own runs do."""
    yield from published()
    yield from corpus()
    yield from isoflop()


def corpus() -> Iterator[Result]:
    """How distinct sequences grow with a corpus."""
    yield _band_of_orders()
    yield _rises_with_order()
    yield _doubled_corpus()


@cache
def counted() -> tuple[Mapping[int, "Tally"], int]:
    """(n → the distinct n-token sequences, bytes of text) of the local corpus."""
    from halfulp.corpus.config import CountConfig
    from halfulp.corpus.count import count
    from halfulp.data import DataConfig, open_data
    from halfulp.numerics.kernel import cache_directory

    own = open_data(DataConfig(tokenizer="bpe:32768"), cache_directory() / "data").describe()
    config = CountConfig(tokens=ORDERS, tokenizer=own["tokenizer"]["path"])
    found = count(python_files(), config)
    return {n: found.tallies[f"tokens:{n}"] for n in ORDERS}, found.text_bytes


def exponents() -> dict[int, Interval]:
    """n → f1 / U with its 95% interval."""
    from halfulp.corpus.growth import growth

    found = {}
    for n, tally in counted()[0].items():
        g = growth(f"tokens:{n}", tally)
        value, half = g.slope or math.nan, 1.96 * (g.slope_se or math.nan)
        found[n] = Interval(value, value - half, value + half, 16)
    return found


def _said(values: Mapping[int, Interval]) -> str:
    tallies, size = counted()
    tokens = tallies[1].occurrences
    each = ", ".join(f"n = {n}: {x.text('.3f')}" for n, x in values.items())
    return f"{each} ({size / 1e6:.0f} MB, {tokens / 1e6:.1f} M tokens)"


def _band_of_orders() -> Result:
    values = exponents()
    verdicts = {n: judge(x, above=0.44, below=0.72) for n, x in values.items()}
    alike = set(verdicts.values())
    inside = [str(n) for n, v in verdicts.items() if v == REPRODUCED]
    return Result(
        "the distinct sequences of a corpus grow as D^γ with γ from 0.44 to 0.72",
        f"{KAUSIK}, abstract of v4, read as n-token sequences; the paper names no n",
        f"{_said(values)}; inside the band: n = {', '.join(inside) or 'none'}",
        alike.pop() if len(alike) == 1 else UNKNOWN,
    )


def _rises_with_order() -> Result:
    values = {n: x for n, x in exponents().items() if n >= 2}
    ordered = list(values.values())
    # Errors of neighbors are positively correlated: taken as independent they are too wide.
    steps = [
        Interval(b.mean - a.mean, b.mean - a.mean - half, b.mean - a.mean + half, 16)
        for a, b in pairwise(ordered)
        for half in [math.hypot(a.high - a.mean, b.high - b.mean)]
    ]
    rising = together(*(judge(step, above=0.0) for step in steps))
    near = [judge(values[n], above=0.35, below=0.75) for n in (2, 3)]
    band = REPRODUCED if REPRODUCED in near else together(*near)
    return Result(
        "no one exponent: it rises with n from 2 on, and lies in [0.35, 0.75] for n = 2 or 3",
        "our own finding on 969 MB, to be confirmed on another corpus",
        _said(values),
        together(rising, band),
    )


def _doubled_corpus() -> Result:
    errors = {n: _doubling_errors(tally) for n, tally in counted()[0].items() if n >= 2}
    inside = {n: [abs(off) <= 0.03 for off in found] for n, found in errors.items()}
    ranges = (f"{min(e):+.1%} to {max(e):+.1%} (n = {n})" for n, e in errors.items())
    refuted = any(not any(found) for found in inside.values())
    reproduced = all(all(found) for found in inside.values())
    return Result(
        "twice the corpus holds 2^(f1/U) times as many distinct sequences, to 3%",
        "Good and Turing; our own gate",
        f"{HALVES} random halves, asked for the whole, are off by {', '.join(ranges)} "
        "(reproduced if all are within the gate, not if all of one n are outside)",
        REFUTED if refuted else REPRODUCED if reproduced else UNKNOWN,
    )


def _doubling_errors(tally: "Tally") -> list[float]:
    """Predicted over actual distinct sequences of the whole, less 1, from random halves."""
    from halfulp.corpus.growth import Record
    from halfulp.corpus.tally import GROUPS

    record, rng = Record(tally), np.random.default_rng(0)
    whole, found = record.part(), []
    for _ in range(HALVES):
        half = record.part(groups=rng.permutation(GROUPS) < GROUPS // 2)
        predicted = (whole.occurrences / half.occurrences) ** half.slope
        found.append(predicted * half.distinct / whole.distinct - 1)
    return found


def isoflop() -> Iterator[Result]:
    """Our own runs, fitted, and two larger ones predicted."""
    yield _describes()
    yield _exponent()
    yield _larger()
    yield _shape()
    yield _negligible()
    yield _cost()


@cache
def boot() -> "Bootstrap":
    """The law of the isoFLOP set and its resamples."""
    from halfulp.plan.bootstrap import bootstrap
    from halfulp.plan.fit import fit
    from halfulp.plan.run_directories import read_runs

    return bootstrap(fit(read_runs(trained(fitted()))), DRAWS)


def _describes() -> Result:
    """Lack of fit over pure error, the difference of the seeds (Draper & Smith 1998, §2.1)."""
    from scipy.stats import f as f_distribution

    fit = boot().fit
    pairs = [fit.residuals[same] for same in _by_place(fit.runs)]
    pure = sum(float(((r - r.mean()) ** 2).sum()) for r in pairs)
    lack = sum(len(r) * float(r.mean()) ** 2 for r in pairs)
    free_pure, free_lack = len(fit.residuals) - len(pairs), len(pairs) - 5
    ratio = (lack / free_lack) / (pure / free_pure)
    chance = float(f_distribution.sf(ratio, free_lack, free_pure))
    c = fit.law
    return Result(
        "L = E + A/N^α + B/D^β describes models of 0.03 to 0.25 M parameters as it does large ones",
        f"{HOFFMANN}, equation 2, taken to small models",
        f"E = {c.E:.3f}, A = {c.A:.4g}, B = {c.B:.4g}, α = {c.alpha:.3f}, β = {c.beta:.3f}; "
        f"residuals {fit.spread:.2%}, of which the seed makes {math.sqrt(pure / free_pure):.2%}; "
        f"lack of fit F = {ratio:.1f} ({free_lack} and {free_pure} degrees of freedom), chance "
        f"{chance:.1g} (reproduced from 0.05, not below 0.001)",
        REPRODUCED if chance >= 0.05 else REFUTED if chance < 1e-3 else UNKNOWN,
    )


def _by_place(runs: "Runs") -> list[np.ndarray]:
    places = list(zip(runs.parameters.tolist(), runs.tokens.tolist(), strict=True))
    return [np.array([place == other for other in places]) for place in dict.fromkeys(places)]


def _exponent() -> Result:
    band = boot().band(lambda law: law.exponent, 0.95)
    found = Interval(band.value, band.low, band.high, len(boot().fit.runs))
    return Result(
        "the best N grows as C^a with a from 0.46 to 0.50",
        f"{HOFFMANN}, table 2, taken to small models",
        f"a = {found.text('.3f')}",
        judge(found, above=0.46, below=0.50),
    )


def _larger() -> Result:
    from halfulp.plan.run_directories import read_runs

    runs = read_runs(trained(held_out()))
    n, d = float(runs.parameters[0]), float(runs.tokens[0])
    law, run = boot().loss(n, d), boot().run_loss(n, d)
    inside = [run.holds(float(loss)) for loss in runs.loss_nats]
    reach = float(runs.flops.max() / boot().fit.runs.flops.max())
    off = [f"{loss:.4f} ({loss / law.value - 1:+.1%})" for loss in runs.loss_nats]
    return Result(
        f"a run of {reach:.0f} times the compute lies inside the 80% band that the small runs give",
        "halfulp plan fit",
        f"N = {n / 1e6:.2f} M, D = {d / 1e6:.1f} M: predicted {law.value:.4f}, band of the law "
        f"[{law.low:.4f}, {law.high:.4f}], of one run [{run.low:.4f}, {run.high:.4f}]; measured "
        f"{', '.join(off)} for two seeds",
        REPRODUCED if all(inside) else UNKNOWN if any(inside) else REFUTED,
    )


def _shape() -> Result:
    from halfulp.plan.run_directories import read_runs

    runs = read_runs(trained(shallow()))
    off = np.log(runs.loss_nats / np.asarray(boot().fit.law.loss(runs.parameters, runs.tokens)))
    gate = 3 * boot().fit.spread
    said = [
        f"{100 * x:+.1f}% (N = {n / 1e6:.2f} M)" for x, n in zip(off, runs.parameters, strict=True)
    ]
    return Result(
        "the loss depends on N and D, and hardly on the shape of the model",
        "arXiv:2001.08361, section 3.1, taken to small models",
        f"one layer, against the law of two layers: {', '.join(said)}; gate: three times what one "
        f"run is off by, {gate:.1%}",
        REPRODUCED if np.abs(off).max() <= gate else REFUTED,
    )


def _negligible() -> Result:
    from halfulp.cli.load import load_model
    from halfulp.plan.sparsity import ALL, RULES, sparsity

    loaded = load_model(str(trained(held_out()[:1])[0]), tokens=HELD_OUT_TOKENS)
    texts = (ids.reshape(-1, LENGTH) for ids in (loaded.text, loaded.held_out))
    found = sparsity(loaded.model, *texts)
    rows = [found.row(ALL, rule) for rule in RULES]
    said = [f"{r.share:.1%} by {r.rule} ({r.rise_nats:+.4f} ± {r.rise_se:.4f} nats)" for r in rows]
    return Result(
        "most parameters of a trained model are negligible",
        f"{KAUSIK}, abstract of v4",
        f"zeroed for {found.budget_nats:g} nats/token without training again, in a run of "
        f"{sum(found.parameters.values()) / 1e6:.2f} M parameters on {found.tokens:,} held-out "
        f"tokens: {', '.join(said)} (gate: half of them)",
        REPRODUCED if max(r.share for r in rows) >= 0.5 else REFUTED,
    )


def _cost() -> Result:
    points = [*fitted(), *held_out(), *shallow()]
    seconds: dict[tuple[float, int, int], list[float]] = {}
    for point, path in zip(points, trained(points), strict=True):
        seconds.setdefault((point.flops, point.hidden, point.layers), []).extend(cpu_seconds(path))
    known = sum(map(len, seconds.values()))
    # A run that says nothing took as long as the one that differs in the seed only.
    places = [seconds[p.flops, p.hidden, p.layers] for p in points]
    minutes = sum(float(np.mean(s)) if s else math.nan for s in places) / 60
    return Result(
        "the whole set takes less than 20 minutes on two cores",
        "our own gate",
        f"{len(points)} runs, {minutes:.1f} minutes of CPU time or {minutes / 2:.1f} on two cores "
        f"({known} of the runs say what they took)",
        UNKNOWN if math.isnan(minutes) else REPRODUCED if minutes / 2 < 20 else REFUTED,
    )


if __name__ == "__main__":
    show(claims())
