"""The figure of losses over steps, and below it what each run loses to its reference."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.report import words
from halfulp.report.html import Markup, printable
from halfulp.report.price import Price, step_differences
from halfulp.report.read import Curve, Record
from halfulp.report.stats import band, smooth
from halfulp.report.svg import CARD, INK, MUTED, figure, render, series_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LEFT, RIGHT = 1080, 58, 176
LOSS_HEIGHT, PRICE_HEIGHT, TOP, GAP, BOTTOM = 290, 270, 34, 58, 46
LABEL_SIZE = 22  # characters beside a curve
LABEL_GAP = 17  # pixels between the baselines of two labels
MOST_DOTS = 30  # held-out differences drawn per run
MOST_POINTS = 600  # a longer curve is drawn by every so many-th smoothed point
BANDS_UP_TO = 6  # more runs than this are drawn without bands


def loss_figure(prices: Sequence[Price], bar_nats: float) -> Markup | None:
    """Smoothed training losses, and paired differences if there is a reference; None = no data."""
    shown = [price for price in prices if len(price.run.loss.finite().steps) > 1]
    if not shown:
        return None
    styles = _styles(prices)
    paired = [p for p in shown if p.reference is not None and len(_difference(p).steps) > 1]
    height = TOP + LOSS_HEIGHT + BOTTOM + (GAP + PRICE_HEIGHT if paired else 0)
    with figure(WIDTH, height) as drawing:
        top = _axes(drawing, height, TOP, LOSS_HEIGHT)
        end = max(int(p.run.loss.steps[-1]) for p in shown)
        window = _window(end)
        top.set_xlim(0, end)
        _losses(top, shown, styles, window)
        _decorate(top, f"Training loss, nats per token · mean over {window} steps")
        if paired:
            top.tick_params(labelbottom=False)
            below = _axes(drawing, height, TOP + LOSS_HEIGHT + GAP, PRICE_HEIGHT)
            below.set_xlim(0, end)
            _differences(below, paired, styles, window, bar_nats)
            names = list(dict.fromkeys(p.reference.label for p in paired if p.reference))
            reference = short(names[0]) if len(names) == 1 else "the reference"
            title = f"Loss above {reference} on the same tokens, nats per token"
            _decorate(below, title)
            below.set_xlabel("step", labelpad=4)
        else:
            top.set_xlabel("step", labelpad=4)
        return render(drawing, "loss", _describe(shown, paired))


def _describe(shown: Sequence[Price], paired: Sequence[Price]) -> str:
    losses = [f"{p.run.label} {_last(p.run.loss):.3f}" for p in shown]
    text = f"Training loss over steps. Last values in nats: {'; '.join(losses)}."
    if paired:
        ends = [f"{p.run.label} {words.nats(_last(_difference(p)), signed=True)}" for p in paired]
        text += f" Below, the difference to the reference at the end: {'; '.join(ends)}."
    return text


def _last(curve: Curve) -> float:
    values = curve.finite().values
    return float(values[-max(1, len(values) // 20) :].mean())


def _styles(prices: Sequence[Price]) -> dict[str, tuple[str, Any]]:
    """Line style per run label: references in ink, the others in the palette's order."""
    others = [p.run.label for p in prices if p.reference is not None]
    styles: dict[str, tuple[str, Any]] = {p.run.label: (INK, "-") for p in prices}
    if len(prices) == 1:
        others = [prices[0].run.label]
    return styles | {label: series_style(i) for i, label in enumerate(others)}


