"""The figure of a sweep: loss over the learning rate, every seed a point, the window shaded."""

import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.report.curves import short
from halfulp.report.html import Markup
from halfulp.report.svg import CARD, INK, MUTED, figure, render, series_style
from halfulp.sweep.divergence import FAR, NONFINITE, STOPPED, UNIGRAM, UNRECOVERED
from halfulp.sweep.row import Row
from halfulp.sweep.window import SHARE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, LEFT, RIGHT, GUTTER = 1080, 58, 10, 24
PANEL, STRIP, TOP, BOTTOM = 210, 20, 34, 34
COLUMNS = 3
MARKERS = {NONFINITE: "x", UNRECOVERED: "^", FAR: "D", UNIGRAM: "s", STOPPED: "P"}
SIGNS = {NONFINITE: "×", UNRECOVERED: "▲", FAR: "◆", UNIGRAM: "■", STOPPED: "✚"}
FAILED, LOST, NOT_RUN = "failed", "lost", "not run"


def colors(recipes: Sequence[str], reference: str) -> dict[str, str]:
    """Recipe → color: the reference in ink, the others in the palette's order."""
    others = [recipe for recipe in recipes if recipe != reference]
    return {reference: INK} | {name: series_style(i)[0] for i, name in enumerate(others)}


def rate_figure(rows: Sequence[Row], seeds: Sequence[int], name: str = "rates") -> Markup | None:
    """Loss over learning rate, one panel per recipe of one data set; None without a known run.

    Points are seeds, the line their mean, the shade the window. Runs without a usable loss stand
    above the panel, one mark each.
    """
    shown = [row for row in rows if not row.refused]
    limits = _limits(shown)
    if limits is None:
        return None
    reference = next((row for row in shown if row.is_reference), None)
    strips = [s for s in (FAILED, LOST, NOT_RUN) if any(_marks(r, s, seeds) for r in shown)]
    head = TOP + STRIP * len(strips)
    columns = min(COLUMNS, len(shown))
    height = math.ceil(len(shown) / columns) * (head + PANEL + BOTTOM) + 14
    size = (WIDTH - LEFT - RIGHT - (columns - 1) * GUTTER) / columns
    color = colors([row.recipe for row in rows], reference.recipe if reference else "")
    with figure(WIDTH, height) as drawing:
        for k, row in enumerate(shown):
            line, column = divmod(k, columns)
            top = line * (head + PANEL + BOTTOM) + head
            area = (LEFT + column * (size + GUTTER), top, size, PANEL)
            axes = drawing.add_axes(_area(area, height))
            _panel(axes, row, reference, seeds, strips, color[row.recipe], limits)
            _rate_axis(axes, [p.lr for p in row.points], size)
            if column:
                axes.set_yticklabels([])
            elif strips:
                _strip_names(axes, strips)
            if line == (len(shown) - 1) // columns:
                axes.set_xlabel("learning rate", labelpad=2, fontsize=11)
        return render(drawing, name, _describe_rates(shown))


def _limits(rows: Sequence[Row]) -> tuple[float, float] | None:
    losses = [o.score_nats for row in rows for p in row.points for o in p.outcomes if not o.failure]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if not losses:
        return None
    means = [p.mean_nats for row in rows for p in row.points if math.isfinite(p.mean_nats)]
    # Where most runs failed, the curves lie above the few that did not.
    losses += [mean for mean in means if mean <= min(means) * (1 + SHARE)]
    span = max(losses) - min(losses) or 0.1
    return min(losses) - 0.08 * span, max(losses) + 0.06 * span


def _panel(
    axes: "Axes",
    row: Row,
    reference: Row | None,
    seeds: Sequence[int],
    strips: Sequence[str],
    color: str,
    limits: tuple[float, float],
) -> None:
    lrs = [math.log2(p.lr) for p in row.points]
    step = min(b - a for a, b in itertools.pairwise(lrs))
    axes.set_xlim(lrs[0] - 0.45 * step, lrs[-1] + 0.45 * step)
    axes.set_ylim(*limits)
    _shade(axes, row, color)
    if reference is not None and reference is not row:
        axes.plot(lrs, [p.mean_nats for p in reference.points], color=MUTED, lw=1.2, ls=(0, (4, 2)))
    axes.plot(lrs, [p.mean_nats for p in row.points], color=color)
    place = dict(zip(seeds, np.linspace(-0.5, 0.5, len(seeds)), strict=True))
    for x, point in zip(lrs, row.points, strict=True):
        for outcome in point.outcomes:
            if not outcome.failure and math.isfinite(outcome.score_nats):
                beside = x + 0.2 * step * place[outcome.result.seed]
                axes.plot(beside, outcome.score_nats, "o", ms=4.5, mfc=CARD, mec=color, mew=1.3)
    for k, strip in enumerate(strips):
        y = 1 + (STRIP * (k + 0.5)) / PANEL
        for i, seed, marker in _marks(row, strip, seeds):
            _mark(axes, lrs[i] + 0.5 * step * place[seed], y, marker, color)
    _title(axes, row, strips)


