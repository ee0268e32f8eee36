"""What a verdict is made of: loss, failures, window and cost, each judged on its own.

halfulp.sweep.verdict has the rules as a table.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.sweep.cost import expected_attempts, success_lower_bound
from halfulp.sweep.evidence import Evidence
from halfulp.sweep.failures import Failures
from halfulp.sweep.interval import LEVEL, Interval
from halfulp.sweep.money import Cost, Money
from halfulp.sweep.ranges import Range

if TYPE_CHECKING:
    from halfulp.sweep.table import Row

PASS, FAIL, UNKNOWN = "pass", "fail", "could not tell"
MOST = 64  # times as many seeds is as far as one looks for an answer
_MOST_SEEDS = 1000
_SHOWN = 0.9  # the success probability that a reader is told how to show


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One part of a verdict with the figures behind it and those that would change it.

    `name`: loss, failures, window or cost.
    """

    name: str
    status: str
    text: str
    changes: tuple[str, ...] = ()


def overall(statuses: Sequence[str]) -> str:
    """fail if one fails, else could not tell if one cannot, else pass."""
    return next((s for s in (FAIL, UNKNOWN) if s in statuses), PASS)


def judge_loss(rows: "Sequence[Row]", bar_nats: float, level: float) -> Criterion:
    """The paired gap at each recipe's own best learning rate, on the data set where it is worst.

    The intervals of `rows` are at `level`.
    """
    order = (FAIL, UNKNOWN, PASS)
    judged = [_judge_gap(row.gap, bar_nats, level, _on(row, rows)) for row in rows]
    return min(judged, key=lambda c: order.index(c.status))


def _judge_gap(gap: Interval | None, bar_nats: float, level: float, on: str) -> Criterion:
    if gap is None:
        return Criterion(name="loss", status=UNKNOWN, text=f"no loss to compare{on}")
    ends = f"[{_nats(gap.low)}, {_nats(gap.high)}]"
    text = f"loss {_nats(gap.value)} nats {ends}{on} against a bar of {bar_nats:g}"
    status, changes = _against(gap, bar_nats, level)
    return Criterion(name="loss", status=status, text=text, changes=changes)


def _against(gap: Interval, bar_nats: float, level: float) -> tuple[str, tuple[str, ...]]:
    if gap.high < bar_nats:
        certain = f"a bar below {_nats(gap.high)} nats would not be met for certain"
        return PASS, (certain,) if gap.high > 0 else ()  # a bar is above 0
    if gap.low > bar_nats:
        return FAIL, (f"a bar above {_nats(gap.high)} nats would be met",)
    seeds = seeds_for(gap, bar_nats, level)
    found = f"no number of seeds up to {_MOST_SEEDS}" if seeds is None else f"about {seeds} seeds"
    return UNKNOWN, (f"{found} would tell on which side of the bar the loss is, if its mean stays",)


def seeds_for(gap: Interval, bar_nats: float, level: float = LEVEL) -> int | None:
    """Seeds until Student's interval no longer holds the bar, with mean and scatter as they are.

    `level`: of `gap` and of that interval. 2 where one seed says nothing about the scatter; None if
    `_MOST_SEEDS` are not enough.
    """
    from scipy.stats import t

    if gap.n < 2 or not math.isfinite(gap.high - gap.low):
        return 2
    tail, n = (1 + level) / 2, np.arange(gap.n, _MOST_SEEDS + 1)
    scatter = (gap.high - gap.low) / 2 * math.sqrt(gap.n) / t.ppf(tail, gap.n - 1)
    enough = n[t.ppf(tail, n - 1) * scatter < abs(gap.value - bar_nats) * np.sqrt(n)]
    return int(enough[0]) if len(enough) else None


def judge_failures(own: Evidence, reference: Evidence, level: float) -> Criterion:
    """Failed runs at each recipe's own best learning rate; the answer must hold for lost runs.

    Fisher's exact test is at 1 − `level`.
    """
    mine, theirs = own.failures, reference.failures
    text = f"{_failed(mine)}; of {reference.recipe} {theirs.failed} of {theirs.runs}{_lost(theirs)}"
    if not mine.runs or not theirs.runs:
        return Criterion(name="failures", status=UNKNOWN, text=text, changes=_again(mine, theirs))
    if _more(mine.best, theirs.worst, level):
        possible = (Failures(k, mine.runs) for k in range(mine.failed))
        fewer = max(f.failed for f in possible if not _more(f, theirs, level))
        change = f"{fewer} failures of {mine.runs} runs would not be significantly more"
        return Criterion(name="failures", status=FAIL, text=text, changes=(change,))
    if reference.hopeless:
        return Criterion(
            name="failures", status=UNKNOWN, text=text, changes=_no_yardstick(reference)
        )
    if mine.worst.failed * theirs.best.runs <= theirs.best.failed * mine.worst.runs:
        return Criterion(name="failures", status=PASS, text=text, changes=_to_show(mine))
    changes = (*_again(mine, theirs), *_to_tell(mine, theirs, level))
    return Criterion(name="failures", status=UNKNOWN, text=text, changes=changes)


def _failed(failures: Failures) -> str:
    """ "0 of 5 failed (success ≥ 0.55 at 95 % confidence, 1.11 attempts expected)"."""
    attempts = _number(expected_attempts(failures.runs - failures.failed, failures.failed))
    bound = f"success ≥ {_number(1 - failures.upper)} at 95 % confidence"
    found = f"{failures.failed} of {failures.runs} failed"
    return f"{found} ({bound}, {attempts} attempts expected){_lost(failures)}"


