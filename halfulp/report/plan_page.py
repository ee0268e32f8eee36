"""The page of a plan: what the budget buys, in one paragraph, and everything behind it."""

from pathlib import Path

from halfulp.plan.budget import Plan
from halfulp.plan.facts import Facts
from halfulp.plan.said import in_language
from halfulp.report.amounts import amount, digits, dollars
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
    budget_text,
    columns,
    corpus_sentences,
    crossing_sentence,
    order_rows,
    plan_rows,
    precision_rows,
    price_range,
)
from halfulp.report.plan_words import paragraph, words
from halfulp.report.words import nats, sentence

_STYLE = """
p.paragraph { font-size: 17px; line-height: 1.65; max-width: 54em; margin: 0 0 22px; }
ul.plain { margin: 0; padding-left: 1.2em; overflow-wrap: anywhere; }
.numbers { grid-template-columns: repeat(4, 1fr); }
@media (max-width: 720px) { .numbers { grid-template-columns: 1fr; } }
"""
_JAPANESE_STYLE = """
body {
  font-family: system-ui, -apple-system, "Hiragino Sans", "Yu Gothic UI", "Yu Gothic", Meiryo,
    "Noto Sans CJK JP", "Noto Sans JP", "IPAPGothic", sans-serif;
}
th, td { word-break: keep-all; }
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
    """The whole page as HTML text, in English ("en") or Japanese ("ja").

    Formulas, sources and names are as their authors wrote them. PlanError for another language.
    """
    body = tag(
        "main",
        _first_screen(plan, language),
        _plan(plan, language),
        _figures(plan, language),
        _precisions(plan, language),
        None if facts is None else _corpus(plan, facts, language),
        _caveats(plan, command, language),
    )
    style = _STYLE + (_JAPANESE_STYLE if language == "ja" else "")
    title = words("page", language, budget=budget_text(plan, language))
    return document(title, body, style=style, language=language)


def _first_screen(plan: Plan, language: str) -> Markup:
    text = paragraph(plan, language)  # refuses an unknown language
    o = plan.chosen
    title = words("title", language, n=amount(o.parameters, language),
                  d=amount(o.tokens, language), precision=o.precision)  # fmt: skip
    cells = [
        tag("div", tag("span", what, class_="what"), tag("strong", value), tag("span", note))
        for value, what, note in _numbers(plan, language)
    ]
    budget = budget_text(plan, language)
    return join(
        tag("p", words("kicker", language, budget=budget), class_="kicker"),
        tag("h1", title),
        tag("p", text, class_="paragraph", lang=language),
        tag("div", *cells, class_="numbers"),
    )


def _numbers(plan: Plan, language: str) -> list[tuple[str, str, str]]:
    """The four figures of the first screen: value, what it is, note."""
    o = plan.chosen
    band = words("n_no_band", language)
    if o.band_nats is not None:
        low, high = map(nats, o.band_nats)
        band = words("n_band", language, low=low, high=high)
    cost = "–" if o.cost_usd is None else dollars(o.cost_usd)
    own = words("n_own_price" if plan.price else "n_no_price", language)
    gain = f"−{nats(o.loss_nats - plan.doubled.loss_nats)}"
    doubled = words("n_doubled_loss", language, loss=nats(plan.doubled.loss_nats))
    return [
        (nats(o.loss_nats), words("n_loss", language), band),
        (digits(o.gpu_hours), words("n_hours", language), plan.gpu.name),
        (cost, words("n_cost", language), price_range(o, language) or own),
        (gain, words("n_doubled", language), doubled),
    ]


def _plan(plan: Plan, language: str) -> Markup:
    title = words("plan", language)
    rows: list[list[Child]] = [list(row) for row in plan_rows(plan, language)]
    made = table(list(columns("what", language)), rows, caption=title)
    return join(tag("h2", title), card(made, flush=True))


def _figures(plan: Plan, language: str) -> Markup:
    served = words("about_served", language) if plan.served_tokens else ""
    band = str(in_language(plan.law.about_band, language))
    return join(
        tag("h2", words("size", language)),
        figure_card(
            surface_figure(plan, language), words("about_surface", language, served=served)
        ),
        figure_card(
            money_figure(plan, language), words("about_money", language, band=sentence(band))
        ),
    )


def _precisions(plan: Plan, language: str) -> Markup:
    rows: list[list[Child]] = [list(row) for row in precision_rows(plan, language)]
    heads: list[Child] = [*columns("precision_columns", language)]
    numeric = frozenset(range(3, 12))
    made = table(heads, rows, numeric=numeric, caption=words("precisions", language))
    drawing = precision_figure(plan, language)
    said = [tag("li", crossing_sentence(c, language)) for c in plan.comparisons]
    said += [tag("li", words("left_out", language, why=why)) for why in plan.refused.values()]
    return join(
        tag("h2", words("precision_head", language)),
        tag("p", words("precision_lead", language), class_="lead"),
        card(made, flush=True),
        None if drawing is None else figure_card(drawing, tag("ul", *said, class_="plain")),
        card(tag("ul", *said, class_="plain")) if drawing is None and said else None,
    )


def _corpus(plan: Plan, facts: Facts, language: str) -> Markup:
    said = [tag("li", line) for line in corpus_sentences(plan, facts, language)]
    rows: list[list[Child]] = [list(row) for row in order_rows(facts.orders, language)]
    heads: list[Child] = [*columns("order_columns", language)]
    numeric = frozenset({1, 2, 3})
    made = table(heads, rows, numeric=numeric, caption=words("sequences", language))
    drawing = sequences_figure(facts.orders, plan.chosen.parameters, language)
    named = {"file": facts.file, "tokenizer": facts.tokenizer}
    caption = words("corpus_caption", language, **named)
    return join(
        tag("h2", words("corpus", language)),
        card(tag("ul", *said, class_="plain")),
        None if drawing is None else figure_card(drawing, caption),
        card(made, flush=True),
    )


def _caveats(plan: Plan, command: str, language: str) -> Markup:
    none = words("none", language)
    flags = [tag("li", in_language(flag, language)) for flag in plan.flags or (none,)]
    notes = [tag("li", in_language(note, language)) for note in plan.notes]
    law = plan.law.law
    symbols = ", ".join(f"{key} = {value:.6g}" for key, value in law.coefficients.items())
    formula = words("law", language, name=law.name, formula=law.formula, symbols=symbols)
    method = [
        tag("li", formula),
        tag("li", words("reckoning", language)),
        tag("li", tag("code", command) if command else words("python", language)),
    ]
    listed = tag("ul", *notes, *method, class_="plain")
    return join(
        tag("h2", words("trust", language)),
        card(tag("h3", words("flags", language)), tag("ul", *flags, class_="plain")),
        card(folded(words("sources", language), listed)),
    )
