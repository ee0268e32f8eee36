"""The page of `halfulp check`: is it safe, where is the trouble, and everything behind that."""

import math
from collections.abc import Sequence
from pathlib import Path

from halfulp.check.report import KL_IS_CHANGE, CheckReport
from halfulp.report import check_words as say
from halfulp.report import words
from halfulp.report.check_first import first_screen
from halfulp.report.check_plots import MOST_ROWS, depth_figure, heat_figure
from halfulp.report.check_tables import (
    card,
    folded,
    heat_table,
    plan_table,
    rows_table,
    safe_table,
    sites_table,
)
from halfulp.report.check_training import training
from halfulp.report.document import claim, document, figure_card, save
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.price import FAIL, PASS
from halfulp.report.tables import mark

_FIRST = 4  # findings of a kind that are shown in full
_STYLE = """
h1 .verdict { margin-right: 0.25em; }
ul.plain { margin: 0 0 10px; padding-left: 1.2em; }
.bar { display: block; width: 96px; height: 7px; margin-top: 4px; background: var(--line); }
.bar span { display: block; height: 100%; background: var(--series-0); }
.share { white-space: nowrap; }
.fmt { display: inline-block; padding: 0 7px; border-radius: 4px; white-space: nowrap; }
.w4 { background: rgb(0 114 178 / 0.06); } .w8 { background: rgb(0 114 178 / 0.16); }
.w16 { background: rgb(213 94 0 / 0.2); } .w32 { background: rgb(213 94 0 / 0.42); }
.pairs { padding: 8px 14px; border-top: 1px solid var(--line); font-size: 14px; }
.pair { display: inline-block; margin-right: 18px; overflow-wrap: anywhere; }
.plain, .pairs, .lead, summary, h3 { overflow-wrap: anywhere; }
.pair { max-width: 100%; }
.fmt { max-width: 100%; }
.after { margin: 10px 0 6px; }
pre { overflow-x: auto; margin: 8px 0 0; }
.card > details:first-child { margin-top: 0; }
.why { min-width: 22em; }
.site { min-width: 15em; }
td.number .mark { width: 1.5em; }
.flush details { padding: 0 14px 10px; }
"""
_MEANINGS = {
    "nonfinite": "The model itself makes NaN or inf in fp32",
    "overflow": "Values that become inf",
    "saturated": "Values beyond the largest of the format",
    "nonlinear": "Too costly for a linear prediction: only a measurement counts",
    "shrinkage": "Rounding scales the tensor on average",
    "bias": "Rounding errors that point one way",
    "flushed": "Small values that become 0",
    "unknown": "Detached: no gradient reaches the site, its price is unknown",
    "unpriced": "Operations without a price",
    "zero": "Tensors that are zero everywhere",
    "mask": "Attention masks, left out of all scales",
    "rope": "Rotary frequencies in few bits",
}


def write_check(
    report: CheckReport, path: str | Path, *, name: str, force: bool = False, command: str = ""
) -> Path:
    """Write the page of a check to the file `path` and return its path.

    The page needs no network and no script, and has the same bytes for the same report.
    RunError if `path` exists and `force` is not given, or cannot be written.
    """
    out = claim(path, force=force)
    return save(render_check(report, name=name, command=command), out)


def render_check(report: CheckReport, *, name: str, command: str = "") -> str:
    """The whole page as HTML text; `name` is the model's in the reader's words."""
    body = tag(
        "main",
        first_screen(report, name),
        _formats(report),
        _blocks(report),
        _sites(report),
        _plan(report),
        _depth(report),
        training(report),
        _kernels(report),
        _findings(report),
        _facts(report, command),
        tag("footer", tag("p", _method(report))),
    )
    return document(f"{name}: check", body, style=_STYLE)


