"""The page of a sweep for engineers: verdicts, losses over learning rates, failures, the bill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfulp.report import words
from halfulp.report.document import claim, document, figure_card, save
from halfulp.report.html import Child, Markup, join, tag
from halfulp.report.price import FAIL, PASS, UNKNOWN
from halfulp.report.sweep_bars import PARTS, bill_figure, interval_figure
from halfulp.report.sweep_plots import SIGNS, rate_figure
from halfulp.report.sweep_tables import (
    STYLE,
    assumed_table,
    bill_table,
    broken_table,
    design_table,
    everything_table,
    failure_matrix,
    machine_table,
    split_table,
)
from halfulp.report.tables import mark
from halfulp.run import Run
from halfulp.sweep.inputs import Inputs
from halfulp.sweep.interval import LEVEL
from halfulp.sweep.money import Money, money
from halfulp.sweep.order import left_out
from halfulp.sweep.row import Row
from halfulp.sweep.store import read_sweep
from halfulp.sweep.table import Table
from halfulp.sweep.verdict import Verdict, percent_of, verdicts

BAR_NATS = 0.01


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A sweep with its verdicts; `bills` is None where nothing was said about money."""

    name: str
    table: Table
    verdicts: tuple[Verdict, ...]
    bills: Money | None
    bar_nats: float
    environment: Mapping[str, Any]

    @property
    def family(self) -> tuple[float, int]:
        """The level of each verdict, and how many recipes are judged."""
        judged = [v for v in self.verdicts if v.criteria]
        return (judged[0].level, judged[0].comparisons) if judged else (LEVEL, 1)

    @property
    def compared(self) -> tuple[Row, ...]:
        """The rows with runs in them."""
        return tuple(row for row in self.table.rows() if row.done)


def judge(path: str | Path, *, inputs: Inputs | None = None, bar_nats: float = BAR_NATS) -> Judged:
    """The sweep at `path`, judged; the bill only where `inputs` says something about money.

    RunError where there is no sweep, ConfigError for inputs that do not fit it.
    """
    path = Path(path)
    stored = read_sweep(path)
    table = Table(stored.design, stored.results, path=path, damaged=stored.damaged)
    bills = None if inputs is None else money(table, inputs)
    return Judged(
        name=path.resolve().name,
        table=table,
        verdicts=verdicts(table, bills, bar_nats=bar_nats),
        bills=bills,
        bar_nats=bar_nats,
        environment=Run.open(path, writer=False).environment(),
    )


def write_sweep(
    judged: Judged, out: str | Path, *, title: str | None = None, force: bool = False
) -> Path:
    """Write the page on a sweep to the file `out` and return its path.

    The page needs no network and no script, and has the same bytes for the same sweep. RunError if
    `out` exists and `force` is not given, or cannot be written.
    """
    path = claim(out, force=force)
    return save(render_sweep(judged, title=title), path)


def render_sweep(judged: Judged, *, title: str | None = None) -> str:
    """The whole page as HTML text."""
    name = title or judged.name
    body = tag(
        "main",
        _first_screen(judged, name),
        _rates(judged),
        _failed(judged),
        _intervals(judged),
        _split(judged),
        _bill(judged),
        _everything(judged),
        _made(judged),
        tag("footer", tag("p", _method(judged))),
    )
    return document(name, body, style=STYLE)


def _first_screen(judged: Judged, name: str) -> Markup:
    items = [_verdict(v) for v in judged.verdicts]
    return join(
        tag("p", f"halfulp report · {name}", class_="kicker"),
        tag("h1", headline(judged)),
        tag("p", _coverage(judged.table), class_="lead"),
        tag("div", tag("ul", *items, class_="findings"), _family(judged), class_="card"),
    )


def _family(judged: Judged) -> Markup | None:
    """For how many comparisons the verdicts hold together; None for a single one."""
    level, count = judged.family
    if count == 1:
        return None
    text = (
        f"{count} recipes are judged, each at {percent_of(level)}, so that all that is said of "
        "them here holds together at 95 % (Bonferroni). Figures and tables below show each recipe "
        "by itself, at 95 %."
    )
    return tag("p", text, class_="note")


def headline(judged: Judged) -> str:
    """Who passes, who fails, and what could not be told, in a sentence."""
    parts = []
    for status, one, more in (
        (PASS, "passes", "pass"),
        (FAIL, "fails", "fail"),
        (UNKNOWN, "could not be told", "could not be told"),
    ):
        names = [v.recipe for v in judged.verdicts if v.status == status]
        if names:
            parts.append(f"{words.listing(names)} {one if len(names) == 1 else more}")
    return f"Against {judged.table.reference}: {', '.join(parts)}."