def _more(own: Failures, reference: Failures, level: float) -> bool:
    """Whether a larger share fails than of the reference's runs: Fisher's exact test, one-sided."""
    from scipy.stats import fisher_exact

    counts = [[f.failed, f.runs - f.failed] for f in (own, reference)]
    result: Any = fisher_exact(counts, alternative="greater")
    # 3 of 3 against 0 of 3 is exactly one in twenty.
    return result.pvalue < (1 - level) * (1 + 1e-9)


def _again(own: Failures, reference: Failures) -> tuple[str, ...]:
    lost = own.lost + reference.lost
    return (f"what the lost runs ({lost}) come to when run again",) if lost else ()


def _no_yardstick(reference: Evidence) -> tuple[str, ...]:
    where = ", ".join(reference.hopeless)
    return (
        f"other learning rates or longer runs, so that {reference.recipe} itself succeeds on "
        f"{where}: what always fails is no yardstick",
    )


def _to_tell(own: Failures, reference: Failures, level: float) -> tuple[str, ...]:
    """How many runs would make the observed difference significant."""
    if own.failed * reference.runs <= reference.failed * own.runs:
        return ()
    for factor in range(2, MOST):
        larger = [Failures(f.failed * factor, f.runs * factor) for f in (own, reference)]
        if _more(larger[0], larger[1], level):
            return (f"{larger[0].runs} runs with the same shares would show that more fail",)
    return ()


def _to_show(own: Failures) -> tuple[str, ...]:
    if _succeed(own.runs, own.failed) >= _SHOWN:
        return ()
    enough = (n for n in range(own.runs, 1000) if _succeed(n, own.failed) >= _SHOWN)
    text = f"runs without a further failure would show that {_percent(_SHOWN)} of them succeed"
    return tuple(f"{runs} {text}" for runs in itertools.islice(enough, 1))


def _succeed(runs: int, failed: int) -> float:
    return success_lower_bound(runs - failed, failed)


def judge_window(own: Evidence, reference: Evidence) -> Criterion:
    """Whether there is a learning rate at which the recipe comes near the reference's best loss."""
    window = own.window
    if window is None:
        text = "no window of learning rates is known"
        return Criterion(name="window", status=UNKNOWN, text=text)
    text = f"window {window}"
    if reference.window is not None:
        text += f", of {reference.recipe} {reference.window}"
    wider = ("a grid that reaches further: the window ends at its edge",)
    changes = wider if window.open_ended else ()
    if window.low > 0:
        return Criterion(name="window", status=PASS, text=text, changes=changes)
    if window.high == 0:
        text = f"no learning rate within {window.delta_nats:.3f} nats of {reference.recipe}'s best"
        change = ("a learning rate that the grid does not have",)
        return Criterion(name="window", status=FAIL, text=text, changes=change)
    more = ("more seeds: the window may be empty",)
    return Criterion(name="window", status=UNKNOWN, text=text, changes=(*more, *changes))


def judge_cost(cost: Cost, money: Money) -> Criterion:
    """Whether one successful run costs less than with the reference, failures counted."""
    ratio, even = cost.ratio, cost.break_even
    if ratio is None or even is None:
        pays = f"; it pays above r = {_figure(even)}" if even else ""
        return Criterion(name="cost", status=UNKNOWN, text=f"{cost.missing}{pays}")
    published = "" if money.speed_is_given(cost.recipe) else ", published"
    text = (
        f"{_figure(ratio, '×')} of {money.reference}'s cost at r = {_figure(cost.speedup)}"
        f"{published}; stops paying below r = {_figure(even)}"
    )
    status = PASS if ratio.high < 1 else FAIL if ratio.low > 1 else UNKNOWN
    return Criterion(name="cost", status=status, text=text, changes=_paying(status, cost, money))


def _paying(status: str, cost: Cost, money: Money) -> tuple[str, ...]:
    even = cost.break_even
    if even is None:
        return ()
    if status == FAIL:
        return (f"a speed-up above r = {_number(even.low)} might pay",)
    if status == PASS:
        return (f"a speed-up below r = {_number(even.high)} would not pay for certain",)
    certain = f"a speed-up above r = {_number(even.high)} would pay for certain"
    return (*_settled(cost, money), *([certain] if math.isfinite(even.high) else []))


def _settled(cost: Cost, money: Money) -> tuple[str, ...]:
    """How many seeds would show whether it pays."""
    factor = 2
    while factor <= MOST:
        ratio = money.with_seeds(cost.recipe, factor).ratio
        if ratio is not None and not ratio.low <= 1 <= ratio.high:
            times = "twice" if factor == 2 else f"{factor} times"
            answer = "pays" if ratio.high < 1 else "does not pay"
            return (f"{times} as many seeds with the same shares would show that it {answer}",)
        factor *= 2
    return ("more seeds alone would not tell",)


def _figure(figure: Range | None, unit: str = "") -> str:
    """ "1.35", "0.79× [0.70, 0.91]"."""
    if figure is None:
        return "?"
    ends = f" [{_number(figure.low)}, {_number(figure.high)}]"
    return f"{_number(figure.value)}{unit}{'' if figure.low == figure.high else ends}"


def _number(value: float) -> str:
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}"


def _nats(value: float) -> str:
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:+.3f}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{share:.0%}".replace("%", " %")


def _on(row: "Row", rows: "Sequence[Row]") -> str:
    return f" on {row.data}" if len(rows) > 1 else ""


def _lost(failures: Failures) -> str:
    return f", {failures.lost} lost" if failures.lost else ""
