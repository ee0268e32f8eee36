"""Figures of a plan: the loss surface, loss against money, precisions, distinct sequences."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.plan.budget import Plan
from halfulp.plan.facts import Order
from halfulp.report.amounts import amount, digits, dollars
from halfulp.report.curves import spread
from halfulp.report.html import Markup
from halfulp.report.plan_words import unit_of, words
from halfulp.report.svg import INK, MUTED, SERIES, figure, render, series_style, standalone
from halfulp.report.words import nats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1080, 84, 150, 46, 56
SURFACE, LINES = 430, 300  # heights of the axes
_GRID = 70  # points of the surface along each side
_LEVELS = 14
_REACH = 30.0  # how far from the plan the axes go, as a factor
_STEPS = 13  # budgets of the curve of loss against money


def surface_figure(plan: Plan, language: str = "en", name: str = "plan-surface") -> Markup:
    """Lines of equal loss over parameters and tokens, the budget's line and the plan on it."""
    with figure(WIDTH, TOP + SURFACE + BOTTOM) as drawing:
        _surface(drawing, plan, language)
        o = plan.chosen
        return render(
            drawing, name,
            words("f_surface_text", language, n=amount(o.parameters, language),
                  d=amount(o.tokens, language), loss=nats(o.loss_nats)),
        )  # fmt: skip


def surface_svg(plan: Plan, language: str = "en") -> str:
    """The same figure as the text of an SVG file."""
    with figure(WIDTH, TOP + SURFACE + BOTTOM) as drawing:
        _surface(drawing, plan, language)
        return standalone(drawing)


def _surface(drawing: "Figure", plan: Plan, language: str) -> None:
    axes = _axes(drawing, SURFACE)
    n, d = _side(plan.chosen.parameters), _side(plan.chosen.tokens)
    loss = np.array([[plan.way.setting.loss(x, y) for x in n] for y in d])
    lowest = plan.law.plain.E
    levels = lowest + np.geomspace(loss.min() - lowest, loss.max() - lowest, _LEVELS)
    lines = axes.contour(n, d, loss, levels=levels[1:-1], colors=SERIES[1], linewidths=1.0)
    axes.clabel(lines, fmt=lambda x: f"{x:.2f}", fontsize=10, colors=MUTED)
    _log_axes(axes, n, d)
    product = plan.chosen.flops / 6
    axes.plot(n, product / n, color=INK, lw=1.4, ls=(0, (5, 2)))
    axes.set_ylim(d[0], d[-1])
    _fitted(axes, plan, n, d, language)
    _points(axes, plan, language)
    axes.set_xlabel(words("parameters", language), labelpad=4)
    _title(axes, words("f_surface", language, law=plan.law.law.name))


def _side(center: float) -> np.ndarray:
    return np.geomspace(center / _REACH, center * _REACH, _GRID)


def _fitted(axes: "Axes", plan: Plan, n: np.ndarray, d: np.ndarray, language: str) -> None:
    """The box of parameters and tokens that the law was fitted on."""
    ranges = plan.law.law.ranges
    if not {"N", "D"} <= ranges.keys():
        return
    (n0, n1), (d0, d1) = ranges["N"], ranges["D"]
    x0, x1 = max(n0, n[0]), min(n1, n[-1])
    y0, y1 = max(d0, d[0]), min(d1, d[-1])
    if x0 < x1 and y0 < y1:
        box = {"color": SERIES[2], "alpha": 0.10, "lw": 0}
        axes.fill_between([x0, x1], y0, y1, **box)
        _aside(axes, 0.30, words("f_fitted", language))


def _points(axes: "Axes", plan: Plan, language: str) -> None:
    o, twice = plan.chosen, plan.doubled
    axes.plot([o.parameters], [o.tokens], "o", ms=9, color=SERIES[0])
    axes.plot([twice.parameters], [twice.tokens], "o", ms=8, mfc="none", mew=1.6, color=SERIES[0])
    _aside(axes, 0.92, words("f_plan", language))
    _aside(axes, 0.82, words("f_doubled", language))
    _aside(axes, 0.62, words("f_compute", language))


