"""One self-contained HTML page: verdict, numbers, runs, curves, counters, policy, environment."""

import math
from collections.abc import Sequence
from pathlib import Path

from halfulp.report import words
from halfulp.report.counters import COUNTERS, Counter, Strip, strip
from halfulp.report.curves import loss_figure
from halfulp.report.document import claim, document, figure_card, save
from halfulp.report.findings import BAR_NATS, Finding, judge_all
from halfulp.report.guard_section import STYLE as GUARD_STYLE
from halfulp.report.guard_section import guard_section
from halfulp.report.html import Child, Markup, join, tag
from halfulp.report.price import FAIL, PASS, UNKNOWN, Price, price_all
from halfulp.report.rates_section import rates_section
from halfulp.report.read import Record, read_runs
from halfulp.report.sharpness_section import sharpness_section
from halfulp.report.strips import hidden_blocks, strip_figure
from halfulp.report.tables import (
    command_table,
    differences_table,
    environment_table,
    evidence_number,
    mark,
    policy_table,
    runs_table,
    strip_table,
)


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    title: str | None = None,
    force: bool = False,
    bar_nats: float = BAR_NATS,
) -> Path:
    """Write the report on `runs` to the file `out` and return its path.

    The page needs no network and no script, and has the same bytes for the same runs.
    RunError if `out` exists and `force` is not given, or for paths that are no runs.
    """
    out = claim(out, force=force)
    prices = price_all(read_runs(runs), bar_nats)
    text = render_page(prices, judge_all(prices, bar_nats), title=title, bar_nats=bar_nats)
    return save(text, out)


def render_page(
    prices: Sequence[Price],
    found: Sequence[Finding],
    *,
    title: str | None = None,
    bar_nats: float = BAR_NATS,
) -> str:
    """The whole page as HTML text."""
    records = [price.run for price in prices]
    name = title or _title(records)
    body = tag(
        "main",
        _first_screen(prices, found, name),
        _observed(found),
        _losses(prices, bar_nats),
        guard_section(records),
        _counters(records),
        sharpness_section(records),
        rates_section(records),
        _policy(records),
        _made(records),
        _footer(prices, bar_nats),
    )
    guarded = any(record.guarded for record in records)
    return document(name, body, style=GUARD_STYLE if guarded else "")


def _title(records: Sequence[Record]) -> str:
    names = words.listing([record.label for record in records], most=4)
    return names if len(records) == 1 else f"{len(records)} runs: {names}"


def _first_screen(prices: Sequence[Price], found: Sequence[Finding], title: str) -> Markup:
    return join(
        tag("p", f"halfulp report · {title}", class_="kicker"),
        tag("h1", found[0].sentence),
        _verdicts(prices),
        _numbers(prices, found),
        tag("div", runs_table(prices), class_="card flush"),
    )


def _verdicts(prices: Sequence[Price]) -> Markup | None:
    judged = [p for p in prices if p.reference is not None or p.run.diverged]
    groups = []
    for verdict in (PASS, FAIL, UNKNOWN):
        names = [p.run.label for p in judged if p.verdict == verdict]
        if names:
            text = words.sentence(verdict)
            groups.append(tag("div", tag("dt", mark(verdict, text)), tag("dd", ", ".join(names))))
    return tag("dl", *groups, class_="verdicts") if groups else None


def _numbers(prices: Sequence[Price], found: Sequence[Finding]) -> Markup:
    """Three numbers to remember: a breakdown, the largest price, the loudest counters, the rest."""
    candidates = [_first_breakdown(prices), _largest_price(prices)]
    candidates += [_loudest(found, counter) for counter in COUNTERS[:3]]
    candidates += _plain_numbers(prices)
    three = [candidate for candidate in candidates if candidate is not None][:3]
    cells = [
        tag("div", tag("span", what, class_="what"), tag("strong", value), tag("span", note))
        for value, what, note in three
    ]
    return tag("div", *cells, class_="numbers")


