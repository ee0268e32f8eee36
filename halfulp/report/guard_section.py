"""The section "Guard" of a report on runs: time line, incidents with their evidence, and cost."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from halfulp.report import guard_words as say
from halfulp.report import words
from halfulp.report.guard_plots import LEGEND, MOST_ROWS, rows_of, spans, timeline
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.incidents import Cost, Story, cost_of
from halfulp.report.read import Record

STYLE = """
.incident { border-top: 1px solid var(--line); margin: 0; }
.incident:first-child { border-top: 0; }
.incident > summary {
  display: grid; grid-template-columns: 2.8em 6.5em 1.1fr 1fr 1.5fr 8.5em; gap: 2px 14px;
  padding: 9px 20px; color: var(--ink); font-size: 14px; overflow-wrap: anywhere;
}
.incident > summary::-webkit-details-marker { display: none; }
.incident > summary b { font-weight: 650; }
.incident > summary > b:first-child::before { content: "▸ "; color: var(--muted); }
.incident[open] > summary > b:first-child::before { content: "▾ "; }
.incident > summary span:last-child { color: var(--muted); text-align: right; }
.incident > summary:hover { background: color-mix(in srgb, var(--line) 35%, transparent); }
.incident > div { padding: 0 20px 16px calc(20px + 2.8em + 14px); }
.incident h4 { margin: 12px 0 0; font-size: 13.5px; font-weight: 650; }
.incident p { font-size: 14px; max-width: 62em; }
.incident .scroll { max-width: 62em; }
.incident td, .incident th { padding: 5px 12px 5px 0; font-size: 13.5px; }
dl.glossary { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 8px 0; }
dl.glossary dt { font-weight: 600; font-size: 13.5px; }
dl.glossary dd { margin: 0; font-size: 13.5px; color: var(--muted); }
@media (max-width: 720px) {
  .incident > summary { grid-template-columns: 2.8em 1fr; padding: 9px 14px; }
  .incident > summary span { grid-column: 2; }
  .incident > summary b + span { grid-column: 2; grid-row: 1; }
  .incident > summary span:last-child { text-align: left; }
  .incident > div { padding: 0 14px 14px; }
  dl.glossary { grid-template-columns: 1fr; } dl.glossary dd { margin: 0 0 6px; }
}
"""
_LEAD = (
    "The guard holds a step whose loss, gradient or counters are abnormal, replays its batch to "
    "tell precision, data, state and hardware apart, and answers: it raises the precision of the "
    "guilty block, skips the batch, or goes back to a snapshot and on from there."
)
_MOST_SIGNS = 8
_TITLES = {"gain": "gain, nats"}


def guard_section(records: Sequence[Record]) -> Markup | None:
    """Everything about the guards of the runs; None where no run had one."""
    guarded = [record for record in records if record.guarded]
    if not guarded:
        return None
    acted = [record for record in guarded if record.stories]
    quiet = [record.label for record in guarded if not record.stories]
    note = f" No incident in {words.listing(quiet)}." if quiet else ""
    return join(
        tag("h2", "Guard"),
        tag("p", f"{_LEAD}{note}", class_="lead"),
        *(_run(record, f"guard-{i}") for i, record in enumerate(acted)),
        _glossary() if acted else None,
    )


def _run(record: Record, name: str) -> Markup:
    stories = record.stories
    drawing = timeline(record, name)
    # One incident more or less is read at once, thirty are looked through.
    opened = len(stories) <= 2
    parts = [_incident(i, story, record, opened) for i, story in enumerate(stories, 1)]
    return join(
        tag("h3", record.label),
        tag("p", _says(record), class_="lead"),
        tag(
            "figure",
            tag("div", drawing, class_="scroll"),
            tag("figcaption", _caption(record)),
            class_="card",
        )
        if drawing is not None
        else None,
        tag("div", *parts, class_="card flush"),
        tag("div", _costs(record), class_="card flush"),
    )


def _says(record: Record) -> str:
    stories, ends = record.stories, say.raised_at_the_end(record.stories)
    cost = words.share(record.cost_share) if record.cost.steps else "nothing"
    of = " of the run" if record.cost.steps else ""
    text = f"The guard {say.acted(stories)}. It cost {cost}{of}."
    every = len(stories[-1].incident.get("map") or ())
    if recipe := say.fell_back(stories):
        text += f" The whole model fell back to {recipe}."
    elif ends:
        text += f" {len(ends)} of {every} blocks ended above the run's own policy."
    elif every:
        text += " Every block ended on the run's own policy."
    return text


def _caption(record: Record) -> str:
    text = f"{LEGEND}. Circles are losses that were withheld. "
    if record.withdrawn:
        text += "Gray: the course that a rollback took back, which is not part of the run. "
    found = spans(record.stories, record.last_step)
    shown, raised = rows_of(record.stories, found), {span.block for span in found}
    if shown:
        text += "Blank in the map is the run's own policy; names are those at the end. "
    if len(raised) > len(shown) == MOST_ROWS:
        text += f"{len(raised) - len(shown)} more raised blocks are left out. "
    return text.rstrip()


def _incident(index: int, story: Story, record: Record, opened: bool) -> Markup:
    incident, cost = story.incident, cost_of([story.incident])
    summary = tag(
        "summary",
        tag("b", index),
        tag("span", f"step {story.step:,}"),
        tag("span", say.seen(incident)),
        tag("span", tag("b", say.judged(incident))),
        tag("span", say.done(incident)),
        tag("span", say.booked(cost)),
    )
    inside = tag("div", *_evidence(incident), *_before(story), _bill(cost, record))
    return tag("details", summary, inside, class_="incident", open="" if opened else None)


def _evidence(incident: Mapping[str, Any]) -> list[Markup]:
    """The passes that decided the verdict, the units looked at, and what else was noted."""
    evidence = incident.get("evidence") or {}
    passes = {k: v for k, v in evidence.items() if isinstance(v, Mapping) and "loss" in v}
    rest = {k: v for k, v in evidence.items() if k not in passes}
    parts: list[Markup] = []
    signals = incident.get("signals") or {}
    if len(signals) > 3:
        text = "; ".join(f"{key} {say.number(x)}" for key, x in signals.items())
        parts.append(tag("p", f"Signals: {text}."))
    if passes:
        rows: list[list[Child]] = [
            [name, say.number(v["loss"]), say.number(v.get("norm", math.nan))]
            for name, v in passes.items()
        ]
        head: list[Child] = ["pass over the batch", "loss, nats", "gradient norm"]
        parts += [_heading("Verdict"), _table(head, rows, "Passes that decided the verdict")]
    if incident.get("rows"):
        parts += [_heading(f"Units looked at{_margin(incident)}"), _units(incident)]
    if rest:
        text = "; ".join(f"{key}: {say.number(value)}" for key, value in rest.items())
        parts.append(tag("p", f"{words.sentence(text)}."))
    return parts


def _heading(text: str) -> Markup:
    return tag("h4", text)


def _margin(incident: Mapping[str, Any]) -> str:
    margin = incident.get("margin", math.nan)
    known = isinstance(margin, (int, float)) and math.isfinite(margin)
    return f": the first by a margin of {margin:.3g}×" if known else ""


def _units(incident: Mapping[str, Any]) -> Markup:
    found = incident["rows"]
    keys = dict.fromkeys(key for row in found for key in row if key != "unit")
    shown = [key for key in keys if any(_known(row.get(key)) for row in found)]
    guilty = set(incident.get("units") or ())
    rows: list[list[Child]] = [
        [
            tag("b", f"{row['unit']} ←") if row["unit"] in guilty else row["unit"],
            *(say.number(row[key]) if _known(row.get(key)) else "–" for key in shown),
        ]
        for row in found
    ]
    titles = [_TITLES.get(key, key.replace("_", " ")) for key in shown]
    return _table(["unit", *titles], rows, "Units looked at; ← is named")


def _known(x: Any) -> bool:
    return isinstance(x, str) or (isinstance(x, (int, float)) and not math.isnan(x))


def _before(story: Story) -> list[Markup]:
    """The signs before the incident."""
    if not story.signs:
        text = "No recorded signal was abnormal before it."
        return [_heading("Before it"), tag("p", text)]
    rows = say.firsts(story.signs)
    first = story.signs[0]
    more = f" ({len(rows) - _MOST_SIGNS} more)" if len(rows) > _MOST_SIGNS else ""
    text = f"Before it: abnormal for {first.lead:,} steps{more}"
    head: list[Child] = [
        *("first signal", "where", "since step", "steps before"),
        *("then", "worst", "threshold", "later"),
    ]
    cells = [_sign(first) for first in rows[:_MOST_SIGNS]]
    numeric = frozenset(range(2, len(head) - 1))
    return [_heading(text), table(head, cells, numeric=numeric, caption="Signs before it")]


def _sign(first: say.First) -> list[Child]:
    sign = first.sign
    values = (say.value(sign.signal, x) for x in (sign.first, sign.worst, sign.threshold))
    place = say.where(sign, first.blocks)
    later = ", ".join(first.also) or "–"
    return [say.name(sign.signal), place, f"{sign.step:,}", f"{sign.lead:,}", *values, later]


def _table(head: list[Child], rows: list[list[Child]], caption: str) -> Markup:
    return table(head, rows, numeric=frozenset(range(1, len(head))), caption=caption)


def _bill(cost: Cost, record: Record) -> Markup:
    steps = record.planned_steps or record.last_step
    share = words.share(cost.steps / steps) if steps else "–"
    tokens = words.number(cost.steps * tokens_per_step(record))
    return tag("p", f"Cost: {say.booked(cost)}; {tokens} tokens, {share} of the run.")


def tokens_per_step(record: Record) -> float:
    """Tokens of one step; nan if no step says."""
    known = record.tokens.finite()
    return float(known.values[-1] / known.steps[-1]) if len(known.steps) else math.nan


def _costs(record: Record) -> Markup:
    cost, each = record.cost, tokens_per_step(record)
    steps = record.planned_steps or record.last_step
    parts = (
        ("updates withheld", cost.withheld),
        ("steps replayed after rollbacks", cost.replayed),
        ("attribution passes", cost.passes),
        ("shadow passes", cost.shadows),
        ("together", cost.steps),
    )
    rows: list[list[Child]] = [
        [name, f"{count:,.4g}", words.number(count * each), words.share(count / max(steps, 1))]
        for name, count in parts
    ]
    head: list[Child] = ["cost", "steps' worth", "tokens", "of the run"]
    return table(head, rows, numeric=frozenset({1, 2, 3}), caption=f"Cost of {record.label}")


def _glossary() -> Markup:
    pairs = [part for word, text in say.GLOSSARY for part in (tag("dt", word), tag("dd", text))]
    return tag(
        "div",
        tag("details", tag("summary", "What the words mean"), tag("dl", *pairs, class_="glossary")),
        class_="card",
    )