def money_figure(plan: Plan, language: str = "en", name: str = "plan-money") -> Markup:
    """The least loss against GPU-hours and dollars, with the band of the law."""
    hours = np.geomspace(plan.chosen.gpu_hours / _REACH, plan.chosen.gpu_hours * _REACH, _STEPS)
    options = [plan.way.option(h * plan.way.flops_per_hour) for h in hours]
    loss = [o.loss_nats for o in options]
    with figure(WIDTH, TOP + LINES + BOTTOM) as drawing:
        axes = _axes(drawing, LINES)
        bands = [o.band_nats for o in options if o.band_nats is not None]
        if len(bands) == len(options):
            low, high = zip(*bands, strict=True)
            axes.fill_between(hours, low, high, color=SERIES[1], alpha=0.18, lw=0)
            _aside(axes, 0.70, words("f_band", language))
        axes.plot(hours, loss, color=SERIES[1], lw=2.0)
        for option, fill in ((plan.chosen, SERIES[0]), (plan.doubled, "none")):
            axes.plot([option.gpu_hours], [option.loss_nats], "o", ms=9, mfc=fill, mew=1.6,
                      color=SERIES[0])  # fmt: skip
        _aside(axes, 0.92, words("f_plan", language))
        _aside(axes, 0.82, words("f_doubled", language))
        axes.set_xscale("log")
        _hour_ticks(axes, hours[0], hours[-1], plan)
        _title(axes, words("f_money", language, precision=plan.chosen.precision))
        return render(drawing, name, _describe_money(options, language))


def _describe_money(options: Sequence[Any], language: str) -> str:
    first, last = options[0], options[-1]
    hours, most = digits(first.gpu_hours), digits(last.gpu_hours)
    ends = {"first": nats(first.loss_nats), "last": nats(last.loss_nats)}
    return words("f_money_text", language, hours=hours, most=most, **ends)


def precision_figure(
    plan: Plan, language: str = "en", name: str = "plan-precision"
) -> Markup | None:
    """How much lower the loss of each format is than that of BF16 in the same GPU time."""
    if not plan.comparisons:
        return None
    most = max(max(gain for _, gain in c.curve) for c in plan.comparisons)
    least = min(c.gain_nats for c in plan.comparisons)
    low, high = min(-1.5 * max(most, 1e-3), 1.5 * least), 1.2 * max(most, 1e-3)
    with figure(WIDTH, TOP + LINES + BOTTOM) as drawing:
        axes = _axes(drawing, LINES)
        ends, colors = {}, {}
        for i, c in enumerate(plan.comparisons):
            hours, gains = (np.array(values) for values in zip(*c.curve, strict=True))
            color, dash = series_style(i)
            axes.plot(hours, np.maximum(gains, low), color=color, ls=dash)
            ends[c.precision], colors[c.precision] = float(gains[-1]), color
        axes.axhline(0, color=INK, lw=1.0)
        axes.axvline(plan.chosen.gpu_hours, color=MUTED, lw=1.0, ls=(0, (2, 2)))
        axes.set_xscale("log")
        axes.set_ylim(low, high)
        x = [h for h, _ in plan.comparisons[0].curve]
        _hour_ticks(axes, x[0], x[-1], plan)
        _end_labels(axes, ends, colors, low, high)
        _title(axes, words("f_precision", language))
        said = [f"{c.precision} {nats(c.gain_nats, signed=True)}" for c in plan.comparisons]
        return render(drawing, name, words("f_precision_text", language, gains=", ".join(said)))