def _verdict(verdict: Verdict) -> Markup:
    rest = verdict.sentence.removeprefix(verdict.recipe).removesuffix(".")
    changes = "; ".join(verdict.changes)
    what = tag("small", f"What would change it: {changes}.", class_="changes") if changes else None
    return tag(
        "li",
        tag("span", mark(verdict.status, ""), tag("span", f"{verdict.status}: ", class_="hidden")),
        tag("span", tag("b", verdict.recipe), f"{rest}.", what),
    )


def _coverage(table: Table) -> str:
    cells, done = len(table.design.cells()), len(table.results)
    lost = sum(result.lost for result in table.results)
    text = (
        f"{len(table.recipes)} recipes × {len(table.lrs)} learning rates × {len(table.seeds)} "
        f"seeds{f' × {len(table.data)} data sets' if len(table.data) > 1 else ''}"
    )
    notes = [f"{done} of {cells} runs done"]
    notes += [f"{lost} lost"] if lost else []
    never = len(left_out(table.design, table.results))
    notes += [f"{never} left out, of a refused recipe"] if never else []
    notes += [f"{len(table.damaged)} damaged in the record"] if table.damaged else []
    return f"{text}; {', '.join(notes)}. {_SEEDS if len(table.seeds) < 5 else ''}"


_SEEDS = "With few seeds intervals are wide: that is what is known, no more."


def _rates(judged: Judged) -> Markup:
    parts: list[Child] = [tag("h2", "Loss over the learning rate")]
    for k, data in enumerate(judged.table.data):
        rows = [row for row in judged.table.rows() if row.data == data]
        drawing = rate_figure(rows, judged.table.seeds, f"rates-{k}")
        title = tag("h3", data) if len(judged.table.data) > 1 else None
        if drawing is None:
            parts.append(tag("div", title, "No run has a loss yet.", class_="card"))
        else:
            parts += [title, figure_card(drawing, _rates_caption(rows))]
    return join(*parts)


def _rates_caption(rows: Sequence[Row]) -> str:
    window = next((row.window for row in rows if row.window is not None), None)
    within = f" within {window.delta_nats:.3f} nats of the reference's best" if window else ""
    seen = {o.failure for row in rows for p in row.points for o in p.outcomes}
    signs = [f"{sign} {reason}" for reason, sign in SIGNS.items() if reason in seen]
    failed = f" Failed runs stand above the panel: {', '.join(signs)}." if signs else ""
    return (
        "Held-out loss in nats per token. Circles are seeds, the line is their mean, in which a "
        "run without a loss counts with that at initialization; dashed: the reference. Shaded: the "
        f"window, the learning rates whose mean loss is{within}. A shade that "
        f"reaches the edge is at least as wide as the grid.{failed}"
    )


def _failed(judged: Judged) -> Markup:
    parts: list[Child] = [tag("h2", "Failures")]
    lead = (
        "Failed runs of those with a known outcome. Bounds are exact, one-sided, at 95 % "
        "confidence: no failure among a few runs does not make a recipe stable."
    )
    parts.append(tag("p", lead, class_="lead"))
    for data in judged.table.data:
        rows = [row for row in judged.table.rows() if row.data == data]
        title = tag("h3", data, class_="over") if len(judged.table.data) > 1 else None
        parts.append(
            tag("div", title, failure_matrix(rows, len(judged.table.seeds)), class_="card flush")
        )
    broken = broken_table(judged.table.rows())
    if broken is not None:
        inside = tag("details", tag("summary", "Every failed or lost run"), broken)
        parts.append(tag("div", inside, class_="card"))
    refused = [row for row in judged.table.rows() if row.refused]
    items = [tag("li", tag("b", row.recipe), f" on {row.data}: {row.refused}") for row in refused]
    if items:
        what = tag("h3", "Refused by the model or the data: no statistics")
        parts.append(tag("div", what, tag("ul", *items, class_="plain"), class_="card"))
    return join(*parts)


def _intervals(judged: Judged) -> Markup | None:
    parts: list[Child] = []
    for k, data in enumerate(judged.table.data):
        rows = [row for row in judged.table.rows() if row.data == data]
        drawing = interval_figure(rows, judged.bar_nats, f"intervals-{k}")
        if drawing is not None:
            title = tag("h3", data) if len(judged.table.data) > 1 else None
            parts += [title, figure_card(drawing, _intervals_caption(judged))]
    return join(tag("h2", "Recipes side by side"), *parts) if parts else None


