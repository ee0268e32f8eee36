"""`halfulp plan fit`: seconds of a fit and of its band, beside the published recipe of starts.

    python benchmarks/plan_fit.py [--quick]

One thread, CPU time. Runs are synthetic: 42 on a grid (scatter 0.3 %), and 240 spread as those of
Hoffmann et al. that Besiroglu et al. digitized (scatter 0.8 %). The recipe of starts is L-BFGS from
each of 4500 points (arXiv:2404.10102, section 3); every 100th is run and the time multiplied.
"""

import time
from collections.abc import Callable
from itertools import product

import numpy as np
from common import machine, parser, section, table, use_threads, verdict
from scipy.optimize import minimize

from halfulp.plan.bootstrap import bootstrap
from halfulp.plan.chinchilla import Chinchilla, chinchilla
from halfulp.plan.fit import DELTA, Problem, fit
from halfulp.plan.runs_table import Runs

DRAWS = 1000
EVERY = 100
FIT_GOAL, BAND_GOAL = 0.1, 20.0  # seconds


def grid_runs() -> Runs:
    n, d = np.meshgrid(np.geomspace(1e7, 1e9, 6), np.geomspace(2e8, 2e10, 7))
    return _with_loss(n.ravel(), d.ravel(), scatter=0.003)


def spread_runs() -> Runs:
    rng = np.random.default_rng(0)
    n = np.exp(rng.uniform(np.log(5.7e7), np.log(1.6e10), 240))
    d = np.exp(rng.uniform(np.log(8.2e8), np.log(3.2e11), 240))
    return _with_loss(n, d, scatter=0.008)


def _with_loss(n: np.ndarray, d: np.ndarray, *, scatter: float) -> Runs:
    noise = np.exp(scatter * np.random.default_rng(1).standard_normal(len(n)))
    return Runs(parameters=n, tokens=d, loss_nats=np.asarray(chinchilla().loss(n, d)) * noise)


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least CPU time of some calls."""
    taken = []
    for _ in range(repeats):
        before = time.process_time()
        work()
        taken.append(time.process_time() - before)
    return min(taken)


def from_starts(runs: Runs, *, mean: bool) -> tuple[float, float]:
    """(seconds for all starts, least Huber sum × 1000 found) with scipy's default tolerances.

    `mean`: the Huber terms averaged, as in the published fit that stopped early.
    """
    axes = (
        range(0, 30, 5),
        range(0, 30, 5),
        np.arange(-1, 1.5, 0.5),
        *[np.arange(0, 2.5, 0.5)] * 2,
    )
    starts = list(product(*axes))
    problem, before, best = Problem(runs), time.process_time(), np.inf
    factor = 1 / len(runs) if mean else 1.0
    for start in starts[EVERY // 2 :: EVERY]:
        found = minimize(lambda p: factor * _huber_sum(p, runs), start, method="L-BFGS-B")
        a, b, e, alpha, beta = map(float, found.x)
        law = Chinchilla(float(np.exp(e)), float(np.exp(a)), float(np.exp(b)), alpha, beta)
        best = min(best, problem.objective(problem.point(law))[0])
    taken = (time.process_time() - before) * len(starts) / len(starts[EVERY // 2 :: EVERY])
    return taken, best


def _huber_sum(p: np.ndarray, runs: Runs) -> float:
    a, b, e, alpha, beta = p
    heights = np.stack(
        [a - alpha * np.log(runs.parameters), b - beta * np.log(runs.tokens), np.full(len(runs), e)]
    )
    off = np.log(runs.loss_nats) - np.logaddexp.reduce(heights)
    inside = np.clip(off, -DELTA, DELTA)
    return float((inside * (off - inside / 2)).sum())


def main() -> None:
    args = parser(__doc__.splitlines()[0]).parse_args()
    use_threads(1)
    repeats = 3 if args.quick else 10
    print(f"## Fitting a scaling law\n\n{machine()}", flush=True)
    rows = []
    for name, runs in (("42 runs", grid_runs()), ("240 runs", spread_runs())):
        found = fit(runs)
        one = seconds(lambda runs=runs: fit(runs), repeats)
        draws = DRAWS // 10 if args.quick else DRAWS
        band = seconds(lambda found=found, n=draws: bootstrap(found, n), 1) * DRAWS / draws
        least = f"{found.objective:.4f}"
        rows.append([f"{name}, a fit", f"{one:.3f}", least, verdict(one, FIT_GOAL)])
        rows.append([f"{name}, {DRAWS} resamples", f"{band:.1f}", "", verdict(band, BAND_GOAL)])
        for what, mean in (("summed", False), ("averaged", True)):
            taken, best = from_starts(runs, mean=mean)
            label = f"{name}, 4500 starts, Huber terms {what}"
            rows.append([label, f"{taken:.0f}", f"{best:.4f}", f"{taken / one:.0f} × a fit"])
    text = table(["what", "seconds", "Huber sum × 1000", "goal, ratio"], rows)
    section("A fit and its band, 1 thread, CPU time", text)


if __name__ == "__main__":
    main()