def _window(end: int) -> int:
    return max(1, end // 25) | 1


def _axes(drawing: Any, height: int, top: int, size: int) -> "Axes":
    area = (LEFT / WIDTH, 1 - (top + size) / height, 1 - (LEFT + RIGHT) / WIDTH, size / height)
    return drawing.add_axes(area)


def _decorate(axes: "Axes", title: str) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.annotate(
        title,
        xy=(0, 1),
        xytext=(-LEFT, 14),
        xycoords="axes fraction",
        textcoords="offset points",
        fontsize=13,
        fontweight="bold",
        annotation_clip=False,
    )


def _losses(
    axes: "Axes", shown: Sequence[Price], styles: dict[str, tuple[str, Any]], window: int
) -> None:
    ends, low, high = [], [], []
    if len(shown) == 1:
        raw = _thin(shown[0].run.loss.finite())
        low.append(raw.values.min())
        axes.plot(raw.steps, raw.values, color=styles[shown[0].run.label][0], lw=0.8, alpha=0.3)
    for price in _reference_last(shown):
        color, dash = styles[price.run.label]
        curve = price.run.loss.finite()
        line = _thin(Curve(curve.steps, smooth(curve.values, window)))
        axes.plot(line.steps, line.values, color=color, ls=dash)
        ends.append((line, price.run, color))
        low.append(line.values.min())
        # The first steps fall from ln(vocab): they would flatten everything that matters.
        settled = line.values[line.steps >= 0.06 * line.steps[-1]]
        high.append(settled.max() if len(settled) else line.values.max())
    span = max(high) - min(low) or 1.0
    axes.set_ylim(min(low) - 0.06 * span, max(high) + 0.05 * span)
    _end_labels(axes, ends)


def _reference_last(prices: Sequence[Price]) -> list[Price]:
    return sorted(prices, key=lambda p: p.reference is None)


def _difference(price: Price) -> Curve:
    return step_differences(price.run, price.reference)


def _differences(
    axes: "Axes",
    paired: Sequence[Price],
    styles: dict[str, tuple[str, Any]],
    window: int,
    bar_nats: float,
) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.axhspan(-bar_nats, bar_nats, color=MUTED, alpha=0.13, lw=0)
    axes.axhline(0, color=INK, lw=1.0)
    ends, extremes = [], [3 * bar_nats, -1.5 * bar_nats]
    for price in paired:
        color, dash = styles[price.run.label]
        curve = _difference(price)
        center = smooth(curve.values, window)
        line = _thin(Curve(curve.steps, center))
        axes.plot(line.steps, line.values, color=color, ls=dash)
        if len(paired) <= BANDS_UP_TO:
            half = _thin(Curve(curve.steps, band(curve.values, window))).values
            low, high = line.values - half, line.values + half
            axes.fill_between(line.steps, low, high, color=color, alpha=0.14, lw=0)
        _held_out_dots(axes, price, color)
        ends.append((line, price.run, color))
        extremes += [line.values.max(), line.values.min()]
    axes.set_yscale("symlog", linthresh=bar_nats, linscale=0.8)
    axes.set_ylim(min(extremes) * 1.25, max(extremes) * 1.35)
    ticks = _symlog_ticks(min(extremes) * 1.25, max(extremes) * 1.35, bar_nats)
    axes.set_yticks(ticks)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+g}" if y else "0"))
    axes.yaxis.set_minor_locator(_none())
    text = f"gray: within ±{bar_nats:g}"
    axes.text(
        0.008, -bar_nats * 0.93, text, transform=axes.get_yaxis_transform(),
        color=MUTED, fontsize=11, va="bottom",
    )  # fmt: skip
    _end_labels(axes, ends)


def _none() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _symlog_ticks(low: float, high: float, bar_nats: float) -> list[float]:
    sizes = [bar_nats * factor for factor in (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)]
    inside = [s for s in sizes if s <= high]
    return [*[-s for s in sizes if -s >= low][::-1], 0.0, *inside]


