"""Figures of sharpness: types over steps, blocks over steps, logits, and one measurement."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.block_names import block_type
from halfulp.report import sharpness as say
from halfulp.report.curves import short, spread
from halfulp.report.html import Markup
from halfulp.report.sharpness import ORDER, Estimate, Track
from halfulp.report.svg import INK, LINE, MUTED, SERIES, figure, render, series_style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, GUTTER = 1080, 26
LEFT, RIGHT, NAMES = 62, 70, 118  # of a panel of lines: its ticks, types or runs as labels
LINES_HEIGHT, TOP, BOTTOM = 250, 46, 44
HEAT_LEFT, VALUE, ROW, HEAT_TOP = 104, 54, 15, 66
MOST_ROWS = 44  # blocks with a row each; layers of deeper models share one
_LOW, _HIGH = (0xE6, 0x9F, 0x00), (0xC4, 0x4A, 0x00)  # orange to vermillion
_COLORS = {
    "emb": SERIES[1], "qk": SERIES[5], "ffn": SERIES[2], "vo": SERIES[4], "norm": SERIES[0],
    "head": SERIES[3], "pos": SERIES[3],
}  # fmt: skip
_DASHES: dict[str, Any] = {"head": (0, (5, 1.5)), "pos": (0, (1.5, 1.2))}


def type_figure(tracks: Sequence[Track], name: str = "sharpness-types") -> Markup:
    """Sharpness of each block type over steps, one panel per run, all on one logarithmic axis."""
    shown = [{k: v for k, v in t.by_type().items() if k in _COLORS} for t in tracks]
    columns = min(2, len(tracks))
    panel = TOP + LINES_HEIGHT + BOTTOM
    height = math.ceil(len(tracks) / columns) * panel
    values = np.concatenate([v for types in shown for v in types.values()])
    low, high = _range(values)
    with figure(WIDTH, height) as drawing:
        size = (WIDTH - columns * (LEFT + RIGHT)) / columns
        for i, (one, types) in enumerate(zip(tracks, shown, strict=True)):
            row, column = divmod(i, columns)
            left = LEFT + column * (LEFT + RIGHT + size)
            area = (left, row * panel + TOP, size, LINES_HEIGHT)
            axes = drawing.add_axes(_area(area, height))
            marker = "o" if len(one.steps) < 25 else None
            for kind, curve in types.items():
                style = _DASHES.get(kind, "-")
                axes.plot(one.steps, curve, marker=marker, color=_COLORS[kind], ls=style, ms=3.5)
            _log_axis(axes, low, high)
            _steps_axis(axes, one.steps)
            _title(axes, short(one.run.label, most=40))
            ends = {kind: float(curve[-1]) for kind, curve in types.items()}
            _end_labels(axes, ends, low, high, {k: _COLORS[k] for k in ends})
        return render(drawing, name, _describe_types(tracks))


def block_figure(tracks: Sequence[Track], name: str = "sharpness-blocks") -> Markup:
    """Sharpness of each block over steps as colors, types from flat to sharp, one panel per run."""
    tables = [_rows(track) for track in tracks]
    names = list(dict.fromkeys(row for table in tables for row in table))
    names.sort(key=lambda row: _place(row))
    columns = {1: 1, 2: 2, 4: 2}.get(len(tracks), 3)
    panel = HEAT_TOP + len(names) * ROW + BOTTOM
    height = math.ceil(len(tracks) / columns) * panel
    low, high = _range(np.concatenate([v for table in tables for v in table.values()]))
    with figure(WIDTH, height) as drawing:
        inner = (WIDTH - HEAT_LEFT - columns * VALUE - (columns - 1) * GUTTER) / columns
        for i, (one, table) in enumerate(zip(tracks, tables, strict=True)):
            row, column = divmod(i, columns)
            left = HEAT_LEFT + column * (inner + VALUE + GUTTER)
            area = (left, row * panel + HEAT_TOP, inner, len(names) * ROW)
            axes = drawing.add_axes(_area(area, height))
            _heat(axes, one, table, names, (low, high))
            axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            axes.tick_params(axis="y", pad=5, labelsize=10.5)
            _title(axes, short(one.run.label, most=30), left=0)
        _color_bar(drawing, height, low, high)
        return render(drawing, name, _describe_blocks(tracks))


def logits_figure(tracks: Sequence[Track], name: str = "sharpness-logits") -> Markup | None:
    """Logits sharpness (dashed: centered) and log Z over steps; None if none was recorded."""
    shown = [t for t in tracks if np.isfinite(t.logits["sharpness"]).any()]
    if not shown:
        return None
    height = TOP + 190 + BOTTOM
    size = WIDTH / 2 - LEFT - NAMES
    with figure(WIDTH, height) as drawing:
        for column, (title, keys) in enumerate(
            [
                ("Logits sharpness, % (dashed: centered)", ("sharpness", "sharpness_centered")),
                ("log Z of the logits", ("logz",)),
            ]
        ):
            area = (LEFT + column * WIDTH / 2, TOP, size, 190)
            axes = drawing.add_axes(_area(area, height))
            ends, colors = {}, {}
            for i, one in enumerate(shown):
                color = series_style(i)[0] if len(shown) > 1 else SERIES[1]
                for key, dash in zip(keys, ("-", (0, (4, 2))), strict=False):
                    axes.plot(one.steps, one.logits[key], color=color, ls=dash)
                label = short(one.run.label, most=15)
                ends[label], colors[label] = float(one.logits[keys[0]][-1]), color
            _steps_axis(axes, shown[0].steps)
            _title(axes, title)
            if len(shown) > 1:
                low, high = axes.get_ylim()
                _end_labels(axes, ends, low, high, colors, log=False)
        return render(drawing, name, _describe_logits(shown))


def dot_figure(found: Mapping[str, Estimate], name: str = "sharpness-dots") -> Markup | None:
    """One measurement: each type's sharpness on a logarithmic axis with its 95 % interval."""
    known = sorted((k for k in found if found[k].known), key=lambda k: found[k].sharpness)
    if not known:
        return None
    row = 30
    height = 40 + len(known) * row + 44
    with figure(WIDTH, height) as drawing:
        axes = drawing.add_axes(_area((92, 34, WIDTH - 92 - 150, len(known) * row), height))
        spans = []
        for i, kind in enumerate(known):
            one, color = found[kind], _COLORS.get(kind, MUTED)
            half = one.half if math.isfinite(one.half) else 0.0
            ends = [one.sharpness * math.exp(-half), one.sharpness * math.exp(half)]
            spans += ends
            axes.plot(ends, [i, i], color=color, lw=3, solid_capstyle="butt", alpha=0.55)
            axes.plot([one.sharpness], [i], "o", color=color, ms=8)
            text = say.number(one.sharpness)
            if half:
                text += f"  ± {100 * math.expm1(half):.0f} %"
            _aside(axes, i, text)
        low, high = _range(np.array(spans))
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.3)
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.invert_yaxis()
        axes.grid(visible=True, axis="x", color=LINE)
        axes.grid(visible=False, axis="y")
        axes.set_yticks(range(len(known)), known, fontsize=12)
        axes.tick_params(axis="y", labelcolor=INK)
        _log_ticks(axes.xaxis, low / 1.3, high * 1.3)
        axes.set_xlabel("sharpness: trace of the curvature over parameters", labelpad=4)
        words = "; ".join(f"{k} {say.number(found[k].sharpness)}" for k in known)
        return render(drawing, name, f"Sharpness of each block type, flattest first: {words}.")