def _formats(report: CheckReport) -> Markup:
    asked = report.asked
    parts: list[Child] = [tag("h2", "Formats, predicted and measured")]
    parts.append(
        tag(
            "p",
            f"KL in nats per token; the budget is {report.budget:g}. Flips: share of positions "
            "whose likeliest next token changes. ",
            f"{KL_IS_CHANGE} Predicted over measured is the self-test: it is "
            f"highlighted outside {say.RATIO[0]:g} to {say.RATIO[1]:g}. Range events: tensors with "
            "values beyond the largest of the format.",
            class_="lead",
        )
    )
    if asked is not None:
        text = "What was asked"
        parts += [_titled(text, rows_table(report, [asked], text, operands=True))]
    text = "GEMM operands only, as matrix units take them (head and attention included)"
    parts.append(_titled(text, rows_table(report, report.operands, text, operands=True)))
    text = "Every stored tensor, as model.to(format) would keep it"
    made = rows_table(report, report.uniform, text, operands=False, probes=True)
    return join(*parts, _titled(text, made))


def _titled(title: str, content: Markup) -> Markup:
    return card(tag("h3", title, class_="over"), content)


def _blocks(report: CheckReport) -> Markup | None:
    drawing = heat_figure(report.heat, report.budget)
    if drawing is None:
        return None
    deep = len(report.heat) > MOST_ROWS
    note = (
        " Below the line: blocks outside the layers, one color each."
        if deep
        else " Bold numbers are above the budget."
    )
    caption = (
        "Predicted KL of each block when all its stored tensors are rounded, in model order. Blue "
        f"is inside the budget, orange alone exceeds it.{note} Where a prediction is "
        "withheld above, the colors still rank."
    )
    return join(
        tag("h2", "Which block is the trouble"),
        figure_card(drawing, caption),
        card(folded("Numbers", heat_table(report))) if deep else None,
    )


def _sites(report: CheckReport) -> Markup | None:
    if not report.sites:
        return None
    last = report.sites[-1].cumulative
    share = f", {words.share(last)} of its predicted KL" if last == last else ""
    lead = (
        f"The {len(report.sites)} costliest stored tensors in {report.focus}{share}. "
        "“Over budget alone in”: the widest format in which this one tensor exceeds the budget."
    )
    keep = _keep(report)
    return join(
        tag("h2", "Costliest tensors"),
        tag("p", lead, class_="lead"),
        card(sites_table(report.sites, report.focus), flush=True),
        keep,
    )


def _keep(report: CheckReport) -> Markup | None:
    if not report.keep:
        return None
    cells = [cells.get(report.focus, math.nan) for cells in report.heat.values()]
    total = math.fsum(cell for cell in cells if cell == cell)
    items = [
        tag("li", tag("b", kind), f" exact: KL {say.kl(total)} → {say.kl(left)}")
        for kind, left in report.keep.items()
    ]
    title = f"Kept in fp32 while all else is stored in {report.focus} (predicted nats/token)"
    return card(tag("h3", title), tag("ul", *items, class_="plain"))


def _plan(report: CheckReport) -> Markup:
    return join(
        tag("h2", "The plan for the budget"),
        card(_plan_numbers(report), flush=True),
        _titled("Format of each GEMM", plan_table(report.plan.formats)),
        _what_if(report),
        _excluded(report),
        _lowest_safe(report),
        card(folded("Policy for halfulp train --policy", _code(report.plan.policy))),
    )


def _lowest_safe(report: CheckReport) -> Markup | None:
    if not report.lowest_safe:
        return None
    lead = (
        "The format of fewest bits that stays inside the budget when every block spends an equal "
        "share of it; small: when all other blocks are exact. Pins and hardware limit the choice."
    )
    made = safe_table(report.lowest_safe)
    return card(tag("h3", "Narrowest safe format per block"), tag("p", lead, class_="lead"), made)


def _code(text: str) -> Markup:
    return tag("pre", tag("code", text.strip("\n")))


