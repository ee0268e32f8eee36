"""One printed page for whoever decides about a sweep: verdict, money, risk, a plan in stages."""

import math
from pathlib import Path

from halfulp.errors import ConfigError
from halfulp.report import words
from halfulp.report.document import claim, document, save
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.price import PASS
from halfulp.report.sweep_assumed import assumed
from halfulp.report.sweep_bars import PARTS, bill_figure, figure_of, times
from halfulp.report.sweep_choice import Choice, percent, runs_to_show
from halfulp.report.sweep_page import Judged
from halfulp.report.sweep_plan import plan
from halfulp.report.sweep_tables import amount, in_nats
from halfulp.report.sweep_words import LANGUAGES
from halfulp.report.tables import mark
from halfulp.sweep.cost import tokens_needed
from halfulp.sweep.money import Cost
from halfulp.sweep.ranges import Range
from halfulp.sweep.verdict import percent_of
from halfulp.sweep.window import Window

MOST_ROWS, MOST_BARS = 5, 4  # precisions in the table and the chart, the reference among them
_CHART, _BAR = 700, 22  # CSS pixels: the width of the printed page, the height of a bar
_STYLE = """
@page { size: A4; margin: 9mm 12mm; }
:root {
  color-scheme: light;
  --page: #ffffff; --card: #ffffff; --ink: #1c2126; --muted: #56606a; --line: #d5dade;
  --pass: #00734f; --fail: #b03c00; --unknown: #56606a;
  --series-0: #d55e00; --series-1: #0072b2; --series-2: #009e73;
}
body {
  font: 10.5px/1.36 system-ui, -apple-system, "Segoe UI", Roboto, "Hiragino Sans",
    "Yu Gothic UI", "Yu Gothic", Meiryo, "Noto Sans CJK JP", "Noto Sans JP", "IPAPGothic",
    "DejaVu Sans", sans-serif;
}
main { max-width: 186mm; padding: 12px 0; }
.kicker { font-size: 10.5px; }
h1 { font-size: 18px; margin: 3px 0 4px; }
h2 { font-size: 12px; margin: 7px 0 2px; border-bottom: 1px solid var(--line); }
.lead { font-size: 10.5px; margin: 0 0 3px; max-width: none; }
.money { font-size: 11.5px; margin: 0 0 5px; }
.numbers { margin: 0 0 4px; } .numbers div { padding: 4px 10px; }
.numbers strong { font-size: 19px; } .numbers span, .numbers span.what { font-size: 10.5px; }
table { font-size: 10px; } th, td { padding: 1.5px 5px; } thead th { font-size: 9.5px; }
.scroll { overflow: visible; }
th, td { max-width: none; }
.plan th[scope=row] { white-space: nowrap; }
.plan td:nth-child(2) { width: 28%; } .plan td:nth-child(3) { width: 32%; }
.plot { min-width: 0 !important; }
ul { margin: 0; padding-left: 1.3em; }
.key { margin-right: 12px; white-space: nowrap; }
.key i { display: inline-block; width: 9px; height: 9px; margin-right: 4px; }
.note { color: var(--muted); font-size: 10px; }
td small { font-size: 9.5px; }
.assumed { color: var(--muted); font-size: 9.5px; line-height: 1.35; }
footer { margin-top: 6px; font-size: 9.5px; max-width: none; }
@media screen { main { padding: 24px 16px; } }
@media print { main { padding: 0; } }
"""


def write_executive(
    judged: Judged,
    out: str | Path,
    *,
    language: str = "en",
    title: str | None = None,
    force: bool = False,
    command: str = "",
) -> Path:
    """Write the page for whoever decides to the file `out` and return its path.

    It prints on one sheet of A4 and needs no network. ConfigError for a language it does not speak,
    RunError if `out` exists and `force` is not given, or cannot be written.
    """
    path = claim(out, force=force)
    text = render_executive(judged, language=language, title=title, command=command)
    return save(text, path)


def render_executive(
    judged: Judged, *, language: str = "en", title: str | None = None, command: str = ""
) -> str:
    """The whole page as HTML text."""
    if language not in LANGUAGES:
        raise ConfigError(
            f"the page was asked for in {language!r}. It speaks {' and '.join(LANGUAGES)}."
        )
    choice, name = Choice(judged, language), title or judged.name
    body = tag(
        "main",
        tag("p", choice.say("kicker", name=name), class_="kicker"),
        tag("h1", _headline(choice)),
        tag("p", _evidence(choice), class_="lead"),
        tag("p", _money(choice), class_="money"),
        _numbers(choice),
        _verdicts(choice),
        _bill(choice),
        tag("h2", choice.say("risk")),
        tag("ul", *(tag("li", text) for text in _risks(choice))),
        tag("h2", choice.say("plan")),
        plan(choice),
        _assumed(choice),
        tag("footer", choice.say("made", command=command or "halfulp report")),
    )
    return document(name, body, style=_STYLE, language=language)


def _headline(choice: Choice) -> str:
    verdict = choice.verdict
    key = "stay" if verdict is None else "adopt" if verdict.status == PASS else "wait"
    return choice.say(key, recipe=choice.subject, reference=choice.reference)