_Number = tuple[str, str, str]  # value, what it is, whose


def _first_breakdown(prices: Sequence[Price]) -> _Number | None:
    broken = [p.run for p in prices if p.run.diverged]
    if not broken:
        return None
    first = min(broken, key=lambda r: r.broke_at)
    others = f" and {len(broken) - 1} more later" if len(broken) > 1 else ""
    block = first.nonfinite.get("block")
    where = f" in {block}" if block else ""
    what = "the run was stopped by its guard" if first.stopped else "the run broke down"
    return f"step {first.broke_at:,}", what, f"{first.label}{where}{others}"


def _largest_price(prices: Sequence[Price]) -> _Number | None:
    known = [p for p in prices if p.reference is not None and math.isfinite(p.nats)]
    known = [p for p in known if not p.run.diverged and p.run.state == "finished"]
    if not known:
        return None
    worst = max(known, key=lambda p: p.nats)
    note = f"{worst.run.label}: {words.perplexity(worst.nats)}"
    what = f"largest loss above {worst.reference.label}" if worst.reference else ""
    return f"{words.nats(worst.nats, signed=True)} nats", what, note


def _loudest(found: Sequence[Finding], counter: Counter) -> _Number | None:
    mine = [f for f in found if f.topic == counter.key]
    if not mine:
        return None
    worst = max(mine, key=lambda f: evidence_number(f.evidence, "share"))
    share = words.share(evidence_number(worst.evidence, "share"))
    top = words.share(evidence_number(worst.evidence, "worst_share"))
    operand = str(worst.evidence.get("operand", ""))
    what = {
        "lost_updates": "of the updates were lost",
        "underflow": f"of the {words.kind(operand)} became zero",
        "saturation": f"of the {words.kind(operand)} saturated",
    }[counter.key]
    return share, what, f"{worst.run}: worst {worst.evidence.get('worst')}, {top}"


def _plain_numbers(prices: Sequence[Price]) -> list[_Number | None]:
    fastest = max(prices, key=lambda p: _finite(p.run.tokens_per_second))
    steps = max(prices, key=lambda p: p.run.last_step).run
    best = [p.run for p in prices if len(p.run.held_out.finite().values)]
    lowest = min(best, key=lambda r: r.held_out.finite().values[-1], default=None)
    speed = fastest.run.tokens_per_second
    return [
        lowest
        and (
            f"{lowest.held_out.finite().values[-1]:.3f} nats",
            "held-out loss" if len(prices) == 1 else "lowest held-out loss",
            f"{lowest.label}, per token",
        ),
        (f"{speed:,.0f}", "tokens per second", fastest.run.label) if _finite(speed) else None,
        (f"{steps.last_step:,}", "steps recorded", steps.label),
    ]


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _observed(found: Sequence[Finding]) -> Markup | None:
    if not found[1:]:
        return None
    items = [
        tag(
            "li",
            tag("span", mark(f.verdict, ""), tag("span", f"{f.verdict}: ", class_="hidden")),
            tag("span", _name_first(f)),
        )
        for f in found[1:]
    ]
    caveats = list(dict.fromkeys(f.caveat for f in found[1:] if f.caveat))
    return join(
        tag("h2", "What was observed"),
        tag("p", " ".join(caveats), class_="lead") if caveats else None,
        tag("div", tag("ul", *items, class_="findings"), class_="card"),
    )


def _name_first(finding: Finding) -> Child:
    """The sentence with the run's name in bold where it leads."""
    rest = finding.sentence.removeprefix(finding.run)
    if not finding.run or rest == finding.sentence:
        return finding.sentence
    return join(tag("b", finding.run), rest)


