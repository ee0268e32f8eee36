"""May this recipe replace the reference: one sentence per recipe, pass, fail or could not tell.

loss      pass  on every data set the whole interval of the paired gap is below the bar
          fail  on one data set all of it is above
failures  pass  no larger share of runs failed than of the reference's, some of whose runs succeed
                on every data set
          fail  a significantly larger share did (Fisher's exact test, one-sided)
window    pass  its interval is above 0: some learning rate comes near the reference's best loss
          fail  it is 0: none does
cost      pass  the whole interval of the ratio of costs is below 1
          fail  all of it is above
verdict   pass  all of these pass
          fail  one fails

Whatever is neither could not tell.
Of m recipes each is judged at the level 1 − 5 % / m, its intervals and Fisher's test, so that what
is said of all of them holds together at 95 % (Bonferroni; refused recipes do not count).
Gap and failures are at each recipe's own best learning rate. In failures and cost lost runs count
as they hurt most: a pass holds when the recipe's lost runs all failed and the reference's did not,
a fail when it is the other way round. Loss and window are those of the known runs. Without inputs
on money the cost is not judged; without a speed-up it could not tell. A recipe that the model
cannot take could not tell, and has no criteria. A pass is no proof of stability: the sentence has
the bound, and how much of the user's run the evidence covers.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfulp.errors import ConfigError
from halfulp.sweep import cost
from halfulp.sweep.criteria import (
    FAIL,
    PASS,
    UNKNOWN,
    Criterion,
    judge_cost,
    judge_failures,
    judge_loss,
    judge_window,
    overall,
)
from halfulp.sweep.evidence import Evidence, evidence_of
from halfulp.sweep.interval import LEVEL
from halfulp.sweep.money import Money

if TYPE_CHECKING:
    from halfulp.sweep.row import Row
    from halfulp.sweep.table import Table


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict with its sentence, the criteria behind it and the numbers that would change it.

    `horizon`: tokens of one run of the sweep over those of the user's run; None if not given.
    `level`: of each interval in it, as one of `comparisons` recipes; `alone`: its status if it were
    the only one, at 95 %.
    """

    recipe: str
    status: str
    sentence: str
    criteria: tuple[Criterion, ...] = ()
    changes: tuple[str, ...] = ()
    horizon: float | None = None
    level: float = LEVEL
    comparisons: int = 1
    alone: str = UNKNOWN

    def __str__(self) -> str:
        return self.sentence


def verdicts(
    table: "Table", money: Money | None = None, *, bar_nats: float = 0.01
) -> tuple[Verdict, ...]:
    """The verdict on every recipe but the reference, in the order of the table.

    `bar_nats`: the loss that a recipe may cost, in nats per token. With `money` the cost is judged
    too. Raises ConfigError for a bar that is not finite and above 0.
    """
    if not 0 < bar_nats < math.inf:
        raise ConfigError(
            f"bar_nats = {bar_nats} tells nothing apart. Give a finite loss > 0, such as 0.01 nats "
            "per token."
        )
    others = [recipe for recipe in table.recipes if recipe != table.reference]
    rows = table.rows()
    refused = {row.recipe for row in rows if row.refused}
    comparisons = max(1, len([recipe for recipe in others if recipe not in refused]))
    level = joint_level(comparisons)
    together = _Bench(
        table.rows(level), table.reference, money and money.at(level), bar_nats, level
    )
    alone = _Bench(rows, table.reference, money, bar_nats, LEVEL)
    return tuple(_verdict(recipe, together, alone, comparisons) for recipe in others)


def joint_level(comparisons: int) -> float:
    """The level of each of so many intervals that hold together at `LEVEL` (Bonferroni)."""
    return 1 - (1 - LEVEL) / comparisons


@dataclass(frozen=True)
class _Bench:
    """What recipes are judged on: rows and bills with intervals at `level`."""

    rows: "tuple[Row, ...]"
    reference: str
    money: Money | None
    bar_nats: float
    level: float

    def evidence(self, recipe: str) -> Evidence:
        return evidence_of(recipe, self._rows(recipe))

    def criteria(self, recipe: str) -> list[Criterion]:
        own, reference = self.evidence(recipe), self.evidence(self.reference)
        found = [
            judge_loss(self._rows(recipe), self.bar_nats, self.level),
            judge_failures(own, reference, self.level),
            judge_window(own, reference),
        ]
        bill = self.money.cost(recipe) if self.money else None
        return [*found, judge_cost(bill, self.money)] if self.money and bill else found

    def _rows(self, recipe: str) -> "list[Row]":
        return [row for row in self.rows if row.recipe == recipe]


def _verdict(recipe: str, bench: _Bench, alone: _Bench, comparisons: int) -> Verdict:
    own = bench.evidence(recipe)
    if own.refused:
        sentence = f"{recipe}: {UNKNOWN}, the model cannot take it: {own.refused}"
        return Verdict(recipe=recipe, status=UNKNOWN, sentence=sentence)
    criteria = bench.criteria(recipe)
    status = overall([c.status for c in criteria])
    by_itself = status
    if comparisons > 1:
        by_itself = overall([c.status for c in alone.criteria(recipe)])
    tokens = bench.money.inputs.tokens if bench.money else None
    # What decides comes first.
    told = sorted(criteria, key=lambda c: c.status != status)
    parts = [*(c.text for c in told), *_family(bench.level, comparisons), *_coverage(own, tokens)]
    changes = [change for c in told for change in c.changes]
    return Verdict(
        recipe=recipe,
        status=status,
        sentence=f"{recipe}: {status}, {'; '.join(parts)}",
        criteria=tuple(criteria),
        changes=(*_by_itself(status, by_itself, comparisons), *changes, *_horizon(own, tokens)),
        horizon=own.tokens / tokens if tokens else None,
        level=bench.level,
        comparisons=comparisons,
        alone=by_itself,
    )


def _family(level: float, comparisons: int) -> list[str]:
    if comparisons == 1:
        return []
    each = percent_of(level)
    return [f"one of {comparisons} recipes, each judged at {each} so that 95 % holds for all"]


def percent_of(level: float) -> str:
    """A level as text: "95 %", "98.3 %"."""
    return f"{100 * level:.3g} %"


def _by_itself(status: str, alone: str, comparisons: int) -> tuple[str, ...]:
    if status == alone:
        return ()
    would = {PASS: "pass", FAIL: "fail"}.get(alone, "not be told")
    return (f"alone, at 95 %, it would {would}; with {comparisons} recipes chance may do that",)


def _coverage(own: Evidence, tokens: float | None) -> list[str]:
    parts = []
    if own.missing:
        parts.append(f"{own.missing} of {own.planned} runs are not done")
    if tokens:
        percent = f"{100 * own.tokens / tokens:.2g}".replace("e-0", "e-")
        covered = "all" if own.tokens >= tokens else f"{percent} %"
        parts.append(f"evidence covers {covered} of your run")
    return parts


def _horizon(own: Evidence, tokens: float | None) -> tuple[str, ...]:
    """Tokens without a failure that would show a success probability of 0.9 for the user's run."""
    if not tokens:
        return ()
    needed = cost.tokens_needed(0.9, tokens)
    seen = own.tokens * own.failures.runs
    if own.failures.failed == 0 and seen >= needed:
        return ()
    return (
        f"{needed:.2g} tokens without a failure would show that 90 % of your runs succeed; "
        f"the runs at its best learning rate have {seen:.2g}",
    )
