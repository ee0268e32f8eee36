"""The picture of a fitted law: loss against compute, and what each run is off by."""

from typing import TYPE_CHECKING, Any

import numpy as np

from halfulp.report.svg import INK, MUTED, figure, plain_decades, series_style, standalone

if TYPE_CHECKING:
    from halfulp.plan.bootstrap import Bootstrap
    from halfulp.plan.fit import Fit

_MOST_SIZES = 8  # curves; more sizes are drawn as points alone
_REACH = 10.0  # compute beyond the largest run that is shown


def fit_svg(fit: "Fit", boot: "Bootstrap | None") -> str:
    """An SVG file: runs and law by model size, the best loss at each C and its band, residuals."""
    with figure(880, 360) as drawn:
        left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
        _losses(left, fit, boot)
        _residuals(right, fit)
        drawn.tight_layout(w_pad=3)
        return standalone(drawn)


def _losses(axes: Any, fit: "Fit", boot: "Bootstrap | None") -> None:
    runs = fit.runs
    sizes = np.unique(runs.parameters)
    for i, n in enumerate(sizes):
        color, dash = series_style(i)
        mine = runs.parameters == n
        axes.plot(
            runs.flops[mine], runs.loss_nats[mine], "o", ms=4, color=color,
            label=f"N = {n:.3g}" if len(sizes) <= _MOST_SIZES else None,
        )  # fmt: skip
        if len(sizes) <= _MOST_SIZES:
            flops = np.geomspace(runs.flops[mine].min(), runs.flops[mine].max(), 40)
            axes.plot(flops, fit.law.loss(n, flops / (6 * n)), color=color, ls=dash, lw=1.2)
    _frontier(axes, fit, boot)
    axes.set(xscale="log", xlabel="FLOPs, 6 N D", ylabel="held-out loss, nats/token")
    plain_decades(axes.xaxis)
    axes.legend(fontsize=9, frameon=False)


def _frontier(axes: Any, fit: "Fit", boot: "Bootstrap | None") -> None:
    flops = np.geomspace(fit.runs.flops.min(), _REACH * fit.runs.flops.max(), 40)
    best = [fit.law.allocate(float(c)) for c in flops]
    axes.plot(flops, [fit.law.loss(*place) for place in best], color=INK, label="best for C")
    if boot is not None:
        bands = [boot.loss(*place) for place in best]
        low, high = [b.low for b in bands], [b.high for b in bands]
        axes.fill_between(flops, low, high, color=INK, alpha=0.15, lw=0, label="80 % band")


def _residuals(axes: Any, fit: "Fit") -> None:
    axes.axhline(0, color=MUTED, lw=1)
    for i, n in enumerate(np.unique(fit.runs.parameters)):
        mine = fit.runs.parameters == n
        color, _ = series_style(i)
        axes.plot(fit.runs.flops[mine], 100 * fit.residuals[mine], "o", ms=4, color=color)
    axes.set(xscale="log", xlabel="FLOPs, 6 N D", ylabel="measured over law, %")
    plain_decades(axes.xaxis)
