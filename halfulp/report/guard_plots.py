"""The time line of a guarded run: incidents over the loss, and which blocks stood higher when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.guard.incident import BACK, LOWER, RAISE, RETRY, SKIP, STOP
from halfulp.report import guard_words as say
from halfulp.report.counters import block_order
from halfulp.report.curves import short
from halfulp.report.html import Markup
from halfulp.report.incidents import Story
from halfulp.report.read import Curve, Record
from halfulp.report.stats import smooth
from halfulp.report.svg import CARD, INK, LINE, MUTED, SERIES, figure, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, LEFT, RIGHT = 1080, 104, 150
TOP, LANE, LOSS, GAP, ROW, BOTTOM = 34, 44, 210, 64, 16, 44
MOST_ROWS, MOST_POINTS, NEAR = 40, 600, 36  # NEAR: pixels within which numbers share a label
SIGNS = {RAISE: "^", RETRY: "o", SKIP: "x", BACK: "<", LOWER: "v", STOP: "s"}
LEGEND = "▲ raised, ● repeated, ✕ skipped, ◀ rolled back, ▼ looked lower, ■ stopped"


@dataclass(frozen=True)
class Span:
    """`block` has stood on `recipe`, which is not its own, in the steps after `first` to `last`."""

    block: str
    recipe: str
    first: int
    last: int


def spans(stories: Sequence[Story], last_step: int) -> list[Span]:
    """When which block stood above the run's own policy, in the course that the run has taken."""
    marks: list[tuple[int, Mapping[str, str]]] = [(0, {})]
    for story in stories:
        to = int(story.incident["to"])
        marks = [mark for mark in marks if mark[0] < to or mark[0] == 0]
        marks.append((to, say.above(story.incident)))
    ends = [*(start for start, _ in marks[1:]), max(last_step, marks[-1][0])]
    found: list[Span] = []
    for (start, recipes), end in zip(marks, ends, strict=True):
        for block, recipe in recipes.items():
            found.append(Span(block, recipe, start, end))
    return _joined(span for span in found if span.last > span.first)


def _joined(found: Any) -> list[Span]:
    joined: dict[str, list[Span]] = {}
    for span in found:
        mine = joined.setdefault(span.block, [])
        if mine and mine[-1].recipe == span.recipe and mine[-1].last == span.first:
            mine[-1] = Span(span.block, span.recipe, mine[-1].first, span.last)
        else:
            mine.append(span)
    return [span for mine in joined.values() for span in mine]


def timeline(record: Record, name: str) -> Markup | None:
    """The figure of one run; None where it has no two losses to draw."""
    loss = record.loss.finite()
    if len(loss.steps) < 2:
        return None
    end = _end(record)
    found = spans(record.stories, record.last_step)
    blocks = rows_of(record.stories, found)
    height = TOP + LANE + LOSS + BOTTOM + (GAP + ROW * len(blocks) if blocks else 0)
    with figure(WIDTH, height) as drawing:
        lane = _axes(drawing, height, TOP, LANE, end)
        _lane(lane, record.stories)
        curve = _axes(drawing, height, TOP + LANE, LOSS, end)
        _losses(curve, record, loss)
        if blocks:
            below = _axes(drawing, height, TOP + LANE + LOSS + GAP, ROW * len(blocks), end)
            _map(below, found, blocks, record.stories)
            curve.tick_params(labelbottom=False)
        (below if blocks else curve).set_xlabel("step", labelpad=3)
        return render(drawing, name, _describe(record, found))


def rows_of(stories: Sequence[Story], found: Sequence[Span]) -> list[str]:
    """The blocks of the precision map; those that were raised where all are too many."""
    if not found:
        return []
    every = list(dict.fromkeys(block for s in stories for block in s.incident.get("map") or ()))
    raised = {span.block for span in found}
    blocks = every if len(every) <= MOST_ROWS else [b for b in every if b in raised][:MOST_ROWS]
    return sorted(blocks, key=block_order)


