"""Heat strips: one counter, one panel per run, block by block over the steps."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.report import words
from halfulp.report.counters import Counter, Strip, block_order
from halfulp.report.curves import short
from halfulp.report.html import Markup
from halfulp.report.price import PASS
from halfulp.report.svg import INK, LINE, MUTED, figure, render

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, LEFT, VALUE, GUTTER = 1080, 104, 60, 22
ROW, TOP, BOTTOM = 15, 66, 42
MOST_ROWS = 40
_LOW, _HIGH = (0xE6, 0x9F, 0x00), (0xC4, 0x4A, 0x00)  # orange to vermillion


def strip_figure(counter: Counter, strips: Sequence[Strip], name: str) -> Markup:
    """All panels of one counter with a shared color bar; each row ends with its share in words."""
    blocks = _rows(strips)
    columns = {1: 1, 2: 2, 4: 2}.get(len(strips), 3)
    lines = math.ceil(len(strips) / columns)
    panel = TOP + len(blocks) * ROW + BOTTOM
    with figure(WIDTH, lines * panel) as drawing:
        for i, strip in enumerate(strips):
            _panel(drawing, counter, strip, blocks, divmod(i, columns), (columns, lines * panel))
        _color_bar(drawing, counter, lines * panel)
        return render(drawing, name, _describe(counter, strips))


def hidden_blocks(strips: Sequence[Strip]) -> int:
    """How many blocks the figure leaves out because there are too many rows."""
    return max(0, len({block for strip in strips for block in strip.blocks}) - MOST_ROWS)


def _rows(strips: Sequence[Strip]) -> list[str]:
    worst: dict[str, float] = {}
    for strip in strips:
        for block, share in zip(strip.blocks, strip.pooled, strict=True):
            worst[block] = max(worst.get(block, 0.0), float(share))
    kept = sorted(worst, key=lambda b: (-worst[b], block_order(b)))[:MOST_ROWS]
    return sorted(kept, key=block_order)


def _describe(counter: Counter, strips: Sequence[Strip]) -> str:
    parts = []
    for strip in strips:
        top = int(np.argmax(strip.pooled))
        share = words.share(float(strip.pooled[top]))
        parts.append(f"{strip.run.label}: worst block {strip.blocks[top]}, {share}")
    return f"{counter.title} per block over steps. {'; '.join(parts)}."


def _panel(
    drawing: "Figure",
    counter: Counter,
    strip: Strip,
    blocks: list[str],
    place: tuple[int, int],
    frame: tuple[int, int],
) -> None:
    """The panel in row and column `place`; `frame` = columns of panels and height of the figure."""
    (row, column), (columns, height) = place, frame
    inner = (WIDTH - LEFT - columns * VALUE - (columns - 1) * GUTTER) / columns
    left = LEFT + column * (inner + VALUE + GUTTER)
    size = len(blocks) * ROW
    top = row * (TOP + size + BOTTOM) + TOP
    area = (left / WIDTH, 1 - (top + size) / height, inner / WIDTH, size / height)
    axes = drawing.add_axes(area)
    table = np.full((len(blocks), len(strip.steps)), np.nan)
    for block, shares in zip(strip.blocks, strip.shares, strict=True):
        if block in blocks:
            table[blocks.index(block)] = shares
    cells = colors(table, counter.faint)
    axes.imshow(cells, aspect="auto", interpolation="none", extent=_extent(strip, blocks))
    _ticks(axes, strip, blocks, labels=column == 0)
    for k, block in enumerate(blocks):
        _value(axes, strip, k, block)
    axes.set_title(short(strip.run.label), loc="left", fontsize=12, fontweight="bold", pad=8)
    axes.annotate(
        "whole run",
        xy=(1, 1),
        xytext=(VALUE, 9),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="right",
        color=MUTED,
        fontsize=11,
        annotation_clip=False,
    )


def _extent(strip: Strip, blocks: list[str]) -> tuple[float, float, float, float]:
    steps = strip.steps
    every = float(np.median(np.diff(steps))) if len(steps) > 1 else 1.0
    return float(steps[0] - every), float(steps[-1]), len(blocks) - 0.5, -0.5


def _ticks(axes: Any, strip: Strip, blocks: list[str], *, labels: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks(range(len(blocks)))
    names = [short(block, most=16) for block in blocks]
    axes.set_yticklabels(names if labels else [], fontsize=10.5)
    axes.tick_params(axis="y", pad=5)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("step", labelpad=2, fontsize=11)
    for k in range(len(blocks) + 1):
        layer_starts = 0 < k < len(blocks) and _layer(blocks[k]) != _layer(blocks[k - 1])
        if layer_starts or k in (0, len(blocks)):
            axes.axhline(k - 0.5, color=LINE, lw=1.0, clip_on=False)


def _layer(block: str) -> str:
    return ".".join(block.split(".")[:2])


def _value(axes: Any, strip: Strip, row: int, block: str) -> None:
    text, bad = "–", False
    if block in strip.blocks:
        i = strip.blocks.index(block)
        text, bad = words.share(float(strip.pooled[i])), strip.levels[i] != PASS
    axes.annotate(
        text,
        xy=(1, row),
        xytext=(VALUE, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="center_baseline",
        fontsize=10.5,
        color=INK if bad else MUTED,
        fontweight="bold" if bad else "normal",
        annotation_clip=False,
    )


def colors(shares: np.ndarray, faint: float) -> np.ndarray:
    """RGBA per cell: log scale from `faint` to 1; zero and "not counted" are transparent."""
    part = np.log10(np.clip(np.nan_to_num(shares), faint, 1.0) / faint) / -math.log10(faint)
    mix = part[..., None]
    rgb = np.array(_LOW) * (1 - mix) + np.array(_HIGH) * mix
    alpha = np.where(np.nan_to_num(shares) > 0, 0.08 + 0.92 * part**1.6, 0.0)
    return np.concatenate([rgb, 255 * alpha[..., None]], axis=-1).round().astype(np.uint8)


def _color_bar(drawing: "Figure", counter: Counter, height: int) -> None:
    size, right, top = 260, 34, 12
    area = ((WIDTH - size - right) / WIDTH, 1 - top / height, size / WIDTH, 9 / height)
    axes = drawing.add_axes(area)
    least = round(math.log10(counter.faint))
    scale = np.logspace(least, 0, 121)[None, :]
    cells = colors(scale, counter.faint)
    axes.imshow(cells, aspect="auto", interpolation="none", extent=(least, 0, 0, 1))
    axes.grid(visible=False)
    axes.set_yticks([])
    decades = range(least, 1) if least > -5 else range(least, 1, 2)
    labels = [f"{100 * 10.0**d:g} %" for d in decades]
    axes.set_xticks(list(decades), [f"≤ {labels[0]}", *labels[1:]], fontsize=10)
    axes.tick_params(axis="x", length=3, pad=2)
    axes.spines["bottom"].set_visible(False)
    for share in (counter.warn, counter.act):
        if share >= counter.faint:
            axes.axvline(math.log10(share), color=INK, lw=1.5)
