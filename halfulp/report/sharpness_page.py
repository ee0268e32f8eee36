"""The page of `halfulp sharpness`: which blocks are sharp, how surely, and what follows."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from halfulp.report import sharpness as say
from halfulp.report import words
from halfulp.report.document import claim, document, figure_card, save
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.price import FAIL, PASS, UNKNOWN
from halfulp.report.sharpness import Estimate, estimates, overall, pairs
from halfulp.report.sharpness_plots import dot_figure, layer_figure
from halfulp.report.tables import mark
from halfulp.sharpness.report import Row, SharpnessReport

Ratios = Mapping[str, Mapping[str, float]]  # rule → block type → factor on the learning rate
Cells = Mapping[str, str | float | int | None]  # column → value

WANTED = 0.05  # relative standard error that the table counts draws for
_WANTED = f"{WANTED:.0%}".replace("%", "\u00a0%")
_MOST_TENSORS = 400
_STYLE = """
h1 .verdict { margin-right: 0.25em; }
ul.plain { margin: 0; padding-left: 1.2em; }
pre { overflow-x: auto; margin: 0; }
"""
_ESTIMATORS = {
    "gnb": "Gauss-Newton-Bartlett: gradients of labels sampled from the model, unbiased for the "
    "trace of the Gauss-Newton matrix (Liu et al., arXiv:2305.14342)",
    "fisher": "empirical Fisher: gradients of the true labels, which add B ‖E g‖²",
    "hutchinson": "Hutchinson probes of the exact Hessian, by Hessian-vector products",
    "lanczos": "largest eigenvalue of the exact Hessian of each type, by Lanczos iteration",
    "noise": "spread of the gradients of micro-batches, with true labels",
}


def write_sharpness(
    report: SharpnessReport,
    path: str | Path,
    *,
    name: str,
    ratios: Ratios | None = None,
    rounding: Sequence[Cells] = (),
    force: bool = False,
    command: str = "",
) -> Path:
    """Write the page of a measurement to the file `path` and return its path.

    `ratios` maps a rule's name to its ratio per block type; `rounding` holds the rows of a
    forecast, whose columns are the keys of the first. The page needs no network and no script.
    RunError if `path` exists and `force` is not given, or cannot be written.
    """
    out = claim(path, force=force)
    text = render_sharpness(report, name=name, ratios=ratios, rounding=rounding, command=command)
    return save(text, out)


def render_sharpness(
    report: SharpnessReport,
    *,
    name: str,
    ratios: Ratios | None = None,
    rounding: Sequence[Cells] = (),
    command: str = "",
) -> str:
    """The whole page as HTML text; `name` is the model's in the reader's words."""
    found = estimates(report)
    body = tag(
        "main",
        _first_screen(report, found, name),
        _types(report, found, ratios or {}),
        _layers(report),
        _rounding(rounding),
        _notes(report),
        _tensors(report),
        _made(report, command),
        tag("footer", tag("p", _method(report))),
    )
    return document(f"{name}: sharpness", body, style=_STYLE)


def _first_screen(report: SharpnessReport, found: Mapping[str, Estimate], name: str) -> Markup:
    judged = pairs(found)
    verdict = overall(judged)
    text = {PASS: "Pass.", FAIL: "Fail.", UNKNOWN: "Could not tell."}[verdict]
    return join(
        tag("p", f"halfulp sharpness · {name}", class_="kicker"),
        tag("h1", headline(found)),
        _numbers(report, found),
        tag(
            "div",
            tag(
                "ul",
                tag(
                    "li",
                    tag("span", mark(verdict, ""), tag("span", f"{text} ", class_="hidden")),
                    tag("span", tag("b", f"{say.order(found)}. "), say.on_the_paper(judged)),
                ),
                class_="findings",
            ),
            class_="card",
        ),
    )


def headline(found: Mapping[str, Estimate]) -> str:
    """What is flattest and what is sharpest among the paper's types, in a sentence."""
    low, high, ratio = say.extremes(found)
    if not low:
        return "Nothing could be compared: the measurement has no two of the paper's block types."
    others = [k for k in found if k not in say.PAPER_TYPES and found[k].known]
    beyond = [k for k in others if found[k].sharpness > found[high].sharpness]
    are = "are" if len(beyond) > 1 else "is"
    rest = f"; {words.listing(beyond)}, not among the paper's types, {are} sharper still"
    sure = "" if overall(pairs(found)) != UNKNOWN else ", and some neighbors cannot be told apart"
    return (
        f"{low} is the flattest block type and {high} the sharpest, {say.times(ratio)} apart"
        f"{rest if beyond else ''}{sure}."
    )


