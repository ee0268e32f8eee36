"""Figures of a sweep with one row per recipe: intervals side by side, and the bill as bars."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from halfulp.report import words
from halfulp.report.curves import short
from halfulp.report.html import Markup
from halfulp.report.svg import CARD, INK, LINE, MUTED, SERIES, figure, render
from halfulp.report.sweep_plots import colors
from halfulp.sweep.money import Cost
from halfulp.sweep.ranges import Range
from halfulp.sweep.table import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, NAMES, GUTTER, ROW, TOP, BOTTOM = 1080, 150, 22, 30, 34, 30
BAR_ROW, BAR_NAMES, BAR_TEXT = 40, 128, 188
PARTS = (SERIES[1], SERIES[4], SERIES[3])  # one run, its retries, the search


@dataclass(frozen=True)
class Dot:
    """A value with its interval; `open_end`: it is a lower bound."""

    value: float
    low: float
    high: float
    open_end: bool = False


def interval_figure(rows: Sequence[Row], bar_nats: float, name: str = "intervals") -> Markup | None:
    """Gap, window, sensitivity and sharpness of the recipes of one data set; None without any."""
    shown = [row for row in rows if not row.refused]
    columns = [
        (title, [read(row) for row in shown], mark) for title, read, mark in _quantities(rows)
    ]
    columns = [c for c in columns if any(dot is not None for dot in c[1])]
    if not columns:
        return None
    height = TOP + ROW * len(shown) + BOTTOM
    size = (WIDTH - NAMES - GUTTER * len(columns)) / len(columns)
    color = colors(
        [row.recipe for row in rows], next((r.recipe for r in rows if r.is_reference), "")
    )
    with figure(WIDTH, height) as drawing:
        for k, (title, dots, mark) in enumerate(columns):
            left = NAMES + k * (size + GUTTER)
            axes = _axes(drawing, (left, TOP, size, ROW * len(shown)), WIDTH, height)
            _scale(axes, dots, mark, bar_nats if k == 0 and title.startswith("loss") else 0.0)
            for y, (row, dot) in enumerate(zip(shown, dots, strict=True)):
                _dot(axes, y, dot, color[row.recipe])
            axes.set_ylim(len(shown) - 0.5, -0.5)
            axes.set_yticks(
                range(len(shown)), [short(r.recipe, most=18) for r in shown] if not k else []
            )
            axes.tick_params(axis="y", labelcolor=INK, labelsize=11.5)
            axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", pad=8)
        return render(drawing, name, _describe(shown))


def _quantities(
    rows: Sequence[Row],
) -> list[tuple[str, Callable[[Row], Dot | None], float | None]]:
    """(title, what to read off a row, where a line marks no difference)."""
    reference = next((row for row in rows if row.is_reference), None)
    octaves = reference.window.octaves if reference and reference.window else None
    excess = reference.sensitivity.reference.value if reference and reference.sensitivity else None
    return [
        ("loss above the reference, nats", lambda row: _of(row.gap), 0.0),
        ("window, octaves", _window, octaves),
        (
            "learning rate sensitivity, nats",
            lambda r: _of(r.sensitivity and r.sensitivity.reference),
            excess,
        ),
        ("logits sharpness, ratio", lambda row: _of(row.sharpness_ratio), 1.0),
    ]


def _of(interval: Any) -> Dot | None:
    known = interval is not None and math.isfinite(interval.value)
    return Dot(interval.value, interval.low, interval.high) if known else None


def _window(row: Row) -> Dot | None:
    w = row.window
    return None if w is None else Dot(w.octaves, w.low, w.high, open_end=w.open_ended)


def _scale(axes: "Axes", dots: Sequence[Dot | None], mark: float | None, bar_nats: float) -> None:
    """Limits that keep the values apart; intervals that reach beyond them end in an arrow."""
    values = [d.value for d in dots if d is not None] + ([] if mark is None else [mark])
    ends = [e for d in dots if d is not None for e in (d.low, d.high) if math.isfinite(e)]
    span = max(max(values) - min(values), 3 * bar_nats, 0.05 * abs(max(values)), 1e-6)
    low = max(min([*ends, *values]), min(values) - 0.6 * span) - 0.06 * span
    high = min(max([*ends, *values]), max(values) + 0.6 * span) + 0.06 * span
    if bar_nats:
        axes.set_xscale("symlog", linthresh=bar_nats, linscale=0.8)
        axes.axvspan(-bar_nats, bar_nats, color=MUTED, alpha=0.13, lw=0)
        _symlog_ticks(axes, low, high, bar_nats)
    else:
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlim(low, high)
    if mark is not None:
        axes.axvline(mark, color=INK if bar_nats else MUTED, lw=1.0)
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x")


def _symlog_ticks(axes: "Axes", low: float, high: float, bar_nats: float) -> None:
    from matplotlib.ticker import NullLocator

    decades = [bar_nats * 10**k for k in range(6)]
    ticks = [s for s in (*[-d for d in decades[::-1]], 0.0, *decades) if low <= s <= high]
    axes.set_xticks(ticks, [f"{t:+g}".replace("-", "−") if t else "0" for t in ticks])
    axes.xaxis.set_minor_locator(NullLocator())


def _dot(axes: "Axes", y: int, dot: Dot | None, color: str) -> None:
    low, high = axes.get_xlim()
    if dot is None:
        axes.annotate(
            "–", xy=(0.02, y), xycoords=("axes fraction", "data"), color=MUTED, va="center"
        )
        return
    start, stop = max(dot.low, low), min(dot.high, high)
    axes.plot([start, stop], [y, y], color=color, lw=2.6, alpha=0.5, solid_capstyle="butt")
    for end, at, marker in ((dot.low, low, "<"), (dot.high, high, ">")):
        if not low <= end <= high:
            axes.plot(at, y, marker, color=color, ms=6, clip_on=False)
    axes.plot(dot.value, y, ">" if dot.open_end else "o", color=color, ms=7.5, mec=CARD, mew=0.8)


def _axes(
    drawing: "Figure", box: tuple[float, float, float, float], width: int, height: int
) -> "Axes":
    left, top, wide, high = box
    area = (left / width, 1 - (top + high) / height, wide / width, high / height)
    axes = drawing.add_axes(area)
    axes.tick_params(axis="x", labelsize=10.5)
    return axes


def _describe(rows: Sequence[Row]) -> str:
    parts = [
        f"{row.recipe} {words.nats(row.gap.value, signed=True)}"
        for row in rows
        if row.gap is not None
    ]
    return f"Recipes side by side. Loss above the reference in nats: {'; '.join(parts) or 'none'}."


def bill_figure(
    costs: Sequence[Cost],
    reference: str,
    labels: Mapping[str, str],
    *,
    width: int = WIDTH,
    name: str = "bill",
) -> Markup | None:
    """Expected total cost over the reference's, as bars with 95 % intervals; None without any.

    A bar is split in proportion to one run, its retries and the search for a learning rate.
    `labels`: the words of the axis, "relative", and of the line at 1, "same".
    """
    known = [c for c in costs if c.ratio is not None and not math.isnan(c.ratio.value)]
    if not known:
        return None
    height = 22 + BAR_ROW * len(known) + 44
    with figure(width, height) as drawing:
        box = (BAR_NAMES, 22, width - BAR_NAMES - BAR_TEXT, BAR_ROW * len(known))
        axes = _axes(drawing, box, width, height)
        limit = _limit([c.ratio for c in known if c.ratio is not None])
        axes.set_xlim(0, limit)
        axes.set_ylim(len(known) - 0.5, -0.5)
        axes.axvline(1, color=INK, lw=1.0, zorder=3)
        for y, cost in enumerate(known):
            _bar(axes, y, cost, limit)
        axes.set_yticks(range(len(known)), [short(c.recipe, most=16) for c in known])
        axes.tick_params(axis="y", labelcolor=INK, labelsize=11.5)
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(labels["relative"].format(reference=reference), fontsize=11, labelpad=3)
        return render(drawing, name, _describe_bill(known, reference))


def _limit(ratios: Sequence[Range]) -> float:
    ends = [min(r.high, 2.5 * r.value) for r in ratios if math.isfinite(r.value)]
    return 1.06 * max([1.5, *(min(e, 5.0) for e in ends)])


def _bar(axes: "Axes", y: int, cost: Cost, limit: float) -> None:
    ratio = cost.ratio
    assert ratio is not None
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
        times(ratio), xy=(1, y), xycoords=("axes fraction", "data"), xytext=(8, 0),
        textcoords="offset points", va="center", fontsize=12, annotation_clip=False,
    )  # fmt: skip


def parts(cost: Cost) -> tuple[float, float, float]:
    """Shares of one run, of its retries and of the search in the bill, of their medians."""
    search = cost.search.value if cost.search is not None else 0.0
    whole = cost.retries.value + search
    if not math.isfinite(whole):
        return (0.0, 0.0, 1.0) if math.isinf(search) else (0.0, 1.0, 0.0)
    return 1 / whole, (cost.retries.value - 1) / whole, search / whole


def times(ratio: Range) -> str:
    """ "0.79× [0.70, 0.91]"; a number without doubt has no interval."""
    if ratio.low == ratio.high:
        return f"{figure_of(ratio.value)}×"
    return f"{figure_of(ratio.value)}× [{figure_of(ratio.low)}, {figure_of(ratio.high)}]"


def figure_of(value: float) -> str:
    """Two decimals, fewer for large ones; "∞" for inf, "–" for nan."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:.2f}" if abs(value) < 9.95 else f"{value:,.0f}"


def _describe_bill(costs: Sequence[Cost], reference: str) -> str:
    shown = [f"{c.recipe} {times(c.ratio)}" for c in costs if c.ratio is not None]
    return f"Expected total cost over that of {reference}: {'; '.join(shown)}."
