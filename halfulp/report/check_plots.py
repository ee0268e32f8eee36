"""Figures of a check: what each block costs in each format, and errors along the depth."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.check.profile import DepthProfile, StreamPoint
from halfulp.report import check_words as say
from halfulp.report.counters import block_order
from halfulp.report.curves import short
from halfulp.report.html import Markup
from halfulp.report.svg import INK, LINE, MUTED, SERIES, figure, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Heat = Mapping[str, Mapping[str, float]]  # block → format → nats per token

WIDTH, LEFT, RIGHT = 1080, 132, 8
ROW, TOP, BOTTOM = 22, 74, 8
SMALL_ROW, GUTTER = 15, 30
MOST_ROWS = 40  # blocks with a row each; more are drawn layer by layer
BELOW, ABOVE = -4, 2  # decades around the budget that the colors show
_INSIDE, _LOW, _HIGH = (0x00, 0x72, 0xB2), (0xE6, 0x9F, 0x00), (0xC4, 0x4A, 0x00)
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
DEPTH_HEIGHT = 300


def ordered(heat: Heat) -> list[str]:
    """The blocks in the order of the forward pass."""
    return sorted(heat, key=block_order)


def heat_figure(heat: Heat, budget: float, name: str = "heat") -> Markup | None:
    """Costs as a table of colors: blue inside the budget, orange above; None = no block.

    A deep model has one panel per format, its layers side by side.
    """
    blocks = ordered(heat)
    formats = list(dict.fromkeys(word for cells in heat.values() for word in cells))
    if not blocks or not formats:
        return None
    if len(blocks) <= MOST_ROWS:
        return _flat(heat, blocks, formats, budget, name)
    return _deep(heat, blocks, formats, budget, name)


def colors(values: np.ndarray, budget: float) -> np.ndarray:
    """RGBA of costs: blue up to the budget, orange to vermillion above, no color for unknown."""
    with np.errstate(divide="ignore", invalid="ignore"):
        decades = np.log10(np.maximum(values, 0) / budget)
    decades = np.clip(np.nan_to_num(decades, nan=BELOW, posinf=ABOVE, neginf=BELOW), BELOW, ABOVE)
    over = values > budget
    part = np.where(over, decades / ABOVE, 1 - decades / BELOW)[..., None]
    warm = np.array(_LOW) * (1 - part) + np.array(_HIGH) * part
    rgb = np.where(over[..., None], warm, np.array(_INSIDE))
    alpha = np.where(over, 0.55 + 0.22 * part[..., 0], 0.02 + 0.34 * part[..., 0] ** 1.5)
    alpha = np.where(np.isnan(values), 0.0, alpha)
    return np.concatenate([rgb, 255 * alpha[..., None]], axis=-1).round().astype(np.uint8)


def _flat(
    heat: Heat, blocks: Sequence[str], formats: Sequence[str], budget: float, name: str
) -> Markup:
    """One row per block, with its numbers."""
    table = np.array([[heat[b].get(w, math.nan) for w in formats] for b in blocks])
    height = TOP + len(blocks) * ROW + BOTTOM
    with figure(WIDTH, height) as drawing:
        size = WIDTH - LEFT - RIGHT
        axes = _panel(drawing, height, (LEFT, TOP, size, len(blocks) * ROW), table, budget)
        axes.set_yticks(range(len(blocks)), [short(b, most=18) for b in blocks], fontsize=11.5)
        axes.set_xticks(range(len(formats)), [short(w, most=14) for w in formats], fontsize=12)
        axes.xaxis.tick_top()
        axes.tick_params(axis="both", length=0, pad=5, labelcolor=INK)
        _lines_between_layers(axes, blocks)
        for i, j in np.ndindex(table.shape):
            bold = "bold" if table[i, j] > budget else "normal"
            axes.text(
                j, i, say.kl(float(table[i, j])), ha="center", va="center_baseline",
                fontsize=11, fontweight=bold,
            )  # fmt: skip
        _color_bar(drawing, height, budget)
        return render(drawing, name, _describe(heat, blocks, formats, budget))


def _deep(
    heat: Heat, blocks: Sequence[str], formats: Sequence[str], budget: float, name: str
) -> Markup:
    """One panel per format, two side by side: block types as rows, layers as columns."""
    places = {b: (int(m[1]), m[2]) for b in blocks if (m := _LAYER.fullmatch(b))}
    outer = [b for b in blocks if b not in places][:8]
    rows = list(dict.fromkeys(kind for _, kind in places.values()))[:12]
    layers = max((n for n, _ in places.values()), default=-1) + 1
    lines = [*rows, *outer]
    panel = 34 + len(lines) * SMALL_ROW + 34
    columns = 2 if len(formats) > 1 else 1
    height = 56 + math.ceil(len(formats) / columns) * panel
    size = (WIDTH - LEFT - RIGHT - (columns - 1) * GUTTER) / columns
    with figure(WIDTH, height) as drawing:
        for k, word in enumerate(formats):
            table = np.full((len(lines), max(layers, 1)), np.nan)
            for block, (layer, kind) in places.items():
                if kind in rows:
                    table[rows.index(kind), layer] = heat[block].get(word, math.nan)
            for i, block in enumerate(outer):
                table[len(rows) + i, :] = heat[block].get(word, math.nan)
            row, column = divmod(k, columns)
            area = (
                LEFT + column * (size + GUTTER), 56 + row * panel + 34, size,
                len(lines) * SMALL_ROW,
            )  # fmt: skip
            axes = _panel(drawing, height, area, table, budget)
            names = [short(line, most=18) for line in (*rows, *map(_outer_name, outer))]
            names = names if column == 0 else []
            axes.set_yticks(range(len(lines)), names or [""] * len(lines), fontsize=10.5)
            axes.tick_params(axis="both", length=0, pad=4)
            _layer_ticks(axes, layers, last=k >= len(formats) - columns)
            title = f"{short(word, most=30)}: {_over(table[: len(rows)], budget)}"
            axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=6)
            axes.axhline(len(rows) - 0.5, color=INK, lw=1.0)
        _color_bar(drawing, height, budget)
        return render(drawing, name, _describe(heat, blocks, formats, budget))


def _outer_name(block: str) -> str:
    return "final norm" if block == "norm" else block


def _over(table: np.ndarray, budget: float) -> str:
    over = int((table > budget).sum())
    return f"{over} of {int((~np.isnan(table)).sum())} above the budget" if over else "none above"


def _panel(
    drawing: "Figure",
    height: int,
    area: tuple[float, float, float, float],
    table: np.ndarray,
    budget: float,
) -> "Axes":
    """Axes with the colors of `table`; `area` = left, top, width and height in pixels."""
    left, top, wide, high = area
    axes = drawing.add_axes((left / WIDTH, 1 - (top + high) / height, wide / WIDTH, high / height))
    axes.imshow(colors(table, budget), aspect="auto", interpolation="none")
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    return axes


def _layer_ticks(axes: Any, layers: int, *, last: bool) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 4, 5, 10]))
    if last:
        axes.set_xlabel("layer", labelpad=1, fontsize=11)


def _lines_between_layers(axes: Any, blocks: Sequence[str]) -> None:
    for k in range(1, len(blocks)):
        if blocks[k].split(".")[:2] != blocks[k - 1].split(".")[:2]:
            axes.axhline(k - 0.5, color=LINE, lw=1.0)


def _color_bar(drawing: "Figure", height: int, budget: float) -> None:
    size, top = 380, 12
    area = ((WIDTH - size - 40) / WIDTH, 1 - top / height, size / WIDTH, 9 / height)
    axes = drawing.add_axes(area)
    scale = budget * np.logspace(BELOW, ABOVE, 181)[None, :]
    cells = colors(scale, budget)
    axes.imshow(cells, aspect="auto", interpolation="none", extent=(BELOW, ABOVE, 0, 1))
    axes.grid(visible=False)
    axes.set_yticks([])
    labels = {d: say.kl(budget * 10.0**d) for d in (BELOW, -2, ABOVE)}
    labels[0] = f"budget {say.kl(budget)}"
    axes.set_xticks(sorted(labels), [labels[d] for d in sorted(labels)], fontsize=10.5)
    axes.tick_params(axis="x", length=3, pad=2)
    axes.spines["bottom"].set_visible(False)
    axes.axvline(0, color=INK, lw=1.5)


def _describe(heat: Heat, blocks: Sequence[str], formats: Sequence[str], budget: float) -> str:
    parts = []
    for word in formats:
        block, share = say.costliest({b: heat[b].get(word, math.nan) for b in blocks})
        over = sum(heat[b].get(word, math.nan) > budget for b in blocks)
        parts.append(f"{word}: {over} blocks above the budget, costliest {block or 'none'}")
        parts[-1] += f" ({100 * share:.0f} %)" if share == share else ""
    return f"Predicted KL per block and format. {'; '.join(parts)}."


def depth_figure(profile: DepthProfile, name: str = "depth") -> Markup | None:
    """Relative errors of the stream from block to block: median and quantiles over tokens.

    None when fewer than two points have a positive, finite median.
    """
    points = [p for p in profile.points if all(x > 0 and math.isfinite(x) for x in p.linf)]
    if len(points) < 2:
        return None
    x = np.array([_depth(p, k) for k, p in enumerate(points)])
    quantiles = np.array([p.linf for p in points]).T
    height = 40 + DEPTH_HEIGHT + 46
    with figure(WIDTH, height) as drawing:
        area = (74 / WIDTH, 46 / height, 1 - (74 + 150) / WIDTH, DEPTH_HEIGHT / height)
        axes = drawing.add_axes(area)
        color = SERIES[1]
        axes.fill_between(x, quantiles[0], quantiles[4], color=color, alpha=0.13, lw=0)
        axes.fill_between(x, quantiles[1], quantiles[3], color=color, alpha=0.25, lw=0)
        axes.plot(x, quantiles[2], color=color, lw=2.0)
        small = 5.0 if len(points) <= 30 else 3.0
        for suffix, marker in ((".attn", "o"), (".ffn", "s")):
            chosen = [k for k, p in enumerate(points) if p.name.endswith(suffix)]
            axes.plot(x[chosen], quantiles[2][chosen], marker, color=color, ms=small)
        _depth_axes(axes, x, quantiles, profile.dtype)
        return render(drawing, name, _describe_depth(points, profile.dtype))


def _depth(point: StreamPoint, index: int) -> float:
    """Where a point lies on the axis of layers: after attention n, after the MLP n + ½."""
    match = re.fullmatch(r"layers\.(\d+)\.(attn|ffn)", point.name)
    return int(match[1]) + (0.5 if match[2] == "ffn" else 0.0) if match else index / 2


def _depth_axes(axes: Any, x: np.ndarray, quantiles: np.ndarray, dtype: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    low, high = quantiles.min() / 1.15, quantiles.max() * 1.15
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    axes.set_xlim(x.min() - 0.08, x.max() + 0.08)
    marks = (1, 2, 5) if high / low < 200 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:.0e}".replace("e-0", "e-")))
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True, steps=[1, 2, 4, 5, 10]))
    axes.set_xlabel("layer (circle: after attention, square: after the MLP)", labelpad=4)
    title = f"Error of the residual stream in {dtype}, largest entry over largest entry, per token"
    axes.annotate(
        title, xy=(0, 1), xytext=(-74, 14), xycoords="axes fraction",
        textcoords="offset points", fontsize=13, fontweight="bold", annotation_clip=False,
    )  # fmt: skip
    _quantile_labels(axes, quantiles[:, -1], low, high)


def _quantile_labels(axes: Any, ends: np.ndarray, low: float, high: float) -> None:
    from halfulp.report.curves import spread

    height = DEPTH_HEIGHT
    wanted = [height * math.log(y / low) / math.log(high / low) for y in ends]
    labels = ("1 % of tokens below", "25 %", "median", "75 %", "99 %")
    for y, label in zip(spread(wanted, 16, height), labels, strict=True):
        axes.annotate(
            label, xy=(1, y / height), xytext=(6, 0), xycoords="axes fraction",
            textcoords="offset points", va="center", fontsize=11, annotation_clip=False,
            color=INK if label == "median" else MUTED,
        )  # fmt: skip


def _describe_depth(points: Sequence[StreamPoint], dtype: str) -> str:
    first, last = points[0], points[-1]
    return (
        f"Relative error of the residual stream in {dtype} along the depth: median "
        f"{first.linf[2]:.2g} at {first.name}, {last.linf[2]:.2g} at {last.name}."
    )
