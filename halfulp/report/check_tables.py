"""Tables of a check: formats, sites, safe formats, plan."""

import re
from collections.abc import Mapping, Sequence

from halfulp.check.plan import LowestSafe
from halfulp.check.report import CheckReport, Row, SiteRow
from halfulp.report import check_words as say
from halfulp.report import words
from halfulp.report.check_plots import ordered
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.tables import mark

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_MOST_COLUMNS = 14


def rows_table(
    report: CheckReport, rows: Sequence[Row], caption: str, *, operands: bool, probes: bool = False
) -> Markup:
    """One row per way of running the model: predicted and measured, side by side."""
    head: list[Child] = [
        "format", "measured KL", "predicted KL", "predicted / measured", "flips", "range events",
        "the change is", "remark",
    ]  # fmt: skip
    body = [_row(report, row, operands, probes) for row in rows]
    if not any(cells[-1] for cells in body):
        head, body = head[:-1], [cells[:-1] for cells in body]
    return table(head, body, numeric=frozenset(range(1, 6)), caption=caption)


def _row(report: CheckReport, row: Row, operands: bool, probes: bool) -> list[Child]:
    size = say.bits(row.name)
    name = tag("small", f"{size:g}\u00a0bits") if size == size else None
    remark = row.why or say.cause(report, row, operands)
    return [
        join(row.name, name),
        _measured(row, report.budget),
        _predicted(report, row, probes),
        _ratio(row),
        _flips(row),
        f"{row.range_events:,}" if row.range_events else "none",
        row.grade,
        tag("small", say.capital(remark)) if remark else "",
    ]


def _flips(row: Row) -> Child:
    """The measured share of changed choices, and the predicted one below it."""
    if row.predicted_flips != row.predicted_flips:
        return words.share(row.measured_flips)
    # What no text of this size can show is not worth its digits.
    tiny = 0 < row.predicted_flips < 1e-5
    predicted = "under 0.001\u00a0%" if tiny else words.share(row.predicted_flips)
    return join(words.share(row.measured_flips), tag("small", f"predicted {predicted}"))


def _measured(row: Row, budget: float) -> Markup:
    part = say.of_budget(row.measured_kl, budget)
    return join(mark(say.verdict(row, budget), say.kl(row.measured_kl)), tag("small", part))


def _predicted(report: CheckReport, row: Row, probes: bool) -> Child:
    if row.predicted_kl != row.predicted_kl:
        return join("–", tag("small", "withheld"))
    low, high = report.confidence.get(row.name, (0.0, 0.0)) if probes else (0.0, 0.0)
    ends = [say.kl(low), say.kl(high)]
    span = tag("small", f"probes {' … '.join(ends)}") if ends[0] != ends[1] else None
    return join(say.kl(row.predicted_kl), span)


def _ratio(row: Row) -> Child:
    if row.ratio != row.ratio:
        return "–"
    text = f"{row.ratio:.2f}"
    good = say.RATIO[0] <= row.ratio <= say.RATIO[1]
    return text if good else tag("b", text, class_="fail")


def sites_table(sites: Sequence[SiteRow], focus: str) -> Markup:
    """The costliest sites with their share as a bar."""
    most = max((s.share for s in sites if s.share == s.share), default=1.0) or 1.0
    head: list[Child] = ["site", "KL", "share", "running total", "over budget alone in", "why"]
    rows: list[list[Child]] = [
        [
            tag("div", _breakable(s.name), tag("small", f"{s.block} · {s.kind}"), class_="site"),
            say.kl(s.kl),
            bar(s.share, most),
            words.share(s.cumulative),
            s.crosses or "–",
            tag("div", say.capital(s.reason), class_="why"),
        ]
        for s in sites
    ]
    caption = f"Costliest sites in {focus}"
    return table(head, rows, numeric=frozenset({1, 3}), caption=caption)


def bar(share: float, most: float) -> Markup:
    """A share as a number and a bar whose full length is `most`."""
    length = 100 * min(1.0, max(0.0, share / most)) if share == share else 0.0
    inside = tag("span", "", style=f"width:{length:.1f}%")
    return join(tag("span", words.share(share), class_="share"), tag("span", inside, class_="bar"))