def _evidence(choice: Choice) -> str:
    found = choice.judged.table
    rows = found.rows()
    several = choice.say("data", n=len(found.data)) if len(found.data) > 1 else ""
    return choice.say(
        "evidence", done=len(found.results), cells=len(found.design.cells()),
        recipes=len(found.recipes), rates=len(found.lrs), seeds=len(found.seeds), data=several,
        parameters=choice.large(max(row.parameters for row in rows)),
        tokens=choice.large(max(row.tokens for row in rows)),
    )  # fmt: skip


def _money(choice: Choice) -> str:
    """Money in a sentence or two, as far as it is known."""
    base, own = choice.cost(choice.reference), choice.cost(choice.subject)
    names = {"recipe": choice.subject, "reference": choice.reference}
    if base is None:
        return choice.say("money_none")
    first = _dollars(choice, base.usd)
    if own is None:
        return choice.say("money_reference", **names, reference_usd=first) if base.usd else ""
    if own.ratio is None:
        why = "money_window" if own.search is None or base.search is None else "money_speed"
        unknown = choice.reference if base.search is None else choice.subject
        texts = [choice.say(why, **names, unknown=unknown)]
    elif base.usd and own.usd:
        usd = _dollars(choice, own.usd)
        texts = [choice.say("money", **names, reference_usd=first, usd=usd)]
    elif base.gpu_hours and own.gpu_hours:
        hours, other = _span(own.gpu_hours), _span(base.gpu_hours)
        texts = [choice.say("money_hours", **names, reference_hours=other, hours=hours)]
    else:
        texts = [choice.say("money_ratio", **names, ratio=times(own.ratio))]
    even = own.break_even
    if even is not None and math.isfinite(even.value):
        texts.append(choice.say("money_even", even=times(even).replace("×", "")))
    return " ".join(texts)


def _dollars(choice: Choice, found: Range | None) -> str:
    if found is None:
        return choice.say("unknown")
    return f"${_span(found)}" if choice.language == "en" else f"{_span(found)} ドル"


def _span(found: Range) -> str:
    if found.low == found.high:
        return amount(found.value)
    return f"{amount(found.value)} [{amount(found.low)} – {amount(found.high)}]"


def _numbers(choice: Choice) -> Markup | None:
    """Three figures of the subject: loss, failures, cost."""
    if not choice.subject:
        return None
    cells = [
        tag("div", tag("span", what, class_="what"), tag("strong", value), tag("span", note))
        for value, what, note in (_loss(choice), _failed(choice), _cost(choice))
    ]
    return tag("div", *cells, class_="numbers")


def _loss(choice: Choice) -> tuple[str, str, str]:
    row = choice.worst(choice.subject)
    gap, bar = row.gap if row else None, f"{choice.judged.bar_nats:g}"
    what = choice.say("loss", reference=choice.reference)
    if gap is None:
        return choice.say("unknown"), what, choice.say("no_interval")
    value, low, high = in_nats(gap, signed=True)
    known = math.isfinite(gap.high - gap.low)
    ends = choice.say("interval", low=low, high=high) if known else choice.say("no_interval")
    return value, what, choice.say("loss_note", ends=ends, bar=bar)


def _failed(choice: Choice) -> tuple[str, str, str]:
    own = choice.evidence(choice.subject).failures
    base = choice.evidence(choice.reference).failures
    if not own.runs:
        return choice.say("unknown"), choice.say("failed"), ""
    upper, other = words.share(own.upper), f"{base.failed:g} / {base.runs:g}"
    note = choice.say("failed_note", upper=upper, reference=choice.reference, other=other)
    return f"{own.failed:g} / {own.runs:g}", choice.say("failed"), note


def _cost(choice: Choice) -> tuple[str, str, str]:
    cost, what = choice.cost(choice.subject), choice.say("cost", reference=choice.reference)
    if choice.judged.bills is None:
        return choice.say("unasked"), what, choice.say("unasked_note")
    if cost is None or cost.ratio is None or cost.speedup is None:
        return choice.say("unknown"), what, choice.say("cost_unknown")
    ratio = cost.ratio
    finite = math.isfinite(ratio.value)
    fields = {"low": figure_of(ratio.low), "high": figure_of(ratio.high)}
    ends = choice.say("interval", **fields)
    note = choice.say("cost_note", ends=ends, speed=times(cost.speedup).replace("×", ""))
    return f"{figure_of(ratio.value)}{'×' if finite else ''}", what, note


