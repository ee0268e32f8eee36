"""The page of a plan: what the budget buys, in one paragraph, and everything behind it."""

from pathlib import Path

from halfulp.plan.budget import Plan
from halfulp.plan.facts import Facts
from halfulp.report.amounts import amount, digits
from halfulp.report.check_tables import card, folded
from halfulp.report.document import claim, document, figure_card, save
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.plan_plots import (
    money_figure,
    precision_figure,
    sequences_figure,
    surface_figure,
)
from halfulp.report.plan_tables import (
    ORDER_COLUMNS,
    PRECISION_COLUMNS,
    budget_text,
    corpus_sentences,
    cost_text,
    crossing_sentence,
    order_rows,
    plan_rows,
    precision_rows,
)
from halfulp.report.plan_words import paragraph
from halfulp.report.words import nats

_STYLE = """
p.paragraph { font-size: 17px; line-height: 1.65; max-width: 54em; margin: 0 0 22px; }
ul.plain { margin: 0; padding-left: 1.2em; overflow-wrap: anywhere; }
.numbers { grid-template-columns: repeat(4, 1fr); }
@media (max-width: 720px) { .numbers { grid-template-columns: 1fr; } }
"""


def write_plan(
    plan: Plan, path: str | Path, *, facts: Facts | None = None, language: str = "en",
    force: bool = False, command: str = "",
) -> Path:  # fmt: skip
    """Write the page of a plan to the file `path` and return its path.

    The page needs no network and no script, and has the same bytes for the same plan.
    RunError if `path` exists and `force` is not given, or cannot be written.
    """
    out = claim(path, force=force)
    return save(render_plan(plan, facts=facts, language=language, command=command), out)


def render_plan(
    plan: Plan, *, facts: Facts | None = None, language: str = "en", command: str = ""
) -> str:
    """The whole page as HTML text; `language` is that of the paragraph for managers."""
    body = tag(
        "main",
        _first_screen(plan, language),
        _plan(plan),
        _figures(plan),
        _precisions(plan),
        None if facts is None else _corpus(plan, facts),
        _caveats(plan, command),
    )
    return document(f"{budget_text(plan)}: plan", body, style=_STYLE)


def _first_screen(plan: Plan, language: str) -> Markup:
    o = plan.chosen
    title = f"{amount(o.parameters)} parameters on {amount(o.tokens)} tokens in {o.precision}"
    band = "" if o.band_nats is None else f"{nats(o.band_nats[0])} to {nats(o.band_nats[1])}"
    numbers = [
        (nats(o.loss_nats), "loss, nats per token", f"80 % band {band}" if band else "no band"),
        (digits(o.gpu_hours), "GPU-hours", plan.gpu.name),
        (_cost(plan), "cost", _price(plan)),
        (_minus(plan), "with twice the budget", f"loss {nats(plan.doubled.loss_nats)}"),
    ]
    cells = [
        tag("div", tag("span", what, class_="what"), tag("strong", value), tag("span", note))
        for value, what, note in numbers
    ]
    return join(
        tag("p", f"Plan · {budget_text(plan)}", class_="kicker"),
        tag("h1", title),
        tag("p", paragraph(plan, language), class_="paragraph", lang=language),
        tag("div", *cells, class_="numbers"),
    )


def _cost(plan: Plan) -> str:
    return cost_text(plan.chosen).partition(" (")[0].partition(" no ")[0]


def _price(plan: Plan) -> str:
    _, bracket, rest = cost_text(plan.chosen).partition(" (")
    return rest.rstrip(")") if bracket else "at your price" if plan.price else "no price is listed"


def _minus(plan: Plan) -> str:
    return f"−{nats(plan.chosen.loss_nats - plan.doubled.loss_nats)}"


def _plan(plan: Plan) -> Markup:
    rows: list[list[Child]] = [list(row) for row in plan_rows(plan)]
    made = table(["what", "value"], rows, caption="The plan")
    return join(tag("h2", "The plan"), card(made, flush=True))


def _figures(plan: Plan) -> Markup:
    surface = (
        "Each line joins models of equal loss. The plan lies where the line of its compute "
        "reaches the lowest one"
        + (
            ", moved toward a smaller model because it will be served."
            if plan.served_tokens
            else "."
        )
    )
    money = f"The loss that each budget buys at best. {plan.law.about_band[:1].upper()}"
    money += f"{plan.law.about_band[1:]}."
    return join(
        tag("h2", "Size and money"),
        figure_card(surface_figure(plan), surface),
        figure_card(money_figure(plan), money),
    )


def _precisions(plan: Plan) -> Markup:
    lead = (
        "Each row spends the same budget. “Pays from” is how much faster than BF16 a step has to "
        "be for the same loss in the same GPU time; “may add”: how many times the loss that the "
        "law says a format adds it may really add before the gain is gone. It passes beyond the "
        "slowest speed on record and at 2 × or more: the law rounds half of a layer's operands."
    )
    rows: list[list[Child]] = [list(row) for row in precision_rows(plan)]
    numeric = frozenset(range(3, 12))
    made = table(list(PRECISION_COLUMNS), rows, numeric=numeric, caption="Precisions")
    drawing = precision_figure(plan)
    said = [tag("li", crossing_sentence(c)) for c in plan.comparisons]
    said += [tag("li", f"left out: {why}") for why in plan.refused.values()]
    return join(
        tag("h2", "Precision"),
        tag("p", lead, class_="lead"),
        card(made, flush=True),
        None if drawing is None else figure_card(drawing, tag("ul", *said, class_="plain")),
        card(tag("ul", *said, class_="plain")) if drawing is None and said else None,
    )


def _corpus(plan: Plan, facts: Facts) -> Markup:
    said = [tag("li", sentence) for sentence in corpus_sentences(plan, facts)]
    rows: list[list[Child]] = [list(row) for row in order_rows(facts.orders)]
    made = table(list(ORDER_COLUMNS), rows, numeric=frozenset({1, 2, 3}), caption="Sequences")
    drawing = sequences_figure(facts.orders, plan.chosen.parameters)
    caption = f"{facts.file}, tokenizer {facts.tokenizer}."
    return join(
        tag("h2", "The corpus"),
        card(tag("ul", *said, class_="plain")),
        None if drawing is None else figure_card(drawing, caption),
        card(made, flush=True),
    )


def _caveats(plan: Plan, command: str) -> Markup:
    flags = [tag("li", flag) for flag in plan.flags] or [tag("li", "none")]
    notes = [tag("li", note) for note in plan.notes]
    law = plan.law.law
    symbols = ", ".join(f"{key} = {value:.6g}" for key, value in law.coefficients.items())
    method = [
        tag("li", f"law {law.name}: {law.formula}, {symbols}"),
        tag("li", "compute 6 N D; GPU-hours = compute / (BF16 peak × MFU × speed)"),
        tag("li", tag("code", command) if command else "called from Python"),
    ]
    return join(
        tag("h2", "How far to trust it"),
        card(tag("h3", "Used beyond what was tested"), tag("ul", *flags, class_="plain")),
        card(folded("Sources and assumptions", tag("ul", *notes, *method, class_="plain"))),
    )