def layer_figure(
    values: Mapping[str, Mapping[int, float]], name: str = "sharpness-layers"
) -> Markup | None:
    """One measurement: types as rows, layers as columns; None where no block is in a layer."""
    names = [kind for kind in ORDER if values.get(kind)]
    layers = max((max(values[k]) for k in names), default=-1) + 1
    if not layers:
        return None
    row, height = 26, HEAT_TOP + len(names) * 26 + BOTTOM
    table = np.full((len(names), layers), np.nan)
    for i, kind in enumerate(names):
        for layer, value in values[kind].items():
            table[i, layer] = value
    low, high = _range(table)
    with figure(WIDTH, height) as drawing:
        axes = drawing.add_axes(_area((92, HEAT_TOP, WIDTH - 100, len(names) * row), height))
        extent = (-0.5, layers - 0.5, len(names) - 0.5, -0.5)
        axes.imshow(colors(table, low, high), aspect="auto", interpolation="none", extent=extent)
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks(range(len(names)), names, fontsize=12)
        every = math.ceil(layers / 24)
        axes.set_xticks(range(0, layers, every))
        axes.tick_params(axis="both", length=0, pad=5, labelcolor=INK)
        axes.set_xlabel("layer", labelpad=3)
        if layers <= 16:
            for i, j in np.ndindex(table.shape):
                axes.text(
                    j, i, say.number(float(table[i, j])), ha="center", va="center_baseline",
                    fontsize=11,
                )  # fmt: skip
        _title(axes, "Sharpness of each block", left=92)
        _color_bar(drawing, height, low, high)
        return render(drawing, name, "Sharpness per layer and block type, as in the table.")