def _held_out_dots(axes: "Axes", price: Price, color: str) -> None:
    """The held-out difference at every evaluation: the numbers the verdict uses."""
    if price.reference is None:
        return
    mine, theirs = price.run.held_out.finite(), price.reference.held_out.finite()
    steps, i, j = np.intersect1d(mine.steps, theirs.steps, assume_unique=True, return_indices=True)
    every = -(-len(steps) // MOST_DOTS)
    shown = slice((len(steps) - 1) % every if every else 0, None, every or 1)
    values = (mine.values[i] - theirs.values[j])[shown]
    axes.plot(
        steps[shown],
        values,
        "o",
        ms=5,
        mfc=CARD,
        mec=color,
        mew=1.5,
        ls="",
        clip_on=False,
        zorder=3,
    )


def _thin(curve: Curve) -> Curve:
    every = math.ceil(len(curve.steps) / MOST_POINTS)
    index = np.arange(len(curve.steps) - 1, -1, -every)[::-1]
    return Curve(curve.steps[index], curve.values[index])


def _end_labels(axes: "Axes", ends: Sequence[tuple[Curve, Record, str]]) -> None:
    """Every line's name beside its end, moved apart where they would touch, with a leader."""
    height = axes.get_position().height * drawing_of(axes).get_size_inches()[1] * 72
    to_share = axes.transScale + axes.transLimits
    edge = axes.get_xlim()[1]
    wanted = [float(to_share.transform((1, line.values[-1]))[1]) for line, _, _ in ends]
    wanted = [min(max(y, 0.0), 1.0) * height for y in wanted]
    placed = spread(wanted, LABEL_GAP, height)
    for (line, record, color), y, end in zip(ends, placed, wanted, strict=True):
        last, value = int(line.steps[-1]), line.values[-1]
        broke = record.diverged
        axes.plot(last, value, "X" if broke else "o", color=color, ms=8 if broke else 4.5)
        if last < edge:
            axes.plot([last, edge], [value, value], ":", color=color, lw=1.0)
        note = f" ✕ step {record.broke_at:,}" if broke else ""
        text = short(record.label, most=LABEL_SIZE - len(note)) + note
        _label(axes, text, y / height, end / height, color)


def drawing_of(axes: "Axes") -> "Figure":
    """The figure that `axes` is part of."""
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    return drawing


def _label(axes: "Axes", text: str, y: float, end: float, color: str) -> None:
    axes.annotate(
        text,
        xy=(1.004, end),
        xytext=(1.03, y),
        xycoords="axes fraction",
        textcoords="axes fraction",
        va="center",
        ha="left",
        fontsize=12,
        annotation_clip=False,
        arrowprops={
            "arrowstyle": "-",
            "color": color,
            "lw": 1.3,
            "shrinkA": 0,
            "shrinkB": 0,
            "relpos": (-0.02, 0.5),
        },
    )


def short(label: str, *, most: int = LABEL_SIZE) -> str:
    """A label of at most `most` characters that a figure can show."""
    text = printable(label).replace("\n", " ")
    return text if len(text) <= most else f"{text[: most - 1]}…"


def spread(wanted: Sequence[float], gap: float, height: float) -> list[float]:
    """Positions at least `gap` apart, in the order of `wanted`, as near to it as blocks allow."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    groups: list[list[float]] = []  # [sum of (wanted − offset), members]
    for position in order:
        groups.append([wanted[position], 1])
        while len(groups) > 1 and _start(groups[-1], gap) < _stop(groups[-2], gap) + gap:
            total, members = groups.pop()
            groups[-1][0] += total - groups[-1][1] * members * gap
            groups[-1][1] += members
    placed = [0.0] * len(wanted)
    flat = [_start(g, gap) + k * gap for g in groups for k in range(int(g[1]))]
    shift = min(0.0, height - flat[-1]) if flat else 0.0
    for position, y in zip(order, flat, strict=True):
        placed[position] = y + shift
    return placed


def _start(group: list[float], gap: float) -> float:
    return max(0.0, group[0] / group[1])


def _stop(group: list[float], gap: float) -> float:
    return _start(group, gap) + (group[1] - 1) * gap