def _numbers(report: SharpnessReport, found: Mapping[str, Estimate]) -> Markup:
    low, high, ratio = say.extremes(found)
    cells = [
        tag("div", tag("span", what, class_="what"), tag("strong", value), tag("span", note))
        for value, what, note in (
            (say.times(ratio), f"{high} over {low}" if low else "no ratio", _ratio_note(found)),
            _sharpest(found, high),
            _precision(report),
        )
    ]
    return tag("div", *cells, class_="numbers")


def _ratio_note(found: Mapping[str, Estimate]) -> str:
    low, high, _ = say.extremes(found)
    if not low:
        return ""
    half = math.hypot(found[low].half, found[high].half)
    if not math.isfinite(half):
        return "its uncertainty is unknown"
    _, _, ratio = say.extremes(found)
    ends = [say.times(ratio * math.exp(sign * half)) for sign in (-1, 1)]
    return f"95 % between {ends[0]} and {ends[1]}"


def _sharpest(found: Mapping[str, Estimate], high: str) -> tuple[str, str, str]:
    if not high:
        return "–", "sharpest block type", ""
    one = found[high]
    share = one.parameters / max(1, sum(e.parameters for e in found.values()))
    value = say.number(one.sharpness)
    return value, f"sharpness of {high}", f"in {words.share(share)} of the parameters"


def _precision(report: SharpnessReport) -> tuple[str, str, str]:
    if report.eigenvalues:
        return "exact", "precision of the eigenvalues", "up to the convergence of the iteration"
    rows = [row for row in report.rows("type") if row.kind in say.PAPER_TYPES]
    known = [row for row in rows if math.isfinite(row.rel_se)]
    draws = f"{report.draws} draw{'s' if report.draws != 1 else ''}"
    if not known:
        return "unknown", "precision", f"{draws} give no standard error"
    worst = max(known, key=lambda row: row.rel_se)
    note = f"{draws} of {report.positions:,} positions; worst is {worst.name}"
    return f"±\u00a0{words.share(worst.rel_se)}", "largest standard error", note


def _types(report: SharpnessReport, found: Mapping[str, Estimate], ratios: Ratios) -> Markup | None:
    drawing = dot_figure(found)
    caption = "Dots are the estimates, bars their 95 % intervals over the draws."
    return join(
        tag("h2", "Block types"),
        None if drawing is None else figure_card(drawing, caption),
        tag("div", _type_table(report, found, ratios), class_="card flush"),
    )


def _type_table(report: SharpnessReport, found: Mapping[str, Estimate], ratios: Ratios) -> Markup:
    by_type = report.by_type if report.draws else {}
    norm = found.get("norm")
    head: list[Child] = ["block type", "parameters", "trace", "sharpness", "standard error"]
    head += [f"draws for {_WANTED}", "S(norm) / S"]
    head += [join("learning rate", tag("small", rule)) for rule in ratios]
    head += ["largest eigenvalue"] if report.eigenvalues else []
    rows: list[list[Child]] = []
    for kind, one in found.items():
        row = by_type.get(kind)
        cells: list[Child] = [kind, f"{one.parameters:,}", *_row_cells(row)]
        known = norm is not None and norm.known and one.known
        cells.append(say.times(norm.sharpness / one.sharpness) if norm and known else "–")
        cells += [_factor(ratio.get(kind)) for ratio in ratios.values()]
        cells += [say.number(report.eigenvalues[kind])] if report.eigenvalues else []
        rows.append(cells)
    numeric = frozenset(range(1, len(head)))
    return table(head, rows, numeric=numeric, caption="Sharpness of the block types")


def _row_cells(row: Row | None) -> list[Child]:
    """Trace, sharpness, relative standard error, draws for the wanted one."""
    if row is None:
        return ["–"] * 4
    sure = math.isfinite(row.rel_se)
    error = f"±\u00a0{words.share(row.rel_se)}" if sure else "unknown"
    draws = f"{row.draws_for(WANTED):,}" if sure else "–"
    return [say.number(row.trace), say.number(row.sharpness), error, draws]