def _breakable(name: str) -> Markup:
    """A dotted name that may break after its dots and colons."""
    parts = re.split(r"(?<=[.:_/])", name)
    return join(*(item for part in parts for item in (part, Markup("<wbr>"))))


def heat_table(report: CheckReport) -> Markup:
    """The numbers behind the heat map."""
    formats = list(dict.fromkeys(word for cells in report.heat.values() for word in cells))
    rows: list[list[Child]] = [
        [block, *(_cell(report.heat[block].get(word, float("nan")), report) for word in formats)]
        for block in ordered(report.heat)
    ]
    numeric = frozenset(range(1, len(formats) + 1))
    return table(["block", *formats], rows, numeric=numeric, caption="Predicted KL per block")


def _cell(value: float, report: CheckReport) -> Child:
    text = say.kl(value)
    return tag("b", text, class_="fail") if value > report.budget else text


def safe_table(lowest: Sequence[LowestSafe]) -> Markup:
    """Layers as rows, block types as columns: the narrowest format alone and together."""
    cells = {entry.block: _safe_cell(entry) for entry in lowest}
    return grid(cells, "Narrowest safe format of each block")


def _safe_cell(entry: LowestSafe) -> Child:
    if entry.alone == entry.together:
        return fmt(entry.together)
    return join(fmt(entry.together), tag("small", f"alone {entry.alone}"))


def plan_table(formats: Mapping[str, str]) -> Markup:
    """Layers as rows, GEMMs as columns: the format that the plan gives."""
    return grid({name: fmt(word) for name, word in formats.items()}, "The plan, GEMM by GEMM")


def fmt(word: str) -> Markup:
    """A format on a tint that is the darker the more bits it has."""
    size = say.bits(word)
    width = min(32.0, max(0.0, size)) if size == size else 32.0
    style = next(
        name for limit, name in ((5, "w4"), (9, "w8"), (17, "w16"), (99, "w32")) if width < limit
    )
    return tag("span", word, class_=f"fmt {style}")


def grid(cells: Mapping[str, Child], caption: str) -> Markup:
    """Cells by name, one row per layer; equal neighbors share a row, the rest follows below."""
    layers: dict[int, dict[str, Child]] = {}
    others: dict[str, Child] = {}
    for name in cells:
        found = _LAYER.fullmatch(name)
        if found:
            layers.setdefault(int(found[1]), {})[found[2]] = cells[name]
        else:
            others[name] = cells[name]
    columns = list(dict.fromkeys(part for row in layers.values() for part in row))
    if len(columns) > _MOST_COLUMNS:
        return table(["where", "format"], [[n, c] for n, c in cells.items()], caption=caption)
    rows: list[list[Child]] = [
        [label, *(row.get(column, "–") for column in columns)] for label, row in _merged(layers)
    ]
    parts = [table(["layer", *columns], rows, caption=caption)] if rows else []
    if others:
        parts.append(_others(others, bool(rows)))
    return join(*parts)


def _others(others: Mapping[str, Child], after_layers: bool) -> Markup:
    listed = [tag("span", f"{name} ", cell, class_="pair") for name, cell in others.items()]
    lead = "Outside the layers: " if after_layers else ""
    return tag("p", lead, *listed, class_="pairs")


def _merged(layers: Mapping[int, dict[str, Child]]) -> list[tuple[str, dict[str, Child]]]:
    """Layers in order with a label, "4–9" for neighbors with the same cells."""
    runs: list[tuple[int, int, dict[str, Child]]] = []
    for n in sorted(layers):
        if runs and runs[-1][1] == n - 1 and runs[-1][2] == layers[n]:
            runs[-1] = (runs[-1][0], n, layers[n])
        else:
            runs.append((n, n, layers[n]))
    return [(str(a) if a == b else f"{a}–{b}", row) for a, b, row in runs]


def folded(title: str, *content: Child) -> Markup:
    """Content behind a click."""
    return tag("details", tag("summary", title), *content)


def card(*content: Child, flush: bool = False) -> Markup:
    """Content on a card; `flush` for a table that reaches its edges."""
    return tag("div", *content, class_="card flush" if flush else "card")