def sequences_figure(
    orders: Sequence[Order],
    parameters: float,
    language: str = "en",
    name: str = "plan-sequences",
) -> Markup | None:
    """Distinct n-symbol sequences against the symbols read, and the size of the model."""
    shown = [order for order in orders if len(order.curve) > 1]
    if not shown:
        return None
    with figure(WIDTH, TOP + LINES + BOTTOM) as drawing:
        axes = _axes(drawing, LINES)
        points = np.array([point for order in shown for point in order.curve])
        low = max(points[:, 1].min(), 1.0) / 1.5
        high = max(points[:, 1].max(), parameters) * 1.5
        ends, colors = {}, {}
        for i, order in enumerate(shown):
            color, dash = series_style(i)
            axes.plot(*zip(*order.curve, strict=True), color=color, ls=dash)
            label = words("f_order", language, n=order.n, unit=unit_of(order.unit, language))
            ends[label], colors[label] = order.curve[-1][1], color
        axes.axhline(parameters, color=INK, lw=1.2, ls=(0, (5, 2)))
        label = words("parameters", language)
        ends[label], colors[label] = parameters, INK
        _log_axes(axes, points[:, 0], np.array([low, high]))
        axes.set_ylim(low, high)
        _end_labels(axes, ends, colors, low, high, log=True)
        axes.set_xlabel(words("f_read", language), labelpad=4)
        _title(axes, words("f_sequences", language))
        said = ", ".join(f"n = {order.n}: {amount(order.unique, language)}" for order in shown)
        return render(drawing, name, words("f_sequences_text", language, counts=said))


def _axes(drawing: "Figure", height: int) -> "Axes":
    total = TOP + height + BOTTOM
    inner = WIDTH - LEFT - RIGHT
    return drawing.add_axes((LEFT / WIDTH, BOTTOM / total, inner / WIDTH, height / total))


def _log_axes(axes: "Axes", x: np.ndarray, y: np.ndarray) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(float(x.min()), float(x.max()))
    _amount_ticks(axes.xaxis, float(x.min()), float(x.max()))
    _amount_ticks(axes.yaxis, float(y.min()), float(y.max()))


def _amount_ticks(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axis.set_major_locator(FixedLocator(_decades(low, high)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: _short(x)))


def _decades(low: float, high: float) -> list[float]:
    decades = range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    step = max(1, math.ceil(len(decades) / 8))
    return [10.0**k for k in decades[::step]]


def _short(value: float) -> str:
    """1M, 10B, 3T; thousands with separators; a power of ten beyond."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if size <= value < 1e15:
            return f"{value / size:g}{letter}"
    return f"{value:,.0f}" if value < 1e15 else f"{value:.0e}"


def _hour_ticks(axes: "Axes", low: float, high: float, plan: Plan) -> None:
    """Decades of GPU-hours, with dollars below where there is a price."""
    from matplotlib.ticker import FixedLocator, NullLocator

    ticks = _decades(low, high)
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    price = plan.price
    labels = [
        f"{digits(h) if h >= 1 else f'{h:g}'} h" + (f"\n{dollars(h * price.usd)}" if price else "")
        for h in ticks
    ]
    axes.set_xticks(ticks, labels)


def _title(axes: "Axes", text: str) -> None:
    axes.annotate(
        text, xy=(0, 1), xytext=(-LEFT + 4, 14), xycoords="axes fraction",
        textcoords="offset points", fontsize=13, fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _aside(axes: "Axes", height: float, text: str) -> None:
    """A remark to the right of the axes, at a share of their height."""
    axes.annotate(
        text, xy=(1, height), xytext=(12, 0), xycoords="axes fraction",
        textcoords="offset points", fontsize=11, color=MUTED, va="top", annotation_clip=False,
    )  # fmt: skip


def _end_labels(
    axes: "Axes", ends: dict[str, float], colors: dict[str, str], low: float, high: float, *,
    log: bool = False,
) -> None:  # fmt: skip
    """Names beside the ends of their lines, apart from one another."""

    def share(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return min(max(part, 0.0), 1.0)

    placed = spread([share(v) * LINES for v in ends.values()], 16, LINES)
    for (label, value), y in zip(ends.items(), placed, strict=True):
        line = {"arrowstyle": "-", "color": colors[label], "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
        axes.annotate(
            label, xy=(1.003, share(value)), xytext=(1.03, y / LINES), xycoords="axes fraction",
            textcoords="axes fraction", va="center", fontsize=11, annotation_clip=False,
            arrowprops=line | {"relpos": (-0.02, 0.5)},
        )  # fmt: skip