def _factor(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}×"


def _layers(report: SharpnessReport) -> Markup | None:
    rows = [row for row in report.rows("block") if row.layer is not None] if report.draws else []
    values: dict[str, dict[int, float]] = {}
    for row in rows:
        if row.layer is not None:
            values.setdefault(row.kind, {})[row.layer] = row.sharpness
    drawing = layer_figure(values)
    if drawing is None:
        return None
    caption = (
        "A stronger color is sharper, on a logarithmic scale. Blocks outside the layers, the final "
        "norm among them, are in the figure above."
    )
    return join(tag("h2", "Layer by layer"), figure_card(drawing, caption))


def _rounding(rounding: Sequence[Cells]) -> Markup | None:
    if not rounding:
        return None
    columns = list(rounding[0])
    numeric = [
        i
        for i, column in enumerate(columns)
        if any(isinstance(row.get(column), (int, float)) for row in rounding)
    ]
    rows: list[list[Child]] = [[_plain(row.get(column)) for column in columns] for row in rounding]
    lead = (
        "Rise of the loss, in nats per token, when the weights of a block are rounded to a format "
        "and all others are not."
    )
    made = table(list(columns), rows, numeric=frozenset(numeric), caption="Rounding forecast")
    return join(
        tag("h2", "What rounding these blocks would cost"),
        tag("p", lead, class_="lead"),
        tag("div", made, class_="card flush"),
    )


def _plain(value: str | float | int | None) -> Child:
    if value is None:
        return "–"
    if isinstance(value, float):
        return say.number(value)
    return f"{value:,}" if isinstance(value, int) else value


def _notes(report: SharpnessReport) -> Markup | None:
    if not report.notes:
        return None
    items = tag("ul", *(tag("li", note) for note in report.notes), class_="plain")
    return join(tag("h2", "To know before quoting"), tag("div", items, class_="card"))


def _tensors(report: SharpnessReport) -> Markup | None:
    if not report.draws:
        return None
    rows: list[list[Child]] = [
        [row.name, row.kind, f"{row.parameters:,}", *_row_cells(row)]
        for row in report.rows("tensor")[:_MOST_TENSORS]
    ]
    head: list[Child] = ["tensor", "block type", "parameters", "trace", "sharpness"]
    head += ["standard error", f"draws for {_WANTED}"]
    made = table(head, rows, numeric=frozenset(range(2, 7)), caption="Sharpness of every tensor")
    left = len(report.pieces) - len(rows)
    more = tag("p", f"{left:,} more tensors are in the JSON only.", class_="lead") if left else None
    inside = tag("details", tag("summary", f"{len(rows):,} tensors"), made, more)
    return join(tag("h2", "Every tensor"), tag("div", inside, class_="card"))


def _made(report: SharpnessReport, command: str) -> Markup:
    steps = report.cost_steps
    cost = f"{steps:.1f} forward and backward passes" if math.isfinite(steps) else "not recorded"
    loss = words.nats(report.loss_nats)
    rows: list[list[Child]] = [
        ["model", report.model],
        ["estimator", _ESTIMATORS.get(report.estimator, report.estimator)],
        ["draws", f"{report.draws:,} of {report.positions:,} positions, seed {report.seed}"],
        ["loss there", "–" if loss == "–" else f"{loss} nats per token"],
        ["cost", cost],
    ]
    if command:
        rows.append(["command", tag("code", command)])
    made = table(["what", "found"], rows, numeric=frozenset(), caption="How it was measured")
    return join(tag("h2", "How it was measured"), tag("div", made, class_="card flush"))


def _method(report: SharpnessReport) -> str:
    interval = (
        "Eigenvalues have no sampling error."
        if report.eigenvalues
        else "Intervals are Student's over the draws; they cover the batches only where each draw "
        "has one of its own."
    )
    return (
        "Sharpness is the trace of a block's curvature over its parameters, as in Wang et al. "
        f"(arXiv:2502.19002); their order, flattest first, is {say.PAPER}. Pass: every neighbor in "
        "it is flatter than the next, beyond the 95 % intervals; fail: at least one pair is the "
        f"other way round. {interval} Only ratios within one model mean anything, and the order "
        "of an untrained model is not that of a trained one."
    )
