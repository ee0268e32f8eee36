"""What every script shares: a result, intervals over seeds, and the rule behind a verdict.

A verdict is "reproduced" when the whole interval lies inside the gate, "not reproduced" when it
lies outside, and "could not tell" otherwise.
"""

import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

REPRODUCED, REFUTED, UNKNOWN = "reproduced", "not reproduced", "could not tell"
FALSE_ALARM = 1e-3  # a test of exactness fails by chance this often

# 97.5% quantiles of Student's t for 1, 2, … degrees of freedom.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One claim: where it stands, what was measured, and the verdict."""

    claim: str
    source: str
    measured: str
    verdict: str


@dataclass(frozen=True)
class Interval:
    """A mean over `n` independent values and its 95% interval."""

    mean: float
    low: float
    high: float
    n: int

    def text(self, spec: str) -> str:
        """Mean and bounds, each formatted as `spec` says."""
        return f"{self.mean:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __str__(self) -> str:
        return self.text("+.3f")


def interval(values: Sequence[float]) -> Interval:
    """Student's 95% interval of the mean of at least two values."""
    n, mean = len(values), statistics.fmean(values)
    quantile = _STUDENT[n - 2] if n - 2 < len(_STUDENT) else 2.08
    half = quantile * statistics.stdev(values) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def difference(left: Sequence[float], right: Sequence[float]) -> Interval:
    """Interval of left − right, paired by seed."""
    return interval([a - b for a, b in zip(left, right, strict=True)])


def judge(x: Interval, *, above: float = -math.inf, below: float = math.inf) -> str:
    """The verdict on `above` ≤ x ≤ `below`."""
    if above <= x.low and x.high <= below:
        return REPRODUCED
    return REFUTED if x.high < above or x.low > below else UNKNOWN


def together(*verdicts: str) -> str:
    """The verdict on a claim with several parts: as good as its worst part."""
    for verdict in (REFUTED, UNKNOWN):
        if verdict in verdicts:
            return verdict
    return REPRODUCED


def judge_share(part: Sequence[float], whole: Sequence[float], gate: float) -> tuple[str, str]:
    """(measured, verdict) on mean(part) ≥ gate · mean(whole), values paired by seed.

    A share of something that may be zero says nothing: without a `whole` above 0 nobody can tell.
    """
    total = interval(whole)
    if total.low <= 0:
        return f"{interval(part)} of {total}: the whole is not above 0", UNKNOWN
    share = statistics.fmean(part) / total.mean
    excess = interval([p - gate * w for p, w in zip(part, whole, strict=True)])
    text = f"{share:.0%} of {total} (gate {gate:.0%}; excess over it {excess})"
    return text, judge(excess, above=0.0)


def judge_scores(scores: Sequence[float]) -> tuple[float, float, str]:
    """(largest |z|, probability of one as large, verdict) of independent standard scores."""
    worst = max(map(abs, scores))
    tail = math.erfc(worst / math.sqrt(2))
    chance = -math.expm1(len(scores) * math.log1p(-tail)) if tail < 1 else 1.0
    return worst, chance, REPRODUCED if chance >= FALSE_ALARM else REFUTED


def show(results: Iterator[Result]) -> list[tuple[Result, float]]:
    """Print each result when it is there; the results with the seconds each one took."""
    shown = []
    before = time.perf_counter()
    for result in results:
        seconds = time.perf_counter() - before
        print(f"{result.claim}  ({result.source})", flush=True)
        print(f"  measured: {result.measured}", flush=True)
        print(f"  verdict:  {result.verdict}  ({seconds:.0f} s)\n", flush=True)
        shown.append((result, seconds))
        before = time.perf_counter()
    return shown