def _intervals_caption(judged: Judged) -> str:
    return (
        "Dots with 95 % intervals over seeds; an arrow where an interval leaves the figure, a "
        f"triangle for a lower bound. Gray: within ±{judged.bar_nats:g} nats of the reference, "
        "linear inside and logarithmic outside; each recipe at its own best learning rate, chosen "
        "on the other seeds. Sensitivity: mean loss over the learning rates above the reference's "
        "best. Sharpness of the logits: over the reference's, same seed and learning rate; compare "
        "it within one rounding mode only, as truncation shrinks logits."
    )


def _split(judged: Judged) -> Markup | None:
    splits = judged.table.splits()
    if not splits:
        return None
    lead = (
        "Truncation pulls every operand toward zero. Bias: truncating minus rounding to nearest in "
        "the same format; resolution: rounding to nearest minus the reference. Paired by seed, in "
        "nats."
    )
    return join(
        tag("h2", "Truncation bias and resolution"),
        tag("p", lead, class_="lead"),
        tag("div", split_table(splits), class_="card flush"),
    )


def _bill(judged: Judged) -> Markup:
    bills = judged.bills
    if bills is None:
        how = "halfulp report SWEEP --gpu H200 --gpu-hours 12000 --speedup 1.35"
        text = join(
            "No price, hours or speed-up was given, so there is no bill: ", tag("code", how)
        )
        return join(tag("h2", "What it costs"), tag("div", text, class_="card"))
    drawing = bill_figure(bills.costs, f"total cost, {bills.reference} = 1")
    given = (f"{name} = {value}, given." for name, value in bills.inputs.assumed().items())
    assumed = [tag("li", text) for text in (*given, *bills.assumptions)]
    figures = assumed_table(bills) if bills.defaults else None
    return join(
        tag("h2", "What it costs until one run has succeeded"),
        None if drawing is None else figure_card(drawing, _bill_caption()),
        tag("div", bill_table(bills), class_="card flush"),
        tag("div", tag("h3", "Assumed"), tag("ul", *assumed, class_="plain"), class_="card"),
        None if figures is None else tag("div", figures, class_="card flush"),
    )


def _bill_caption() -> Markup:
    names = ("one run", "its retries", "search for the learning rate")
    keys = [
        tag("span", tag("i", "", style=f"background:{color}"), name, class_="key")
        for name, color in zip(names, PARTS, strict=True)
    ]
    text = "Median of the total cost, split in proportion to its parts; bars are 95 % intervals."
    return join(*keys, text)


def _everything(judged: Judged) -> Markup:
    found = {v.recipe: v for v in judged.verdicts}
    return join(
        tag("h2", "Everything in one table"),
        tag("p", _COLUMNS, class_="lead"),
        tag("div", everything_table(judged.table, found, judged.bills), class_="card flush"),
    )


_COLUMNS = (
    "Losses in nats per token. Above the reference: each at its own best learning rate; same rate: "
    "both at the reference's best. Failures: at the recipe's own best learning rate, p the "
    "probability that a run fails. Brackets are 95 % intervals over n seeds."
)


def _made(judged: Judged) -> Markup:
    damaged = [tag("li", line) for line in judged.table.damaged]
    absent = [
        f"{r.recipe} on {r.data}: {r.missing} of {r.planned}"
        for r in judged.table.rows()
        if r.missing
    ]
    missing = [tag("li", text) for text in absent]
    return join(
        tag("h2", "What was run"),
        _listed("Damaged records: their runs count as not done", damaged),
        _listed("Not run yet: counted nowhere", missing),
        tag("div", design_table(judged.table), class_="card flush"),
        tag("div", machine_table(judged.environment), class_="card flush"),
    )


def _listed(title: str, items: Sequence[Markup]) -> Markup | None:
    if not items:
        return None
    return tag("div", tag("h3", title), tag("ul", *items, class_="plain"), class_="card")


def _method(judged: Judged) -> str:
    return (
        "How a verdict is made: loss, failures, window and, where money was given, cost are judged "
        f"one by one. Loss passes when the whole interval of the gap is below {judged.bar_nats:g} "
        "nats and fails when all of it is above, on every data set. Failures pass when no larger "
        "share failed than of the reference's, and fail when Fisher's exact test finds more (one-"
        "sided, 5 %). The window fails when no learning rate comes near the reference's best. Cost "
        "passes when its whole interval is below the reference's, and fails when it is above. One "
        "failed part fails the recipe, all must pass for a pass, and anything else could not be "
        "told. In failures and cost lost runs are taken as they hurt most. A small sweep can "
        "refute a recipe for a large run; it cannot certify one."
    )