def colors(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """RGBA per cell on a log scale from `low` to `high`; nan and what is not positive is blank."""
    with np.errstate(divide="ignore", invalid="ignore"):
        part = np.log(values / low) / math.log(high / low)
    blank = ~(values > 0)
    part = np.clip(np.where(blank, 0, part), 0, 1)[..., None]
    rgb = np.array(_LOW) * (1 - part) + np.array(_HIGH) * part
    alpha = np.where(blank, 0.0, 0.06 + 0.94 * part[..., 0] ** 1.3)
    return np.concatenate([rgb, 255 * alpha[..., None]], axis=-1).round().astype(np.uint8)


def _area(box: tuple[float, float, float, float], height: float) -> Any:
    left, top, width, size = box
    return left / WIDTH, 1 - (top + size) / height, width / WIDTH, size / height


def _range(values: np.ndarray) -> tuple[float, float]:
    """The smallest and largest that a logarithmic axis shows; eight decades at most."""
    known = values[np.isfinite(values) & (values > 0)]
    if not len(known):
        return 0.1, 1.0
    high = float(known.max()) * 1.15
    low = max(float(known.min()) / 1.15, high * 1e-8)
    return low, high


def _log_axis(axes: "Axes", low: float, high: float) -> None:
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    _log_ticks(axes.yaxis, low, high)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    marks = (1,) if high / low > 300 else ((1, 3) if high / low > 20 else (1, 2, 5))
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**d for d in decades for m in marks if low <= m * 10.0**d <= high]
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e-0", "e−")
                                           .replace("e-", "e−").replace("e+0", "e")))  # fmt: skip


def _steps_axis(axes: "Axes", steps: np.ndarray) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.set_xlim(0, max(int(steps[-1]), 1))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("step", labelpad=2, fontsize=11)


def _title(axes: "Axes", text: str, *, left: float = LEFT) -> None:
    axes.annotate(
        text, xy=(0, 1), xytext=(-left, 12), xycoords="axes fraction",
        textcoords="offset points", fontsize=13, fontweight="bold", annotation_clip=False,
    )  # fmt: skip


def _end_labels(
    axes: "Axes", ends: Mapping[str, float], low: float, high: float,
    colors: Mapping[str, str], *, log: bool = True,
) -> None:  # fmt: skip
    """Names beside the ends of their lines, apart from one another."""
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    height = axes.get_position().height * drawing.get_size_inches()[1] * 72
    known = {k: v for k, v in ends.items() if math.isfinite(v) and (v > 0 or not log)}

    def share(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if log else (value - low) / (high - low)
        return min(max(part, 0.0), 1.0)

    placed = spread([share(v) * height for v in known.values()], 15, height)
    for (label, value), y in zip(known.items(), placed, strict=True):
        axes.annotate(
            label, xy=(1.004, share(value)), xytext=(1.04, y / height), xycoords="axes fraction",
            textcoords="axes fraction", va="center", ha="left", fontsize=11.5,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-", "color": colors[label], "lw": 1.3, "shrinkA": 0,
                "shrinkB": 0, "relpos": (-0.02, 0.5),
            },
        )  # fmt: skip


def _aside(axes: "Axes", row: float, text: str) -> None:
    axes.annotate(
        text, xy=(1, row), xytext=(12, 0), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="left", va="center", fontsize=11.5, annotation_clip=False,
    )  # fmt: skip


