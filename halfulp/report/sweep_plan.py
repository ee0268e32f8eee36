"""The plan in stages: reference, pilot, one real run, standard; each with a gate and a way back."""

import math
from dataclasses import dataclass

from halfulp.report import words
from halfulp.report.counters import COUNTERS
from halfulp.report.html import Child, Markup, table, tag
from halfulp.report.sweep_bars import figure_of
from halfulp.report.sweep_choice import SHOWN, Choice, percent, runs_to_show
from halfulp.report.sweep_plots import rate
from halfulp.sweep.cost import expected_runs
from halfulp.sweep.defaults import ABANDONED
from halfulp.train.config import GuardSection

STAGES = (1, 2, 3, 4)
_FIRST = 0.1  # share of the first real run in the reference's precision


def plan(choice: Choice) -> Markup:
    """The stages as a table, or a sentence where there is nothing to introduce."""
    if not choice.subject:
        bar = f"{choice.judged.bar_nats:g}"
        return tag("p", choice.say("plan_none", bar=bar, reference=choice.reference))
    fields = _fields(choice)
    head: list[Child] = [*choice.say("plan_columns").split("|")]
    parts = ("stage", "do", "gate", "back")
    keys = [[f"{part}_{stage}" for part in parts] for stage in STAGES]
    if fields["allowed"] == "0":
        keys[0][2] = "gate_1_none"
    if "+" in choice.subject:
        keys[2][1] = "do_3_staged"
    if choice.judged.bills is None or choice.judged.bills.inputs.tokens is None:
        keys[3][1] = "do_4_same"
    rows: list[list[Child]] = [[choice.say(key, **fields) for key in line] for line in keys]
    return tag("div", table(head, rows, caption=choice.say("plan")), class_="plan")


def _fields(choice: Choice) -> dict[str, str]:
    own, base = choice.evidence(choice.subject), choice.evidence(choice.reference)
    low, high = _rates(choice)
    guard, marks = GuardSection(), {counter.key: counter.warn for counter in COUNTERS}
    needed = runs_to_show(int(own.failures.runs), int(own.failures.failed))
    seeds = len(choice.judged.table.seeds)
    return {
        "recipe": choice.subject,
        "reference": choice.reference,
        "bar": f"{choice.judged.bar_nats:g}",
        "seeds": str(seeds),
        "rate": _best(choice),
        "allowed": str(seeds * base.failures.failed // max(base.failures.runs, 1)),
        "spread": _spread(choice),
        "low": rate(low),
        "high": rate(high),
        "needed": str(needed or "1,000"),
        "saturation": percent(marks["saturation"]),
        "lost": percent(marks["lost_updates"]),
        "share": percent(_FIRST),
        "every": str(guard.snapshot_every),
        "raised": percent(guard.raised),
        "wasted": percent(guard.wasted),
        "speed": _speed(choice),
        "most": _most(choice),
        "failures": _failures(choice),
    }


def _rates(choice: Choice) -> tuple[float, float]:
    """The learning rates that are safe for both; the grid where none is known to be."""
    windows = [choice.evidence(name).window for name in (choice.subject, choice.reference)]
    known = [w for w in windows if w is not None and w.octaves > 0]
    lrs = choice.judged.table.lrs
    low, high = (
        max([w.lr_low for w in known] or lrs[:1]),
        min([w.lr_high for w in known] or lrs[-1:]),
    )
    return (low, high) if low <= high else (lrs[0], lrs[-1])


def _best(choice: Choice) -> str:
    best = [row.best_lr for row in choice.rows(choice.reference) if row.best_lr is not None]
    return rate(best[0]) if best else f"{rate(choice.judged.table.lrs[0])} …"


def _spread(choice: Choice) -> str:
    """How far apart the reference's seeds end 19 times in 20, in nats, by their range in the sweep.

    As many seeds again have a wider range one time in two; the factor is that of the ratio of two
    standard deviations, which ranges of few values share.
    """
    from scipy.stats import f

    known = [row for row in choice.rows(choice.reference) if row.best_lr is not None]
    spans = []
    for row in known:
        point = next(point for point in row.points if point.lr == row.best_lr)
        scores = [o.score_nats for o in point.outcomes if o.known and not o.failure]
        if (free := len(scores) - 1) > 0:
            chance = math.sqrt(f.ppf(0.95, free, free))
            spans.append(chance * (max(scores) - min(scores)))
    return words.nats(max(spans)) if spans else f"{choice.judged.bar_nats:g}"


@dataclass(frozen=True)
class _Terms:
    """What decides from where on the subject pays, in runs; `leaving`: of the reference."""

    search: float
    search_reference: float
    retries_reference: float
    tokens: float  # 1 + the share that the subject needs on top
    leaving: float
    overhead: float  # of the guard
    abandoned: float


def _terms(choice: Choice) -> _Terms | None:
    """None where the bill of either has no search for a learning rate, or nothing was asked."""
    own, base, bills = (
        choice.cost(choice.subject),
        choice.cost(choice.reference),
        choice.judged.bills,
    )
    if bills is None or own is None or base is None or own.search is None or base.search is None:
        return None
    inputs = bills.inputs
    usd = inputs.gpu_hours * inputs.price.value if inputs.gpu_hours and inputs.price else math.inf
    return _Terms(
        search=own.search.value,
        search_reference=base.search.value,
        retries_reference=base.retries.value,
        tokens=1 + inputs.extra_tokens.get(choice.subject, 0.0),
        leaving=inputs.adoption_usd / usd,
        overhead=inputs.guard.overhead if inputs.guard else 1.0,
        abandoned=choice.evidence(choice.subject).abandoned_fraction or ABANDONED,
    )


def _speed(choice: Choice) -> str:
    """The speed-up at which it pays with the success that the pilot has shown.

    Against a reference that never fails.
    """
    terms = _terms(choice)
    if terms is None:
        return choice.say("gate_3_speed", reference=choice.reference)
    runs = terms.overhead * expected_runs(SHOWN, abandoned_fraction=terms.abandoned)
    own = terms.tokens * (runs + terms.search)
    other = terms.overhead + terms.search_reference - terms.leaving
    return choice.say("gate_3_even", even=figure_of(own / other if other > 0 else math.inf))


def _most(choice: Choice) -> str:
    bills = choice.judged.bills
    return choice.large(bills.inputs.tokens) if bills and bills.inputs.tokens else ""


def _failures(choice: Choice) -> str:
    """The share of failing runs above which the recipe does not pay, by the closed form of cost."""
    terms, own = _terms(choice), choice.cost(choice.subject)
    gain = 0.0
    if terms is not None and own is not None and own.speedup is not None:
        other = terms.retries_reference + terms.search_reference - terms.leaving
        runs = own.speedup.low * other / terms.tokens - terms.search
        gain = runs / terms.overhead - 1
    if terms is None or not 0 < gain < math.inf:
        return choice.say("gate_4_reference", reference=choice.reference)
    return choice.say("gate_4_even", share=percent(gain / (gain + terms.abandoned)))
