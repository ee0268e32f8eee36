"""Which run to train next: the one that says most about a larger one.

The resampled laws stand for what is not known. To first order, a run at a place x with the scatter
s lowers the variance of the target t by cov(t, L_x)² / (var(L_x) + s²): c-optimal design
(Chaloner & Verdinelli 1995, Statistical Science 10(3), section 2.2), in logarithms of the loss.
"""

import math
from dataclasses import dataclass

import numpy as np

from halfulp.errors import PlanError
from halfulp.plan.bootstrap import Bootstrap
from halfulp.plan.fit import Floats

REACH = 10.0  # compute of the target over that of the largest run
_GRID = 25  # places per axis
_WIDER = 4.0  # N and D below the smallest and above the largest of the runs


@dataclass(frozen=True, kw_only=True)
class NextRun:
    """A run at (`parameters`, `tokens`), and what it would leave of the doubt about the target.

    The target is ln L of the compute-optimal run at `target_flops`; `doubt` is its standard
    deviation over the resampled laws, `doubt_after` what remains of it.
    """

    parameters: float
    tokens: float
    flops: float
    target_flops: float
    doubt: float
    doubt_after: float


def next_run(boot: Bootstrap, flops: float | None = None, *, reach: float = REACH) -> NextRun:
    """The most informative run that costs `flops` at most; without it, what the largest run cost.

    PlanError for `flops` that no run within 4 times the fitted sizes and lengths can cost.
    """
    runs, law = boot.fit.runs, boot.fit.law
    most = float(runs.flops.max()) if flops is None else flops
    if math.isinf(most):
        raise PlanError("a run of inf FLOPs cannot be paid. Give a number, such as 1e20.")
    target = reach * float(runs.flops.max())
    n, d = _places(boot, most)
    known = _logs(boot, *map(np.atleast_1d, law.allocate(target)))[:, 0]
    places = _logs(boot, n, d)
    shift = (known - known.mean()) @ (places - places.mean(0)) / len(known)
    gain = shift**2 / (places.var(0) + boot.fit.spread**2)
    best = int(np.argmax(gain))
    left = max(0.0, float(known.var() - gain[best]))
    return NextRun(
        parameters=float(n[best]), tokens=float(d[best]), flops=float(6 * n[best] * d[best]),
        target_flops=target, doubt=float(known.std()), doubt_after=math.sqrt(left),
    )  # fmt: skip


def _places(boot: Bootstrap, most: float) -> tuple[Floats, Floats]:
    """N and D [places] of a grid, those that cost `most` at most."""
    runs = boot.fit.runs
    axes = [
        np.geomspace(column.min() / _WIDER, column.max() * _WIDER, _GRID)
        for column in (runs.parameters, runs.tokens)
    ]
    n, d = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
    affordable = 6 * n * d <= most * (1 + 1e-9)
    if not affordable.any():
        raise PlanError(
            f"{most:.3g} FLOPs are fewer than the smallest useful run costs, "
            f"{float((6 * n * d).min()):.3g}. Give more."
        )
    return n[affordable], d[affordable]


def _logs(boot: Bootstrap, n: Floats, d: Floats) -> Floats:
    """ln L by each resampled law at each place [draws, places]."""
    return np.log(np.asarray(boot.laws.loss(n, d)))
