"""May this recipe replace the reference: one sentence per recipe, pass, fail or could not tell.

loss      pass  on every data set the whole 95 % interval of the paired gap is below the bar
          fail  on one data set all of it is above
failures  pass  no larger share of runs failed than of the reference's
          fail  a significantly larger share did (Fisher's exact test, one-sided, 5 %)
window    pass  its interval is above 0: some learning rate comes near the reference's best loss
          fail  it is 0: none does
cost      pass  the whole interval of the ratio of costs is below 1
          fail  all of it is above
verdict   pass  all of these pass
          fail  one fails

Whatever is neither could not tell.
Gap and failures are at each recipe's own best learning rate. Lost runs count as they hurt most: a
pass holds when the recipe's lost runs all failed and the reference's did not, a fail when it is the
other way round. Without inputs on money the cost is not judged; without a speed-up it could not
tell. A recipe that the model cannot take could not tell, and has no criteria. A pass is no proof of
stability: the sentence has the bound, and how much of the user's run the evidence covers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfulp.errors import ConfigError
from halfulp.sweep import cost
from halfulp.sweep.criteria import (
    UNKNOWN,
    Criterion,
    judge_cost,
    judge_failures,
    judge_loss,
    judge_window,
    overall,
)
from halfulp.sweep.evidence import Evidence, gather, rows_of
from halfulp.sweep.money import Money

if TYPE_CHECKING:
    from halfulp.sweep.table import Table


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A verdict with its sentence, the criteria behind it and the numbers that would change it.

    `horizon`: tokens of one run of the sweep over those of the user's run; None if not given.
    """

    recipe: str
    status: str
    sentence: str
    criteria: tuple[Criterion, ...] = ()
    changes: tuple[str, ...] = ()
    horizon: float | None = None

    def __str__(self) -> str:
        return self.sentence


def verdicts(
    table: "Table", money: Money | None = None, *, bar_nats: float = 0.01
) -> tuple[Verdict, ...]:
    """The verdict on every recipe but the reference, in the order of the table.

    `bar_nats`: the loss that a recipe may cost, in nats per token. With `money` the cost is judged
    too. Raises ConfigError for a bar that is not above 0.
    """
    if not bar_nats > 0:
        raise ConfigError(
            f"bar_nats = {bar_nats} cannot be met by chance or by merit. Give a loss > 0, "
            "such as 0.01 nats per token."
        )
    others = [recipe for recipe in table.recipes if recipe != table.reference]
    return tuple(_verdict(table, recipe, money, bar_nats) for recipe in others)


def _verdict(table: "Table", recipe: str, money: Money | None, bar_nats: float) -> Verdict:
    own, reference = gather(table, recipe), gather(table, table.reference)
    if own.refused:
        sentence = f"{recipe}: {UNKNOWN}, the model cannot take it: {own.refused}"
        return Verdict(recipe=recipe, status=UNKNOWN, sentence=sentence)
    criteria = [
        judge_loss(rows_of(table, recipe), bar_nats),
        judge_failures(own, reference),
        judge_window(own, reference),
    ]
    bill = money.cost(recipe) if money else None
    if money and bill:
        criteria.append(judge_cost(bill, money))
    status = overall([c.status for c in criteria])
    tokens = money.inputs.tokens if money else None
    # What decides comes first.
    told = sorted(criteria, key=lambda c: c.status != status)
    parts = [*(c.text for c in told), *_coverage(own, tokens)]
    return Verdict(
        recipe=recipe,
        status=status,
        sentence=f"{recipe}: {status}, {'; '.join(parts)}",
        criteria=tuple(criteria),
        changes=(*(change for c in told for change in c.changes), *_horizon(own, tokens)),
        horizon=own.tokens / tokens if tokens else None,
    )


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