def _rows(track: Track) -> dict[str, np.ndarray]:
    """A row per block, or per type and run of layers where there are too many blocks."""
    if len(track.blocks) <= MOST_ROWS:
        return dict(zip(track.blocks, track.values, strict=True))
    layered = [(i, b.split(".")) for i, b in enumerate(track.blocks) if b.startswith("layers.")]
    types = len({parts[-1] for _, parts in layered}) or 1
    layers = max(int(parts[1]) for _, parts in layered) + 1
    together = math.ceil(layers / max(1, MOST_ROWS // types))
    groups: dict[str, list[int]] = {}
    for i, parts in layered:
        first = int(parts[1]) // together * together
        last = min(first + together, layers) - 1
        groups.setdefault(f"layers.{first}-{last}.{parts[-1]}", []).append(i)
    outer = {b: [i] for i, b in enumerate(track.blocks) if not b.startswith("layers.")}
    return {
        name: (track.values[m] * track.parameters[m, None]).sum(0) / track.parameters[m].sum()
        for name, m in (groups | outer).items()
    }


def _place(row: str) -> tuple[int, int]:
    kind = block_type(row)
    digits = "".join(c for c in row.split("-")[0] if c.isdigit())
    return ORDER.index(kind) if kind in ORDER else len(ORDER), int(digits or 10**9)


def _heat(
    axes: "Axes", track: Track, table: Mapping[str, np.ndarray], names: Sequence[str],
    limits: tuple[float, float],
) -> None:  # fmt: skip
    cells = np.full((len(names), len(track.steps)), np.nan)
    for i, name in enumerate(names):
        if name in table:
            cells[i] = table[name]
            _row_value(axes, i, say.number(float(table[name][-1])))
    every = float(np.median(np.diff(track.steps))) if len(track.steps) > 1 else 1.0
    extent = (float(track.steps[0] - every), float(track.steps[-1]), len(names) - 0.5, -0.5)
    axes.imshow(colors(cells, *limits), aspect="auto", interpolation="none", extent=extent)
    _steps_axis(axes, track.steps)
    axes.set_xlim(extent[0], extent[1])
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    for k in range(len(names) + 1):
        starts = 0 < k < len(names) and block_type(names[k]) != block_type(names[k - 1])
        if starts or k in (0, len(names)):
            axes.axhline(k - 0.5, color=LINE, lw=1.0, clip_on=False)


def _row_value(axes: "Axes", row: int, text: str) -> None:
    axes.annotate(
        text, xy=(1, row), xytext=(VALUE, 0), xycoords=("axes fraction", "data"),
        textcoords="offset points", ha="right", va="center_baseline", fontsize=10.5,
        color=MUTED, annotation_clip=False,
    )  # fmt: skip


def _color_bar(drawing: "Figure", height: int, low: float, high: float) -> None:
    size, right, top = 260, 34, 12
    area = ((WIDTH - size - right) / WIDTH, 1 - top / height, size / WIDTH, 9 / height)
    axes = drawing.add_axes(area)
    ends = math.log10(low), math.log10(high)
    scale = np.logspace(*ends, 121)[None, :]
    axes.imshow(colors(scale, low, high), aspect="auto", interpolation="none", extent=(*ends, 0, 1))
    axes.grid(visible=False)
    axes.set_yticks([])
    inside = [
        d for d in range(math.floor(ends[0]), math.ceil(ends[1]) + 1) if ends[0] <= d <= ends[1]
    ]
    axes.set_xticks(inside, [f"1e{d}".replace("-", "−") for d in inside], fontsize=10)
    axes.tick_params(axis="x", length=3, pad=2)
    axes.spines["bottom"].set_visible(False)


def _describe_types(tracks: Sequence[Track]) -> str:
    parts = [f"{t.run.label}: {say.order(t.at_the_end())}" for t in tracks]
    return f"Sharpness of the block types over steps. At the end, {'; '.join(parts)}."


def _describe_blocks(tracks: Sequence[Track]) -> str:
    parts = []
    for one in tracks:
        top = int(np.nanargmax(np.nan_to_num(one.values[:, -1])))
        parts.append(f"{one.run.label}: sharpest block at the end {one.blocks[top]}")
    return f"Sharpness of every block over steps. {'; '.join(parts)}."


def _describe_logits(tracks: Sequence[Track]) -> str:
    parts = [
        f"{t.run.label}: {say.number(float(t.logits['sharpness'][-1]))} % and log Z "
        f"{say.number(float(t.logits['logz'][-1]))}"
        for t in tracks
    ]
    return f"Logits sharpness and log Z over steps. At the end {'; '.join(parts)}."