def _end(record: Record) -> int:
    steps = [record.last_step, *(story.step for story in record.stories)]
    return max([*steps, *(int(c.steps[-1]) for c in record.withdrawn if len(c.steps))])


def _axes(drawing: "Figure", height: int, top: int, size: int, end: int) -> "Axes":
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    area = (LEFT / WIDTH, 1 - (top + size) / height, 1 - (LEFT + RIGHT) / WIDTH, size / height)
    axes = drawing.add_axes(area)
    axes.set_xlim(0, end)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    return axes


def _title(axes: "Axes", text: str, above: int) -> None:
    axes.annotate(
        text, xy=(0, 1), xytext=(-LEFT, above), xycoords="axes fraction",
        textcoords="offset points", fontsize=13, fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _lane(axes: "Axes", stories: Sequence[Story]) -> None:
    """A row of signs with their numbers; from a rollback a line to where it led."""
    axes.set_axis_off()
    axes.set_ylim(0, 1)
    _title(axes, "Incidents and training loss, nats per token", 12)
    for story in stories:
        action, step, y = story.incident["action"], story.step, 0.22
        if action == BACK:
            axes.plot([int(story.incident["to"]), step], [y, y], color=MUTED, lw=2.2, alpha=0.5)
        sign = "^" if action == RETRY and story.incident.get("raised") else SIGNS[action]
        axes.plot(
            step, y, sign, color=INK, ms=7.5, mew=2 if sign == "x" else 0, clip_on=False, zorder=3
        )
    for x, text in labels([story.step for story in stories], axes.get_xlim()[1]):
        axes.text(x, 0.62, text, ha="center", fontsize=11.5, fontweight="bold")


def labels(steps: Sequence[int], end: float) -> list[tuple[float, str]]:
    """Where to write the numbers of incidents: those too near to one another share "3-7"."""
    scale = (WIDTH - LEFT - RIGHT) / max(end, 1)
    groups: list[list[int]] = []
    for i in sorted(range(len(steps)), key=lambda i: steps[i]):
        if groups and (steps[i] - steps[groups[-1][0]]) * scale < NEAR:
            groups[-1].append(i)
        else:
            groups.append([i])
    return [(float(np.mean([steps[i] for i in g])), _numbers(g)) for g in groups]


def _numbers(group: Sequence[int]) -> str:
    low, high = min(group) + 1, max(group) + 1
    if low == high:
        return str(low)
    if high - low + 1 == len(group) > 2:
        return f"{low}–{high}"
    return ",".join(str(i + 1) for i in sorted(group)[:3])


def _losses(axes: "Axes", record: Record, loss: Curve) -> None:
    window = max(1, int(loss.steps[-1]) // 25) | 1
    raw = _thin(loss)
    axes.plot(raw.steps, raw.values, color=SERIES[1], lw=0.8, alpha=0.35)
    line = _thin(Curve(loss.steps, smooth(loss.values, window)))
    axes.plot(line.steps, line.values, color=SERIES[1])
    low, high = _limits(line, raw, record.withdrawn)
    for curve in record.withdrawn:
        gone = _thin(curve.finite())
        axes.plot(gone.steps, gone.values, color=MUTED, lw=1.2, alpha=0.75)
    axes.set_ylim(low, high)
    for story in record.stories:
        axes.axvline(story.step, color=INK, lw=0.8, alpha=0.35, ls=(0, (2, 2)))
        _withheld(axes, story, high)


def _limits(line: Curve, raw: Curve, withdrawn: Sequence[Curve]) -> tuple[float, float]:
    """The first steps fall from ln(vocab): they would flatten everything that matters."""
    settled = line.values[line.steps >= 0.06 * line.steps[-1]]
    low, high = float(raw.values.min()), float((settled if len(settled) else line.values).max())
    span = max(high - low, 1e-3)
    tops = [float(c.finite().values.max()) for c in withdrawn if len(c.finite().values)]
    reach = [min(top, high + 1.5 * span) for top in tops]
    return low - 0.08 * span, max([high, *reach]) + 0.12 * span


def _withheld(axes: "Axes", story: Story, top: float) -> None:
    """The loss of the step that was held, at the edge where it is off the scale."""
    found = (story.incident.get("evidence") or {}).get("same arithmetic") or {}
    loss = found.get("loss")
    if loss is None or not story.incident.get("cost", {}).get("withheld"):
        return
    shown = min(float(loss), top) if np.isfinite(loss) else top
    axes.plot(story.step, shown, "o", ms=5, mfc=CARD, mec=INK, mew=1.4, clip_on=False, zorder=4)


def _thin(curve: Curve) -> Curve:
    every = max(1, -(-len(curve.steps) // MOST_POINTS))
    return Curve(curve.steps[::every], curve.values[::every])


def _map(
    axes: "Axes", found: Sequence[Span], blocks: Sequence[str], stories: Sequence[Story]
) -> None:
    """Bars of the recipes above the own one, block by block."""
    colors = recipe_colors(found)
    ends = say.raised_at_the_end(stories)
    axes.set_ylim(len(blocks) - 0.5, -0.5)
    axes.grid(visible=False)
    axes.set_yticks(range(len(blocks)), [short(block, most=16) for block in blocks], fontsize=10.5)
    for k in range(len(blocks) + 1):
        axes.axhline(k - 0.5, color=LINE, lw=0.6, clip_on=False)
    for span in found:
        if span.block in blocks:
            color, alpha = colors[span.recipe]
            row = blocks.index(span.block)
            axes.barh(row, span.last - span.first, 0.78, left=span.first, color=color, alpha=alpha)
    for k, block in enumerate(blocks):
        if block in ends:
            axes.annotate(
                short(say.recipe(ends[block])), xy=(1, k), xytext=(8, 0),
                xycoords=("axes fraction", "data"), textcoords="offset points",
                va="center_baseline", fontsize=10.5, annotation_clip=False,
            )  # fmt: skip
    for story in stories:
        axes.axvline(story.step, color=INK, lw=0.8, alpha=0.35, ls=(0, (2, 2)))
    _title(axes, "Precision map: blocks above the run's own policy", 30)
    _key(axes, colors)


def recipe_colors(found: Sequence[Span]) -> dict[str, tuple[str, float]]:
    """Recipe → color and opacity: one color per rung, pale while only its forward pass is there."""
    names = list(dict.fromkeys(span.recipe for span in found))
    rungs = {name: name.rpartition("_forward_")[2] for name in names}
    order = list(dict.fromkeys(rungs.values()))
    return {
        name: (SERIES[(order.index(rung) + 1) % len(SERIES)], 0.85 if name == rung else 0.4)
        for name, rung in rungs.items()
    }


def _key(axes: "Axes", colors: Mapping[str, tuple[str, float]]) -> None:
    x = 0.0
    for name, (color, alpha) in list(colors.items())[:6]:
        text = short(say.recipe(name), most=30)
        axes.annotate(
            "■", xy=(0, 1), xytext=(x, 11), xycoords="axes fraction", textcoords="offset points",
            color=color, alpha=alpha, fontsize=12, annotation_clip=False,
        )  # fmt: skip
        axes.annotate(
            text, xy=(0, 1), xytext=(x + 15, 11), xycoords="axes fraction",
            textcoords="offset points", color=MUTED, fontsize=11, annotation_clip=False,
        )  # fmt: skip
        x += 15 + 6.7 * len(text) + 18


def _describe(record: Record, found: Sequence[Span]) -> str:
    acts = "; ".join(
        f"{i} at step {s.step:,}: {say.judged(s.incident)}, {say.done(s.incident)}"
        for i, s in enumerate(record.stories[:12], 1)
    )
    more = f"; {len(record.stories) - 12} more" if len(record.stories) > 12 else ""
    raised = sorted({span.block for span in found}, key=block_order)
    above = f" Raised at some time: {', '.join(raised[:12])}." if raised else ""
    return f"Training loss of {record.label} with the incidents of its guard: {acts}{more}.{above}"
