"""Tables of a sweep: everything in one, the failure matrix, the runs that did not make it."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from halfulp.report import words
from halfulp.report.html import Child, Markup, join, table, tag
from halfulp.report.sweep_bars import figure_of, times
from halfulp.report.sweep_plots import SIGNS, rate
from halfulp.report.tables import mark
from halfulp.sweep.failures import Failures
from halfulp.sweep.interval import Interval
from halfulp.sweep.money import Cost, Money
from halfulp.sweep.ranges import Range
from halfulp.sweep.row import Point, Row
from halfulp.sweep.spikes import CONVENTIONS
from halfulp.sweep.split import Split
from halfulp.sweep.table import Table
from halfulp.sweep.verdict import Verdict

STYLE = """
ul.plain { margin: 0; padding-left: 1.2em; }
h3, .lead, .plain, code { overflow-wrap: anywhere; } .flush h3 { padding: 10px 14px 0; }
.changes { display: block; color: var(--muted); font-size: 13.5px; margin-top: 2px; }
.key { margin-right: 14px; white-space: nowrap; }
.key i { display: inline-block; width: 10px; height: 10px; margin-right: 5px; }
.card > details:first-child { margin-top: 0; }
.dense table { font-size: 13px; } .dense th, .dense td { padding: 6px 8px; }
.dense td small, .dense th small { font-size: 11.5px; }
.matrix thead th:first-child { text-align: left; }
.matrix td, .matrix th { text-align: center; white-space: nowrap; }
.matrix th[scope=row] { text-align: left; }
.cell { display: block; border-radius: 4px; padding: 3px 6px; margin: -3px -6px; }
.cell small { font-size: 11.5px; }
"""


def everything_table(found: Table, verdicts: Mapping[str, Verdict], bills: Money | None) -> Markup:
    """One row per recipe and data set, with every statistic, its interval and n."""
    several = len(found.data) > 1
    head: list[Child] = ["recipe", "runs", "best rate", "loss", "above the reference", "same rate"]
    head += ["window, octaves", "sensitivity", "failed", "sharpness", "log Z", "spikes"]
    if bills is not None:
        head += ["total cost", "pays above"]
    rows = [_everything(row, verdicts.get(row.recipe), bills, several) for row in found.rows()]
    numeric = frozenset(range(1, len(head)))
    made = table(head, rows, numeric=numeric, caption="Every recipe and data set, with intervals")
    return tag("div", made, class_="dense")


def _everything(
    row: Row, verdict: Verdict | None, bills: Money | None, several: bool
) -> list[Child]:
    said = mark(verdict.status) if verdict else tag("span", "reference", class_="verdict unknown")
    name = join(row.recipe, tag("small", row.data) if several else None, tag("small", said))
    if row.refused:
        return [name, "refused", *["–"] * (10 + (2 if bills is not None else 0))]
    cells: list[Child] = [name, _runs(row), "–" if row.best_lr is None else rate(row.best_lr)]
    cells += [spread(row.loss), spread(row.gap, signed=True), spread(row.gap_same_lr, signed=True)]
    cells += [window(row), _sensitivity(row), failures(row.failures), _ratio(row), _logz(row)]
    cells += [_spikes(row)]
    return [*cells, *_bill(bills.cost(row.recipe))] if bills is not None else cells


def _runs(row: Row) -> Child:
    absent = [f"{n} {what}" for n, what in ((row.lost, "lost"), (row.missing, "not run")) if n]
    return join(f"{row.done} of {row.planned}", *(tag("small", what) for what in absent))


def spread(interval: Interval | None, *, signed: bool = False) -> Child:
    """A value in nats, its 95 % interval and how many seeds are behind it; "–" for None."""
    if interval is None:
        return "–"
    value, low, high = in_nats(interval, signed=signed)
    return join(value, tag("small", f"[{low}, {high}]"), tag("small", f"n = {interval.n}"))


def in_nats(interval: Interval, *, signed: bool = False) -> tuple[str, str, str]:
    """Value, low and high end with the same number of decimals; "∞" for inf."""
    figures = (interval.value, interval.low, interval.high)
    digits = 3 if max((abs(x) for x in figures if math.isfinite(x)), default=1) >= 0.0005 else 5
    value, low, high = (_fixed(x, digits, signed) for x in figures)
    return value, low, high


def _fixed(value: float, digits: int, signed: bool) -> str:
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return (f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}").replace("-", "−")


def window(row: Row) -> Child:
    """The window in octaves with its interval and its rates; "–" for None."""
    w = row.window
    if w is None:
        return "–"
    ends = tag("small", f"[{w.low:.1f}, {octaves(w.high)}]")
    if not w.octaves and not w.open_ended:
        return join("none", ends)
    value = f"≥\u00a0{w.octaves:.1f}" if w.open_ended else f"{w.octaves:.1f}"
    return join(value, ends, tag("small", f"{rate(w.lr_low)} … {rate(w.lr_high)}"))


def octaves(value: float) -> str:
    """One decimal; "∞" where there is no upper end."""
    return f"{value:.1f}" if math.isfinite(value) else "∞"


def _sensitivity(row: Row) -> Child:
    if row.sensitivity is None:
        return "–"
    own = tag("small", f"own best: {words.nats(row.sensitivity.own.value)}")
    return join(spread(row.sensitivity.reference), own)


def failures(found: Failures) -> Child:
    """k of n with the exact bound; lost runs in their best and worst case."""
    if not found.runs and not found.lost:
        return "–"
    bound = tag("small", f"p ≤ {words.share(found.upper)}" if found.runs else "nothing known")
    cases = f"{found.best.failed}/{found.best.runs} … {found.worst.failed}/{found.worst.runs}"
    lost = tag("small", f"with {found.lost} lost: {cases}") if found.lost else None
    return join(f"{found.failed}/{found.runs}", bound, lost)


def _ratio(row: Row) -> Child:
    ratio, centered = row.sharpness_ratio, row.sharpness_centered_ratio
    if ratio is None:
        return "1×" if row.is_reference else "–"
    ends = tag("small", f"[{figure_of(ratio.low)}, {figure_of(ratio.high)}]")
    middle = tag("small", f"centered {figure_of(centered.value)}×") if centered else None
    return join(f"{figure_of(ratio.value)}×", ends, middle)


def _logz(row: Row) -> Child:
    return "–" if row.logz is None else f"{row.logz:.2f}".replace("-", "−")


def _spikes(row: Row) -> Child:
    """Share of steps, for every convention; "too short" where no run has a full window."""
    lines = [
        tag("div", words.share(row.spikes[name]), tag("small", f"{k:g} σ of {size} steps"))
        for name, (k, size) in CONVENTIONS.items()
        if name in row.spikes
    ]
    return join(*lines) if lines else "too short"


def _bill(cost: Cost | None) -> list[Child]:
    if cost is None:
        return ["–", "–"]
    total = tag("small", cost.missing or "–") if cost.ratio is None else _range(cost.ratio)
    return [total, "–" if cost.break_even is None else _range(cost.break_even)]


def _range(found: Range) -> Child:
    value, bracket, ends = times(found).partition("[")
    return join(value.strip(), tag("small", bracket + ends)) if ends else value


def failure_matrix(rows: Sequence[Row], seeds: int) -> Markup:
    """Recipe × learning rate: failed of known runs; the reasons on hover and as signs."""
    lrs = next((row.points for row in rows), ())
    head: list[Child] = ["recipe", *(rate(point.lr) for point in lrs), "all rates"]
    body: list[list[Child]] = []
    for row in rows:
        if row.refused:
            body.append([row.recipe, *["refused"] * len(lrs), "–"])
            continue
        body.append(
            [row.recipe, *(_cell(p, seeds) for p in row.points), failures(row.failures_grid)]
        )
    made = table(head, body, caption="Failed runs of known ones, by learning rate")
    return tag("div", made, class_="matrix")


def _cell(point: Point, seeds: int) -> Markup:
    found, reasons = point.failures, [o.failure for o in point.outcomes if o.failure]
    absent = [f"{found.lost} lost"] if found.lost else []
    missing = seeds - len(point.outcomes)
    absent += [f"{missing} not run"] if missing else []
    notes = [f"{reasons.count(reason)} {reason}" for reason in dict.fromkeys(reasons)]
    signs = "".join(SIGNS[reason] for reason in dict.fromkeys(reasons))
    small = " · ".join([*([signs] if signs else []), *absent])
    tint = (
        f"background: rgb(213 94 0 / {0.1 + 0.35 * (found.share or 0):.2f})"
        if found.failed
        else None
    )
    text = f"{found.failed}/{found.runs}" if found.runs else "–"
    title = "; ".join([*notes, *absent]) or "none failed"
    inside = tag("small", small) if small else None
    return tag("span", text, inside, class_="cell", style=tint, title=title)


def broken_table(rows: Sequence[Row]) -> Markup | None:
    """Runs that failed or were lost, with their reason and message; None if all are well."""
    head: list[Child] = ["recipe", "data", "rate", "seeds", "what", "message"]
    body: list[list[Child]] = []
    for row in rows:
        for point in row.points:
            groups: dict[tuple[str, str], list[int]] = {}
            for outcome in point.outcomes:
                what = outcome.result.status if outcome.result.lost else outcome.failure
                if what:
                    key = (what, outcome.result.message)
                    groups.setdefault(key, []).append(outcome.result.seed)
            for (what, message), seeds in groups.items():
                cells: list[Child] = [row.recipe, row.data, rate(point.lr)]
                cells += [", ".join(map(str, seeds)), what, tag("small", message or "–")]
                body.append(cells)
    return table(head, body, caption="Runs that failed or were lost") if body else None


def split_table(splits: Sequence[Split]) -> Markup:
    """The gap of a format that truncates, split into the bias of truncation and what is left."""
    head: list[Child] = ["truncating recipe", "data", "rate", "gap", "truncation bias"]
    head += ["resolution", "bias in the gap"]
    body: list[list[Child]] = []
    for s in splits:
        parts = [spread(x, signed=True) for x in (s.total, s.bias, s.resolution)]
        part = s.bias_share
        share = "could not tell" if part is None else words.share(part)
        name = join(s.truncate, tag("small", f"with {s.nearest}"))
        body.append([name, s.data, rate(s.lr), *parts, share])
    return table(head, body, numeric=frozenset(range(2, 7)), caption="Bias and resolution")


def bill_table(bills: Money) -> Markup:
    """What each recipe costs until a run has succeeded, in parts and in all."""
    head: list[Child] = ["recipe", "speed-up", "runs until one succeeds", "search, in runs"]
    head += ["GPU-hours", "US dollars", "over the reference", "pays above", "saves, probability"]
    body = [_bill_row(cost, bills) for cost in bills.costs]
    return table(head, body, numeric=frozenset(range(1, 9)), caption="The bill of each recipe")


def _bill_row(cost: Cost, bills: Money) -> list[Child]:
    if cost.ratio is None:
        pays = "–" if cost.break_even is None else _range(cost.break_even)
        why = tag("small", cost.missing)
        return [join(cost.recipe, why), "–", _range(cost.retries), "–", "–", "–", "–", pays, "–"]
    alike = cost.recipe == bills.reference
    return [
        cost.recipe,
        "1×" if cost.speedup is None else _range(cost.speedup),
        _range(cost.retries),
        "–" if cost.search is None else _range(cost.search),
        "–" if cost.gpu_hours is None else large(cost.gpu_hours),
        "–" if cost.usd is None else large(cost.usd),
        "1×" if alike else _range(cost.ratio),
        "–" if alike or cost.break_even is None else _range(cost.break_even),
        "–" if cost.saves is None else words.share(cost.saves),
    ]


def large(found: Range) -> Child:
    """A large amount in three digits with its interval."""
    if found.low == found.high:
        return amount(found.value)
    return join(amount(found.value), tag("small", f"[{amount(found.low)}, {amount(found.high)}]"))


def amount(value: float) -> str:
    """Three significant digits with separators; "∞" for inf, "–" for nan."""
    if not math.isfinite(value):
        return figure_of(value)
    return f"{float(f'{value:.3g}'):,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def assumed_table(bills: Money) -> Markup:
    """Every figure that nobody gave, with its source and date."""
    body: list[list[Child]] = [[d.name, d.value, d.source, d.date or "–"] for d in bills.defaults]
    head: list[Child] = ["figure", "value", "source", "date"]
    return table(head, body, caption="Figures that stand in for what was not given")


def design_table(found: Table) -> Markup:
    """What was run."""
    design, config = found.design, found.design.config
    done = f"{len(found.results)} of {len(design.cells())} runs have a result"
    facts: list[list[Child]] = [
        ["recipes", ", ".join(design.recipes)],
        ["reference", design.reference],
        ["learning rates", ", ".join(rate(lr) for lr in design.lrs)],
        ["seeds", ", ".join(map(str, design.seeds))],
        ["data", ", ".join(_data(name, sources) for name, sources in design.data.items())],
        ["runs", done],
        ["steps of a run", f"{config.train.steps:,}"],
        ["guard", "on" if config.guard.on else "off"],
    ]
    return table(["", "value"], facts, caption="Design of the sweep")


def _data(name: str, sources: Sequence[str]) -> str:
    return f"{name} ({', '.join(sources)})" if sources and list(sources) != [name] else name


def machine_table(environment: Mapping[str, Any]) -> Markup:
    """Machine, versions and command, as the sweep's directory records them."""
    facts: list[list[Child]] = [
        [key.replace("_", " "), tag("code", value) if key == "command" else value]
        for key, value in ((k, _plain(v)) for k, v in environment.items())
    ]
    return table(["", "value"], facts, caption="Machine and command")


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, (list, tuple)) else str(value)