def _plan_numbers(report: CheckReport) -> Markup:
    plan, budget = report.plan, report.budget

    def row(what: str, kl: float, flips: float, why: str) -> list[Child]:
        if kl != kl:
            return [what, "–", "–", "–", why or "the run gave NaN"]
        status = PASS if kl <= budget else FAIL
        part = say.of_budget(kl, budget)
        changed = words.share(flips) if flips == flips else "–"
        return [what, mark(status, say.kl(kl)), part, changed, why]

    tried = len(plan.tries)
    aims = ", then ".join(f"{aim:.2g}" for aim in plan.tries)
    aimed = f"planned for {aims}, after what the runs measured" if tried > 1 else ""
    rows = [
        row("predicted", plan.predicted_kl, math.nan, "a price of the plan is unknown"),
        row("measured", plan.measured_kl, plan.measured_flips, aimed or "on the priced text"),
        row("held-out", plan.held_out_kl, plan.held_out_flips, "on text it was not made from"),
    ]
    if plan.held_out_kl != plan.held_out_kl:
        rows[2][-1] = "no held-out text was given"
    if plan.predicted_kl == plan.predicted_kl:
        rows[0][-1] = f"{say.plan_bits(report)}; hardware: {plan.hardware}"
    head: list[Child] = ["plan", "KL", "of the budget", "flips", ""]
    return table(head, rows, numeric=frozenset({1, 2, 3}), caption="The plan, judged")


def _what_if(report: CheckReport) -> Markup | None:
    if not report.what_if:
        return None
    items = [tag("li", str(change)) for change in report.what_if]
    return card(tag("h3", "What would buy most (predicted)"), tag("ul", *items, class_="plain"))


def _excluded(report: CheckReport) -> Markup | None:
    by_reason: dict[tuple[str, str], list[str]] = {}
    for entry in report.plan.excluded:
        by_reason.setdefault((entry.group, entry.why), []).append(entry.format)
    if not by_reason:
        return None
    items = [
        tag("li", tag("b", "every GEMM" if group == "*" else group), f": {why} ({', '.join(out)})")
        for (group, why), out in by_reason.items()
    ]
    title = f"Ruled out before planning: {len(report.plan.excluded)} choices"
    return card(folded(title, tag("ul", *items, class_="plain")))


def _depth(report: CheckReport) -> Markup | None:
    profile = report.profile
    if profile is None:
        return None
    drawing = depth_figure(profile)
    slope = profile.slope
    growth = (
        f"The median grows by a factor of {math.exp(slope):.3g} per layer. "
        if math.isfinite(slope)
        else ""
    )
    text = (
        f"{growth}ω bounds what a layer's weights can enlarge in the max norm; it explains growth "
        "and judges nothing."
    )
    parts: list[Child] = [tag("h2", "Errors along the depth")]
    if drawing is None:
        parts.append(card("The stream has no finite, positive errors to draw."))
    else:
        parts.append(figure_card(drawing, text))
    made = _depth_table(report)
    return join(*parts, card(folded("Numbers and weight functionals", made)))


