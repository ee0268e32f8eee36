"""Curves of the unique sequences of a corpus, and their forecasts, as an SVG file."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from halfulp.report.svg import MUTED, figure, plain_decades, series_style

if TYPE_CHECKING:
    from halfulp.corpus.forecast import Forecast
    from halfulp.corpus.stats import Stats

_LEAST_SHARE = 1 / 256  # of the corpus; the curve of so few documents is noise


def growth_svg(stats: "Stats", ahead: "Mapping[str, Sequence[Forecast]]") -> str:
    """An SVG file: distinct sequences against the share of the corpus, forecasts with their bands.

    Both axes are logarithmic; dashed parts are forecasts.
    """
    with figure(760, 440) as drawn:
        axes = drawn.subplots()
        shown = [count for count in stats.counts.values() if count.distinct]
        for i, count in enumerate(shown):
            color, _ = series_style(i)
            size = count.occurrences
            points = [(t / size, u) for t, u in count.curve if u and t >= _LEAST_SHARE * size]
            axes.plot(*zip(*points, strict=True), color=color, label=count.name)
            _draw_ahead(axes, count.distinct, ahead.get(count.name, ()), color)
        axes.axvline(1, color=MUTED, lw=1)
        axes.set(xscale="log", yscale="log", xlabel="size, in corpora", ylabel="unique sequences")
        for axis in (axes.xaxis, axes.yaxis):
            plain_decades(axis)
        if shown:
            axes.legend(fontsize=9, frameon=False)
        drawn.tight_layout()
        buffer = io.StringIO()
        nothing: dict[str, Any] = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        drawn.savefig(buffer, format="svg", metadata=nothing, facecolor="white")
    return buffer.getvalue()


def _draw_ahead(axes: Any, distinct: int, ahead: "Sequence[Forecast]", color: str) -> None:
    found = sorted(ahead, key=lambda forecast: forecast.factor)
    x = [1.0, *(forecast.factor for forecast in found)]
    axes.plot(x, [distinct, *(f.distinct for f in found)], color=color, ls="--")
    low, high = [f.low for f in found], [f.high for f in found]
    axes.fill_between(x, [distinct, *low], [distinct, *high], color=color, alpha=0.15, lw=0)
