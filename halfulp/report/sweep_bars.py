"""Figures of a sweep with one row per recipe: intervals side by side, and the bill as bars."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from halfulp.report import words
from halfulp.report.curves import short
from halfulp.report.html import Markup
from halfulp.report.svg import CARD, INK, MUTED, SERIES, figure, render
from halfulp.report.sweep_plots import colors
from halfulp.sweep.interval import Interval
from halfulp.sweep.money import Cost
from halfulp.sweep.ranges import Range
from halfulp.sweep.row import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, NAMES, GUTTER, ROW, TOP, BOTTOM = 1080, 150, 22, 30, 34, 30
BAR_ROW, BAR_NAMES, BAR_TEXT = 36, 150, 176
PARTS = (SERIES[1], SERIES[4], SERIES[3])  # one run, its retries, the search


@dataclass(frozen=True)
class Dot:
    """A value with its interval; `open_end`: it is a lower bound."""

    value: float
    low: float
    high: float
    open_end: bool = False


@dataclass(frozen=True)
class Column:
    """A quantity of every row; `mark` is where a line stands for no difference."""

    title: str
    dots: tuple[Dot | None, ...]
    mark: float | None
    scale: str = "linear"  # "linear" | "log" | "bar": linear within the bar, logarithmic outside


def interval_figure(rows: Sequence[Row], bar_nats: float, name: str = "intervals") -> Markup | None:
    """Gap, window, sensitivity and sharpness of the recipes of one data set; None without any."""
    shown = [row for row in rows if not row.refused]
    columns = [column for column in _columns(shown) if any(column.dots)]
    if not columns:
        return None
    reference = next((row.recipe for row in rows if row.is_reference), "")
    color = colors([row.recipe for row in rows], reference)
    height = TOP + ROW * len(shown) + BOTTOM
    size = (WIDTH - NAMES - GUTTER * len(columns)) / len(columns)
    with figure(WIDTH, height) as drawing:
        for k, column in enumerate(columns):
            box = (NAMES + k * (size + GUTTER), TOP, size, ROW * len(shown))
            axes = _axes(drawing, box, WIDTH, height)
            _scale(axes, column, bar_nats)
            for y, (row, dot) in enumerate(zip(shown, column.dots, strict=True)):
                _dot(axes, y, dot, color[row.recipe])
            _names(axes, [] if k else [row.recipe for row in shown], len(shown))
            axes.grid(visible=True, axis="x")
            axes.set_title(column.title, loc="left", fontsize=11.5, fontweight="bold", pad=8)
        return render(drawing, name, _describe(shown))


def _columns(rows: Sequence[Row]) -> list[Column]:
    reference = next((row for row in rows if row.is_reference), None)
    octaves = reference.window.octaves if reference and reference.window else None
    excess = reference.sensitivity.reference.value if reference and reference.sensitivity else None
    gaps = tuple(_of(row.gap) for row in rows)
    excesses = tuple(_of(row.sensitivity.reference if row.sensitivity else None) for row in rows)
    ratios = tuple(_of(row.sharpness_ratio) for row in rows)
    return [
        Column("loss above the reference, nats", gaps, 0.0, "bar"),
        Column("window, octaves", tuple(_window(row) for row in rows), octaves),
        Column("learning rate sensitivity, nats", excesses, excess),
        Column("logits sharpness, ratio", ratios, 1.0, "log"),
    ]


def _of(interval: Interval | None) -> Dot | None:
    if interval is None or not math.isfinite(interval.value):
        return None
    return Dot(interval.value, interval.low, interval.high)


def _window(row: Row) -> Dot | None:
    w = row.window
    return None if w is None else Dot(w.octaves, w.low, w.high, open_end=w.open_ended)


def _scale(axes: "Axes", column: Column, bar_nats: float) -> None:
    """Limits that keep the values apart; intervals that reach beyond them end in an arrow."""
    dots = [dot for dot in column.dots if dot is not None]
    values = [d.value for d in dots] + ([] if column.mark is None else [column.mark])
    ends = [e for d in dots for e in (d.low, d.high) if math.isfinite(e)]
    if column.scale == "log":
        _log_limits(axes, values, ends)
    else:
        floor = 3 * bar_nats if column.scale == "bar" else 1e-6
        span = max(max(values) - min(values), floor, 0.05 * abs(max(values)))
        low = max(min([*ends, *values]), min(values) - 0.6 * span) - 0.06 * span
        high = min(max([*ends, *values]), max(values) + 0.6 * span) + 0.06 * span
        _linear_limits(axes, low, high, bar_nats if column.scale == "bar" else 0.0)
    if column.mark is not None:
        axes.axvline(column.mark, color=INK if column.scale == "bar" else MUTED, lw=1.0)


def _log_limits(axes: "Axes", values: Sequence[float], ends: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    span = max(2.0, max(values) / min(values))
    low = max(min([*ends, *values]), min(values) / span**0.6) / span**0.06
    high = min(max([*ends, *values]), max(values) * span**0.6) * span**0.06
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 40 else (1,)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def _linear_limits(axes: "Axes", low: float, high: float, bar_nats: float) -> None:
    from matplotlib.ticker import MaxNLocator, NullLocator

    if not bar_nats:
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
        axes.set_xlim(low, high)
        return
    axes.set_xscale("symlog", linthresh=bar_nats, linscale=0.8)
    axes.axvspan(-bar_nats, bar_nats, color=MUTED, alpha=0.13, lw=0)
    decades = [bar_nats * 10**k for k in range(6)]
    low, high = min(1.3 * low, -1.5 * bar_nats), 1.3 * high
    ticks = [t for t in (*[-d for d in decades[::-1]], 0.0, *decades) if low <= t <= high]
    axes.set_xticks(ticks, [f"{t:+g}".replace("-", "−") if t else "0" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(low, high)


def _dot(axes: "Axes", y: int, dot: Dot | None, color: str) -> None:
    if dot is None:
        axes.text(0.02, y, "–", transform=axes.get_yaxis_transform(), color=MUTED, va="center")
        return
    low, high = axes.get_xlim()
    start, stop = max(dot.low, low), min(dot.high, high)
    axes.plot([start, stop], [y, y], color=color, lw=2.6, alpha=0.5, solid_capstyle="butt")
    for end, at, marker in ((dot.low, low, "<"), (dot.high, high, ">")):
        if not low <= end <= high:
            axes.plot(at, y, marker, color=color, ms=6, clip_on=False)
    shape = ">" if dot.open_end else "o"
    axes.plot(dot.value, y, shape, color=color, ms=7.5, mec=CARD, mew=0.8, clip_on=False)


def _names(axes: "Axes", names: Sequence[str], rows: int) -> None:
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_yticks(range(len(names)), [short(name, most=20) for name in names])
    axes.tick_params(axis="y", labelcolor=INK, labelsize=11.5)
    axes.grid(visible=False, axis="y")


def _axes(
    drawing: "Figure", box: tuple[float, float, float, float], width: int, height: int
) -> "Axes":
    left, top, wide, high = box
    area = (left / width, 1 - (top + high) / height, wide / width, high / height)
    axes = drawing.add_axes(area)
    axes.tick_params(axis="x", labelsize=10.5)
    return axes


def _describe(rows: Sequence[Row]) -> str:
    gaps = [f"{r.recipe} {words.nats(r.gap.value, signed=True)}" for r in rows if r.gap is not None]
    return f"Recipes side by side. Loss above the reference in nats: {'; '.join(gaps) or 'none'}."


def bill_figure(
    costs: Sequence[Cost],
    axis: str,
    *,
    width: int = WIDTH,
    row: int = BAR_ROW,
    name: str = "bill",
) -> Markup | None:
    """Expected total cost over the reference's, as bars with 95 % intervals; None without any.

    A bar is split in proportion to one run, its retries and the search for a learning rate; an
    infinite cost has none. `axis` names the axis; `width` and `row`, the height of a bar, are in
    CSS pixels.
    """
    known = [c for c in costs if c.ratio is not None and not math.isnan(c.ratio.value)]
    if not known:
        return None
    top, bottom = 8, 40 if axis else 24
    height = top + row * len(known) + bottom
    with figure(width, height) as drawing:
        box = (BAR_NAMES, top, width - BAR_NAMES - BAR_TEXT, row * len(known))
        axes = _axes(drawing, box, width, height)
        limit = _limit([c.ratio for c in known if c.ratio is not None])
        axes.set_xlim(0, limit)
        axes.axvline(1, color=INK, lw=1.0, zorder=3)
        for y, cost in enumerate(known):
            _bar(axes, y, cost, limit)
        _names(axes, [cost.recipe for cost in known], len(known))
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(axis, fontsize=11, labelpad=3)
        return render(drawing, name, _describe_bill(known, axis))


def _limit(ratios: Sequence[Range]) -> float:
    ends = [min(r.high, 2.5 * r.value) for r in ratios if math.isfinite(r.value)]
    return 1.06 * max([1.5, *(min(e, 5.0) for e in ends)])


def _bar(axes: "Axes", y: int, cost: Cost, limit: float) -> None:
    ratio = cost.ratio
    assert ratio is not None
    if math.isfinite(ratio.value):
        start = 0.0
        for share, color in zip(parts(cost), PARTS, strict=True):
            length = share * min(ratio.value, limit)
            axes.barh(y, length, 0.5, left=start, color=color, alpha=0.8, lw=0)
            start += length
    low, high = min(ratio.low, limit), min(ratio.high, limit)
    if high > low:
        axes.plot([low, high], [y, y], color=INK, lw=1.6)
        axes.plot([low], [y], "|", color=INK, ms=9, mew=1.6)
        axes.plot([high], [y], ">" if ratio.high > limit else "|", color=INK, ms=9, mew=1.6)
    axes.annotate(
        times(ratio), xy=(1, y), xycoords=("axes fraction", "data"), xytext=(12, 0),
        textcoords="offset points", va="center", fontsize=12, annotation_clip=False,
    )  # fmt: skip


def parts(cost: Cost) -> tuple[float, float, float]:
    """Shares of one run, of its retries and of the search in a finite bill, of their medians."""
    search = cost.search.value if cost.search is not None else 0.0
    whole = cost.retries.value + search
    return 1 / whole, (cost.retries.value - 1) / whole, search / whole


def times(ratio: Range) -> str:
    """ "0.79× [0.70, 0.91]"; a number without doubt has no interval, an infinite one no sign."""
    value = figure_of(ratio.value)
    sign = "×" if math.isfinite(ratio.value) else ""
    if ratio.low == ratio.high:
        return f"{value}{sign}"
    return f"{value}{sign} [{figure_of(ratio.low)}, {figure_of(ratio.high)}]"


def figure_of(value: float) -> str:
    """Two decimals, fewer for large ones; "∞" for inf, "–" for nan."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if abs(value) < 9.95 else f"{value:,.0f}"


def _describe_bill(costs: Sequence[Cost], axis: str) -> str:
    shown = [f"{c.recipe} {times(c.ratio)}" for c in costs if c.ratio is not None]
    what = axis or "total cost"
    return f"Expected {what}: {'; '.join(shown)}."