def _verdicts(choice: Choice) -> Markup:
    judged = choice.judged
    order = sorted(judged.verdicts, key=lambda v: v.recipe != choice.subject)
    shown = [choice.reference, *(v.recipe for v in order)][:MOST_ROWS]
    hidden = len(judged.table.recipes) - len(shown)
    status = {v.recipe: v.status for v in judged.verdicts}
    head: list[Child] = [*choice.say("columns").split("|")]
    if judged.bills is None:
        head = head[:5]
    rows = [_row(choice, recipe, status.get(recipe, ""))[: len(head)] for recipe in shown]
    numeric = frozenset(range(2, len(head)))
    made = table(head, rows, numeric=numeric, caption=choice.say("verdicts"))
    more = choice.say("more", n=hidden) if hidden else ""
    notes = [text for text in (more, _family(choice), _nats(choice)) if text]
    note = tag("p", " ".join(notes), class_="note")
    return join(tag("h2", choice.say("verdicts")), made, note)


def _nats(choice: Choice) -> str:
    """What the bar means to whoever does not think in nats."""
    bar = choice.judged.bar_nats
    return choice.say("nats", bar=f"{bar:g}", more=percent(math.expm1(bar)))


def _family(choice: Choice) -> str:
    """For how many comparisons the verdicts hold together; "" for a single one."""
    level, count = choice.judged.family
    return "" if count == 1 else choice.say("family", n=count, level=percent_of(level))


def _row(choice: Choice, recipe: str, status: str) -> list[Child]:
    own, row, cost = choice.evidence(recipe), choice.worst(recipe), choice.cost(recipe)
    said = mark(status, choice.say(status)) if status else choice.say("reference")
    if own.refused:
        return [recipe, join(said, tag("small", choice.say("refused"))), *["–"] * 5]
    gap = row.gap if row else None
    loss = "–" if gap is None else "{} [{}, {}]".format(*in_nats(gap, signed=True))
    failed = f"{own.failures.failed:g} / {own.failures.runs:g}" if own.failures.runs else "–"
    cells: list[Child] = [recipe, said, loss, failed, _octaves(choice, own.window)]
    if cost is None or cost.ratio is None or not status:
        total = "1" if cost and not status else choice.say("unknown")
        return [*cells, total, "–" if not cost or not status else _even(cost)]
    return [*cells, times(cost.ratio), _even(cost)]


def _octaves(choice: Choice, found: Window | None) -> str:
    if found is None or not (found.octaves or found.open_ended):
        return choice.octaves(found)
    return f"{'≥ ' if found.open_ended else ''}{found.octaves:.1f}"


def _even(cost: Cost) -> str:
    return "–" if cost.break_even is None else times(cost.break_even)


def _bill(choice: Choice) -> Markup | None:
    bills = choice.judged.bills
    if bills is None:
        return None
    order = (choice.reference, choice.subject)
    costs = sorted(bills.costs, key=lambda c: order.index(c.recipe) if c.recipe in order else 9)
    finite = [c for c in costs if c.ratio is not None and math.isfinite(c.ratio.value)]
    drawing = bill_figure(finite[:MOST_BARS], "", width=_CHART, row=_BAR)
    if drawing is None or len(finite) < 2:
        return None
    keys = [
        tag("span", tag("i", "", style=f"background:{color}"), name, class_="key")
        for name, color in zip(choice.say("bill_parts").split("|"), PARTS, strict=True)
    ]
    note = tag("p", *keys, choice.say("bill_note"), class_="note")
    title = choice.say("bill", reference=bills.reference)
    return join(tag("h2", title), drawing, note)


def _risks(choice: Choice) -> list[str]:
    """What could go wrong, with the numbers that bound it."""
    if not choice.subject:
        return [choice.say("risk_short")]
    own, base = choice.evidence(choice.subject), choice.evidence(choice.reference)
    texts = [_failing(choice), _horizon(choice)]
    names = {"recipe": choice.subject, "reference": choice.reference}
    spans = {"octaves": choice.octaves(own.window), "other": choice.octaves(base.window)}
    texts.append(choice.say("risk_window", **names, **spans))
    lost, missing = own.failures.lost + base.failures.lost, own.missing + base.missing
    if lost or missing:
        texts.append(choice.say("risk_lost", lost=lost, missing=missing))
    return texts


def _failing(choice: Choice) -> str:
    found = choice.evidence(choice.subject).failures
    if not found.runs:
        return choice.say("risk_failures_none", recipe=choice.subject)
    needed = runs_to_show(int(found.runs), int(found.failed))
    key = "risk_failures" if needed and needed > found.runs else "risk_failures_shown"
    fields = {"failed": f"{found.failed:g}", "runs": f"{found.runs:g}", "needed": needed}
    return choice.say(key, recipe=choice.subject, upper=words.share(found.upper), **fields)


def _horizon(choice: Choice) -> str:
    bills, horizon = choice.judged.bills, choice.verdict.horizon if choice.verdict else None
    if horizon is None or bills is None or bills.inputs.tokens is None:
        return choice.say("risk_short")
    needed = choice.large(tokens_needed(0.9, bills.inputs.tokens))
    share = words.share(horizon) if horizon >= 1e-5 else choice.say("tiny", share=percent(1e-5))
    return choice.say("risk_horizon", share=share, needed=needed)


def _assumed(choice: Choice) -> Markup | None:
    texts = assumed(choice)
    if not texts:
        return None
    return join(tag("h2", choice.say("assumed")), tag("p", " ".join(texts), class_="assumed"))
