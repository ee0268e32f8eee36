"""The report's tables: the runs, the policy, what differs, the environment, the counters."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from halfulp.report import words
from halfulp.report.counters import Strip
from halfulp.report.guard_words import raised_at_the_end
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.price import FAIL, PASS, Price, flatten
from halfulp.report.read import Record

_EVERY_OPERAND = {"fprop.x", "fprop.w", "dgrad.g", "dgrad.w", "wgrad.g", "wgrad.x"}
_MARKS = {PASS: ("✓", "pass"), FAIL: ("✕", "fail")}


def mark(verdict: str, text: str | None = None) -> Markup:
    """A verdict as sign, word and color; `text` replaces the word."""
    sign, style = _MARKS.get(verdict, ("?", "unknown"))
    symbol = tag("span", sign, class_="mark", aria_hidden="true")
    return tag("span", symbol, verdict if text is None else text, class_=f"verdict {style}")


def runs_table(prices: Sequence[Price]) -> Markup:
    """One row per run: verdict, held-out losses, price, what that means, state, speed."""
    paired = any(price.reference is not None for price in prices)
    head: list[Child] = ["run", "verdict", "held-out loss", "evaluated in fp32"]
    head += ["above its reference", "which means"] if paired else []
    head += ["steps", "tokens/s"]
    rows = [_run_row(price, paired) for price in prices]
    last = len(head) - 1
    numeric = frozenset({2, 3, last - 1, last} | ({4} if paired else set()))
    return table(head, rows, numeric=numeric, caption="Runs and their verdicts; losses in nats")


def _run_row(price: Price, paired: bool) -> list[Child]:
    record = price.run
    name = None if record.name == record.label else tag("small", record.name)
    raised = len(raised_at_the_end(record.stories))
    guard = tag("small", f"{raised} blocks raised by its guard") if raised else None
    row: list[Child] = [join(record.label, name, guard), _verdict(price)]
    row += [_last(record.held_out.values), _last(record.held_out_fp32.values)]
    if paired:
        row += [_delta(price), _meaning(price)]
    return [*row, _ending(record), words.number(record.tokens_per_second)]


def _verdict(price: Price) -> Markup:
    fine = not price.run.diverged and price.run.state == "finished"
    if price.is_reference and fine:
        return tag("span", "reference", class_="verdict unknown")
    return mark(price.verdict)


def _last(values: np.ndarray) -> str:
    return words.nats(float(values[-1])) if len(values) else "–"


def _delta(price: Price) -> Child:
    if not math.isfinite(price.nats):
        return "–"
    size, half = words.interval(price.nats, price.half_width)
    early = f" at step {price.step:,}" if price.step < price.run.last_step else ""
    sign = "−" if price.nats < 0 else "+"
    return join(f"{sign}{size}", tag("small", f"± {half}{early}"))


def _meaning(price: Price) -> Child:
    if price.reference is None:
        return ""
    if price.why:
        return price.why
    if price.verdict == PASS:
        return f"no price above {words.most(price.nats, price.half_width)}"
    if price.verdict != FAIL:
        return "the ± reaches across the bar"
    there = f"{price.reference.label} was there at step {price.caught_up:,}"
    return join(words.perplexity(price.nats), tag("small", there) if price.caught_up else None)


def _ending(record: Record) -> Child:
    """Steps taken, and how the run ended unless it finished."""
    if record.stopped is not None:
        note = "stopped by its guard"
    elif record.diverged:
        block = record.nonfinite.get("block")
        note = f"diverged in {block}" if block else "diverged"
    elif record.state == "finished":
        return f"{record.last_step:,}"
    else:
        planned = f" of {record.planned_steps:,}" if record.planned_steps else ""
        note = f"{record.state}{planned}"
    return join(f"{record.broke_at:,}", tag("small", note))


def strip_table(strips: Sequence[Strip], title: str) -> Markup:
    """The five worst blocks per run as numbers."""
    head: list[Child] = ["run", "block", "worst place", "whole run", "last counted", "largest"]
    rows: list[list[Child]] = []
    for strip in strips:
        order = sorted(range(len(strip.blocks)), key=lambda i: (-strip.pooled[i], i))[:5]
        for i in order:
            shares = strip.shares[i][np.isfinite(strip.shares[i])]
            ends = [words.share(float(x)) for x in (strip.pooled[i], shares[-1], shares.max())]
            rows.append([strip.run.label, strip.blocks[i], strip.places[i], *ends])
    caption = f"{title}: the five worst blocks of each run"
    return table(head, rows, numeric=frozenset({3, 4, 5}), caption=caption)


def policy_table(records: Sequence[Record]) -> Markup | None:
    """Which recipe governs which blocks, and the formats the counters saw there; None = unknown."""
    if not any(r.summary.get("policy") or r.formats for r in records):
        return None
    rows: list[list[Child]] = [[r.label, _rules(r), _formats(r)] for r in records]
    head: list[Child] = ["run", "blocks → recipe", "formats that the counters saw"]
    return table(head, rows, caption="Policy: who is rounded where")


def _rules(record: Record) -> Child:
    lines = []
    for match, recipe, gemms, *_ in record.summary.get("policy") or ():
        count = len(gemms) if isinstance(gemms, (list, tuple)) else gemms
        noun = "GEMM" if count == 1 else "GEMMs"
        lines.append(tag("div", tag("code", match), f" → {recipe}, {count} {noun}"))
    lines += [tag("div", f"from step {step:,}: {recipe}") for step, recipe in record.stages]
    for name in record.summary.get("unquantized") or ():
        lines.append(tag("div", tag("code", name), " left unquantized by a hint"))
    return join(*lines) if lines else "–"


def _formats(record: Record) -> Child:
    """Formats with the operands that use them, one line each."""
    users: dict[str, list[str]] = {}
    for operand, formats in record.formats.items():
        for form in formats:
            users.setdefault(form, []).append(operand)
    lines = [
        tag("div", tag("code", form), " ", _operands(operands)) for form, operands in users.items()
    ]
    return join(*lines) if lines else "–"


def _operands(names: list[str]) -> str:
    if set(names) >= _EVERY_OPERAND:
        return ", ".join(["every GEMM operand", *(n for n in names if n not in _EVERY_OPERAND)])
    return ", ".join("stored weights" if name == "weight" else name for name in names)


def differences_table(records: Sequence[Record]) -> Markup | None:
    """Configuration keys that are not the same in all runs; None if there are none."""
    flat = [flatten(record.config) for record in records]
    # Where a run lies is no difference between runs.
    keys = list(dict.fromkeys(k for config in flat for k in config if not k.startswith("run.")))
    apart = [k for k in keys if any(c.get(k) != flat[0].get(k) for c in flat)]
    if not apart:
        return None
    rows: list[list[Child]] = [[tag("code", k), *(_value(c.get(k)) for c in flat)] for k in apart]
    head: list[Child] = ["option", *(record.label for record in records)]
    return table(head, rows, caption="Options in which the runs differ")


def environment_table(records: Sequence[Record]) -> Markup:
    """Versions and machine; one column if they are the same for every run."""
    hidden = {"command", "config_sha256"}
    facts = [{k: v for k, v in r.environment.items() if k not in hidden} for r in records]
    same = all(fact == facts[0] for fact in facts)
    shown = facts[:1] if same else facts
    head: list[Child] = ["", "all runs"] if same else ["", *(r.label for r in records)]
    if len(records) == 1:
        head = ["", records[0].label]
    keys = list(dict.fromkeys(key for fact in shown for key in fact))
    rows: list[list[Child]] = [
        [key.replace("_", " "), *(_value(f.get(key)) for f in shown)] for key in keys
    ]
    return table(head, rows, caption="Environment")


def command_table(records: Sequence[Record]) -> Markup:
    """How every run was started, and the digest of its configuration."""
    rows: list[list[Child]] = [
        [
            record.label,
            tag("code", " ".join(_quote(word) for word in record.command) or "–"),
            tag("code", _digest(record)),
        ]
        for record in records
    ]
    return table(["run", "command", "config sha256"], rows, caption="Commands")


def _digest(record: Record) -> str:
    found = record.summary.get("config_sha256") or record.environment.get("config_sha256")
    return str(found)[:12] if found else "–"


def _quote(word: str) -> str:
    import shlex

    return shlex.quote(str(word))


def _value(value: Any) -> Child:
    if value is None:
        return "–"
    if value == "" or value == []:
        return "none"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def evidence_number(values: Mapping[str, float | str], key: str) -> float:
    """A number of a finding's evidence; nan if it is not there."""
    value = values.get(key, math.nan)
    return value if isinstance(value, float) else math.nan