def _losses(prices: Sequence[Price], bar_nats: float) -> Markup | None:
    drawing = loss_figure(prices, bar_nats)
    if drawing is None:
        return None
    paired = any(price.reference is not None for price in prices)
    caption = (
        "Circles are the held-out differences, which decide the verdicts; lines with 95 % bands "
        f"are the training loss. The gray bar is ±{bar_nats:g} nats; the axis is linear inside it "
        "and logarithmic outside."
        if paired
        else "The thin line is every step, the thick one their moving average."
    )
    return join(tag("h2", "Loss"), figure_card(drawing, caption))


def _counters(records: Sequence[Record]) -> Markup | None:
    parts = [_counter(records, counter) for counter in COUNTERS]
    silent = [r.label for r in records if not r.counters and r.state != "empty"]
    note = f"No counters were recorded in {words.listing(silent)}." if silent else None
    shown = [part for part in parts if part is not None]
    if not shown and note is None:
        return None
    return join(tag("h2", "Counters"), tag("p", note, class_="lead") if note else None, *shown)


def _counter(records: Sequence[Record], counter: Counter) -> Markup | None:
    counted = [r for r in records if counter.key in r.counters]
    strips = [strip(record, counter) for record in counted]
    loud = [s for s in strips if s.pooled.max() > 0]
    zero = [s.run.label for s in strips if s.pooled.max() == 0]
    if not strips or (not loud and counter.key == "v_underflow"):
        return None
    nowhere = f"Zero everywhere in {words.listing(zero)}. " if zero else ""
    text = join(tag("h3", counter.title), tag("p", f"{counter.meaning} {nowhere}", class_="lead"))
    if not loud:
        return tag("div", text, class_="card")
    drawing = strip_figure(counter, loud, counter.key.replace("_", "-"))
    return tag(
        "figure",
        text,
        tag("div", drawing, class_="scroll"),
        tag("figcaption", _strip_caption(counter, loud)),
        tag("details", tag("summary", "Numbers"), strip_table(loud, counter.title)),
        class_="card",
    )


def _strip_caption(counter: Counter, strips: Sequence[Strip]) -> str:
    raised = f"{100 * counter.warn:g} % (raised) and {100 * counter.act:g} % (high)"
    hidden = hidden_blocks(strips)
    rest = f" {hidden} quieter blocks are left out." if hidden else ""
    return f"Blank is zero. Marks on the color bar: {raised}; bold numbers are raised.{rest}"


def _policy(records: Sequence[Record]) -> Markup | None:
    content = policy_table(records)
    if content is None:
        return None
    return join(tag("h2", "Policy"), tag("div", content, class_="card flush"))


def _made(records: Sequence[Record]) -> Markup:
    apart = differences_table(records) if len(records) > 1 else None
    parts = [
        tag("div", part, class_="card flush")
        for part in (apart, command_table(records), environment_table(records))
        if part is not None
    ]
    torn = [r.label for r in records if r.torn]
    note = f"The last line of events.jsonl is torn in {words.listing(torn)} and was passed over."
    lead = tag("p", note, class_="lead") if torn else None
    return join(tag("h2", "How the runs were made"), lead, *parts)


def _footer(prices: Sequence[Price], bar_nats: float) -> Markup:
    effective = [p for p in prices if p.scatter.count]
    worth = (
        f" ({min(p.scatter.count for p in effective)} or more steps, worth "
        f"{min(p.scatter.effective for p in effective):.0f} or more independent ones)"
        if effective
        else ""
    )
    text = (
        "How the verdict is made: a run passes if its held-out loss is less than "
        f"{bar_nats:g} nats above that of the reference with the same configuration, seed and "
        "data, fails if it is more above, and could not be told if the 95 % uncertainty reaches "
        "across. The uncertainty is that of the mean paired step difference over the last fifth of "
        f"the run, corrected for autocorrelation{worth}, because evaluations are not recorded "
        "batch by batch. A run whose loss was not finite fails. Losses are in nats per token; "
        "perplexity is their exponential. One run per recipe says nothing about other seeds."
    )
    return tag("footer", tag("p", text))
