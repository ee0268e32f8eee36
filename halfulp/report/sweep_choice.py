"""What the decision page is about: the recipe to introduce, if any, and its evidence in words."""

import math
from dataclasses import dataclass
from functools import cached_property

from halfulp.report.amounts import digits
from halfulp.report.price import PASS, UNKNOWN
from halfulp.report.sweep_page import Judged
from halfulp.report.sweep_words import TEXTS
from halfulp.sweep.cost import success_lower_bound
from halfulp.sweep.evidence import Evidence, gather, rows_of
from halfulp.sweep.money import Cost
from halfulp.sweep.row import Row
from halfulp.sweep.verdict import Verdict
from halfulp.sweep.window import Window

SHOWN = 0.9  # the share of successful runs that a plan wants shown
_MOST_RUNS = 1000
_LARGE = {
    "en": ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")),
    "ja": ((1e12, "兆"), (1e8, "億"), (1e4, "万")),
}


@dataclass(frozen=True)
class Choice:
    """A judged sweep seen by whoever decides, in one language.

    The subject is the recipe that passes at the least cost, or else the most promising of those
    that could not be told; "" where all failed or were refused.
    """

    judged: Judged
    language: str

    def say(self, key: str, **fields: object) -> str:
        """The text `key` in the language of the page."""
        return TEXTS[self.language][key].format(**fields)

    @property
    def reference(self) -> str:
        return self.judged.table.reference

    @cached_property
    def verdict(self) -> Verdict | None:
        """The subject's."""
        for status in (PASS, UNKNOWN):
            open_ = [v for v in self.judged.verdicts if v.status == status and self._has_runs(v)]
            if open_:
                return min(open_, key=self._rank)
        return None

    @property
    def subject(self) -> str:
        return self.verdict.recipe if self.verdict else ""

    def _has_runs(self, verdict: Verdict) -> bool:
        return any(row.done and not row.refused for row in self.rows(verdict.recipe))

    def _rank(self, verdict: Verdict) -> tuple[float, float]:
        cost, row = self.cost(verdict.recipe), self.worst(verdict.recipe)
        ratio = cost.ratio.value if cost and cost.ratio else math.inf
        return ratio, row.gap.value if row and row.gap else math.inf

    def rows(self, recipe: str) -> list[Row]:
        """One row per data set."""
        return rows_of(self.judged.table, recipe)

    def worst(self, recipe: str) -> Row | None:
        """The row of the data set that decides on the loss; any if there is no gap.

        One whose gap is above the bar for certain before one that may be, and then the largest.
        """
        rows = self.rows(recipe)
        compared = [row for row in rows if row.gap is not None]
        if not compared:
            return rows[0] if rows else None
        return max(compared, key=self._harm)

    def _harm(self, row: Row) -> tuple[bool, bool, float]:
        assert row.gap is not None
        bar = self.judged.bar_nats
        return row.gap.low > bar, row.gap.high >= bar, row.gap.value

    def evidence(self, recipe: str) -> Evidence:
        """All data sets together."""
        return gather(self.judged.table, recipe)

    def cost(self, recipe: str) -> Cost | None:
        """The bill; None where nothing was said about money."""
        return self.judged.bills.cost(recipe) if self.judged.bills else None

    def octaves(self, window: Window | None) -> str:
        """The width of a window in words."""
        if window is None:
            return self.say("unknown")
        if not window.octaves and not window.open_ended:
            return self.say("no_window")
        text = self.say("octaves", octaves=f"{window.octaves:.1f}")
        return self.say("at_least", octaves=text) if window.open_ended else text

    def large(self, value: float) -> str:
        """A large count in the words of the language: "2 trillion", "164 thousand" as digits."""
        for size, word in _LARGE[self.language]:
            if value >= size * 0.9995:
                space = " " if self.language == "en" else "\u00a0"
                return f"{digits(value / size)}{space}{word}"
        return f"{value:,.0f}"


def runs_to_show(runs: int, failed: int) -> int | None:
    """Runs in all, no further one failing, that show a success of `SHOWN`; None if too many."""
    enough = (
        n
        for n in range(max(runs, 1), _MOST_RUNS)
        if success_lower_bound(n - failed, failed) >= SHOWN
    )
    return next(enough, None)


def percent(share: float) -> str:
    """A round share as percent: "5 %", "0.001 %"."""
    return f"{100 * share:.2g}\u00a0%"