def _depth_table(report: CheckReport) -> Markup:
    assert report.profile is not None
    omegas = report.profile.omegas
    head: list[Child] = [
        "point", "median error", "99 %", "rms of the stream", "smallest norm",
        "ω value-output", "ω query-key", "ω up-down",
    ]  # fmt: skip
    rows: list[list[Child]] = []
    for k, point in enumerate(report.profile.points):
        layer = omegas[k // 2] if k // 2 < len(omegas) and point.name.endswith(".attn") else None
        weights = [layer.ov, layer.kq, layer.ud] if layer else []
        cells = [say.number(w) if w == w else "– layout unknown" for w in weights] or [""] * 3
        sizes = [say.number(point.rms), say.number(point.least)]
        rows.append([point.name, say.kl(point.linf[2]), say.kl(point.linf[4]), *sizes, *cells])
    return table(head, rows, numeric=frozenset(range(1, 8)), caption="Depth profile")


def _kernels(report: CheckReport) -> Markup | None:
    if not report.kernels:
        return None
    head: list[Child] = [
        "kernel", "verdict", "claims", "beyond its bound", "where products cancel",
        "error / bound", "behaves like",
    ]  # fmt: skip
    rows: list[list[Child]] = [
        [
            k.kernel, mark(k.verdict), k.claim, words.share(k.violations), words.share(k.hidden),
            say.number(k.worst, 2), k.explained_by or "–",
        ]
        for k in report.kernels
    ]  # fmt: skip
    lead = "One output beyond a rigorous bound refutes what the kernel claims about its arithmetic."
    return join(
        tag("h2", "Kernels of this machine"),
        tag("p", lead, class_="lead"),
        card(
            table(head, rows, numeric=frozenset({3, 4, 5}), caption="Kernels and their claims"),
            flush=True,
        ),
    )


def _findings(report: CheckReport) -> Markup | None:
    if not report.findings:
        return None
    kinds: dict[str, list[str]] = {}
    formats: dict[str, dict[str, int]] = {}
    for found in report.findings:
        kinds.setdefault(found.kind, []).append(found.text)
        counts = formats.setdefault(found.kind, {})
        counts[found.format] = counts.get(found.format, 0) + 1
    order = [kind for kind in _MEANINGS if kind in kinds]
    parts = [
        folded(_finding_title(kind, len(kinds[kind]), formats[kind]), _texts(kinds[kind]))
        for kind in (*order, *(k for k in kinds if k not in _MEANINGS))
    ]
    return join(tag("h2", "Findings"), card(*parts))


def _finding_title(kind: str, n: int, formats: dict[str, int]) -> str:
    named = sorted(((c, f) for f, c in formats.items() if f), key=lambda pair: -pair[0])
    where = f" ({words.listing([f'{f} {c}' for c, f in named], most=5)})" if named else ""
    if len(named) == 1:
        where = f" ({'all ' if n > 1 else ''}in {named[0][1]})"
    return f"{_MEANINGS.get(kind, kind)}: {n}{where}"


def _texts(texts: Sequence[str]) -> Markup:
    shown = [tag("li", text) for text in texts[:_FIRST]]
    rest = len(texts) - _FIRST
    more = tag("p", f"and {rest:,} more; --json has all.", class_="lead") if rest > 0 else None
    return join(tag("ul", *shown, class_="plain"), more)


def _facts(report: CheckReport, command: str) -> Markup:
    notes = [tag("li", note) for note in report.notes]
    facts: list[tuple[str, Child]] = [
        ("model", report.model),
        ("text", f"{report.tokens:,} tokens"),
        ("loss", _nats(report.loss_nats, "the batch is no plain text of token ids")),
        ("entropy of the model", _nats(report.entropy_nats, "unknown")),
        ("median margin of the top two logits", _nats(report.median_margin, "unknown")),
        ("reference", report.reference),
        ("probes, seed", f"{report.probes}, {report.seed}"),
        ("cost", f"{report.seconds:.1f} s, {report.forwards:,.0f} forward passes"),
        ("command", tag("code", command) if command else "– called from Python"),
    ]
    rows: list[list[Child]] = [[what, value] for what, value in facts]
    return join(
        tag("h2", "How it was judged"),
        card(tag("h3", "Notes"), tag("ul", *notes, class_="plain")) if notes else None,
        card(table(["", "value"], rows, caption="Reference and cost"), flush=True),
    )


def _nats(value: float, why: str) -> str:
    return f"{value:.3f} nats" if math.isfinite(value) else f"{say.kl(value)} ({why})"


def _method(report: CheckReport) -> str:
    return (
        f"{KL_IS_CHANGE} Predictions are first-order prices of every rounding, "
        f"summed: one {report.reference} forward pass and {report.probes} backward passes with "
        "labels drawn from the model. Measurements run the model with the roundings simulated, on "
        "this text only; log-softmax and KL in fp64. The verdict uses the measured value."
    )