def _shade(axes: "Axes", row: Row, color: str) -> None:
    window = row.window
    if window is None or not window.octaves > 0:
        return
    low, high = axes.get_xlim()
    start = low if window.open_low else math.log2(window.lr_low)
    stop = high if window.open_high else math.log2(window.lr_high)
    axes.axvspan(start, stop, color=color, alpha=0.11, lw=0)
    for edge, is_open in ((start, window.open_low), (stop, window.open_high)):
        if not is_open:
            axes.axvline(edge, color=color, lw=1.0, alpha=0.6)


def _marks(row: Row, strip: str, seeds: Sequence[int]) -> list[tuple[int, int, str]]:
    """(index of the rate, seed, marker) of every run that belongs on `strip`."""
    found = []
    for i, point in enumerate(row.points):
        done = {outcome.result.seed: outcome for outcome in point.outcomes}
        for seed in seeds:
            outcome = done.get(seed)
            kind, marker = NOT_RUN, "_"
            if outcome is not None:
                kind = LOST if outcome.result.lost else FAILED
                marker = "?" if kind == LOST else MARKERS.get(outcome.failure, "")
            if kind == strip and marker:
                found.append((i, seed, marker))
    return found


def _mark(axes: "Axes", x: float, y: float, marker: str, color: str) -> None:
    place = axes.get_xaxis_transform()
    if marker == "?":
        axes.text(x, y, "?", transform=place, color=color, fontsize=12, fontweight="bold",
                  ha="center", va="center_baseline")  # fmt: skip
        return
    line = marker in "x_"
    axes.plot(
        x, y, marker=marker, ms=5.5, mfc=color, mec=color, mew=1.6 if line else 0.6,
        transform=place, clip_on=False, ls="",
    )  # fmt: skip


def _title(axes: "Axes", row: Row, strips: Sequence[str]) -> None:
    place: dict[str, Any] = {
        "xytext": (0, STRIP * len(strips) + 10), "xycoords": "axes fraction",
        "textcoords": "offset points", "annotation_clip": False,
    }  # fmt: skip
    name = short(row.recipe, most=26)
    axes.annotate(name, xy=(0, 1), fontsize=13, fontweight="bold", **place)
    axes.annotate(_octaves(row), xy=(1, 1), fontsize=11, color=MUTED, ha="right", **place)


def _octaves(row: Row) -> str:
    if row.window is None:
        return ""
    if not row.window.octaves and not row.window.open_ended:
        return "no window"
    return f"{'≥ ' if row.window.open_ended else ''}{row.window.octaves:.1f} octaves"


def _strip_names(axes: "Axes", strips: Sequence[str]) -> None:
    for k, strip in enumerate(strips):
        axes.annotate(
            strip, xy=(0, 1), xytext=(-6, STRIP * (k + 0.5)), xycoords="axes fraction",
            textcoords="offset points", fontsize=10.5, color=MUTED, ha="right", va="center",
            annotation_clip=False,
        )  # fmt: skip


def _rate_axis(axes: "Axes", lrs: Sequence[float], size: float) -> None:
    from matplotlib.ticker import MaxNLocator

    every = max(1, math.ceil(46 * len(lrs) / size))
    shown = list(lrs)[::every]
    axes.set_xticks([math.log2(lr) for lr in shown], [rate(lr) for lr in shown], fontsize=10.5)
    axes.yaxis.set_major_locator(MaxNLocator(5))


def rate(lr: float) -> str:
    """A learning rate in two digits: 3.2e-3, 1e-2."""
    digits, exponent = f"{lr:.1e}".split("e")
    return f"{digits.removesuffix('.0')}e{int(exponent)}".replace("-", "−")


def _area(box: tuple[float, float, float, float], height: int) -> tuple[float, float, float, float]:
    left, top, wide, high = box
    return left / WIDTH, 1 - (top + high) / height, wide / WIDTH, high / height


def _describe_rates(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        failed = row.failures_grid
        best = "no known run" if row.best_lr is None else f"best at {rate(row.best_lr)}"
        parts.append(f"{row.recipe}: {best}, {failed.failed} of {failed.runs} runs failed")
    return f"Loss over learning rate. {'; '.join(parts)}."
