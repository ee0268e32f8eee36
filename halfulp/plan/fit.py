"""Fit L = E + A/N^alpha + B/D^beta to runs: the five coefficients, and how far each run is off.

For fixed exponents the loss is linear in E, A and B: a non-negative least-squares problem inside a
search over two numbers (variable projection, Golub & Pereyra 1973, SIAM J. Numer. Anal. 10(2)).
From there L-BFGS minimizes the Huber loss of log L summed over the runs, the estimator of Hoffmann
et al. 2022 (arXiv:2203.15556, equation 3). Averaging that loss instead of summing it made the
published fit stop early (Besiroglu et al. 2024, arXiv:2404.10102, section 3).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import Chinchilla
from halfulp.plan.runs_table import Runs

DELTA = 1e-3  # of the Huber loss, in ln L
SCALE = 1e3  # of the objective: L-BFGS stops by absolute tolerances
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
_EXPONENTS = (0.15, 0.3, 0.5, 0.8)  # starts of the search
_RANGE = (0.01, 3.0)  # of an exponent
_LEAST = 1e-6  # smallest E, A/N^alpha and B/D^beta at the middle of the runs, as shares of the loss

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law and the runs that it was fitted to.

    * `residuals` [runs]: ln(measured loss / loss by the law).
    * `spread`: their root mean square over runs − 5, what one run is off by.
    * `objective`: Σ Huber(residual) × 1000, at the minimum.
    """

    law: Chinchilla
    runs: Runs
    residuals: Floats
    objective: float

    @property
    def spread(self) -> float:
        free = max(1, len(self.residuals) - len(COEFFICIENTS))
        return math.sqrt(float(self.residuals @ self.residuals) / free)


class Problem:
    """The objective over one set of runs, in coordinates that L-BFGS likes.

    A point is (ln A/N^alpha and ln B/D^beta at the geometric middle of the runs, ln E, alpha,
    beta): the height of a term and its slope hardly trade against each other there.
    """

    def __init__(self, runs: Runs) -> None:
        x, y = np.log(runs.parameters), np.log(runs.tokens)
        self.middle = float(x.mean()), float(y.mean())
        self.x, self.y = x - self.middle[0], y - self.middle[1]
        self.log_loss = np.log(runs.loss_nats)
        lowest = float(self.log_loss.mean()) + math.log(_LEAST)
        self.bounds = [(lowest, None)] * 3 + [_RANGE] * 2

    def law(self, point: Floats) -> Chinchilla:
        """The coefficients that a point stands for."""
        a, b, e, alpha, beta = map(float, point)
        big_a, big_b = (
            math.exp(height + slope * middle)
            for height, slope, middle in zip((a, b), (alpha, beta), self.middle, strict=True)
        )
        return Chinchilla(math.exp(e), big_a, big_b, alpha, beta)

    def point(self, law: Chinchilla) -> Floats:
        """The inverse of `law`."""
        heights = (
            math.log(scale) - slope * middle
            for scale, slope, middle in zip(
                (law.A, law.B), (law.alpha, law.beta), self.middle, strict=True
            )
        )
        return np.array([*heights, math.log(law.E), law.alpha, law.beta])

    def start(self) -> Floats:
        """The minimum of the squared relative error, by variable projection."""
        from scipy.optimize import minimize

        grid = ((self._projected(pair)[0], pair) for pair in product(_EXPONENTS, repeat=2))
        best = min(grid)[1]
        found = minimize(
            lambda pair: self._projected(pair)[0], best, method="Nelder-Mead",
            bounds=[_RANGE] * 2, options={"xatol": 1e-4, "fatol": 0.0, "maxiter": 200},
        )  # fmt: skip
        heights = np.maximum(self._projected(found.x)[1], math.exp(self.bounds[0][0]))
        return np.array([*np.log(heights), *found.x])

    def polish(self, start: Floats, counts: Floats | None = None) -> tuple[Floats, float]:
        """(the minimum next to `start`, the objective there); run i counts `counts[i]` times."""
        from scipy.optimize import minimize

        found = minimize(
            self.objective, start, args=(counts,), jac=True, method="L-BFGS-B",
            bounds=self.bounds, options={"maxiter": 1000, "ftol": 1e-11, "gtol": 1e-7},
        )  # fmt: skip
        return found.x, float(found.fun)

    def residuals(self, point: Floats) -> Floats:
        """ln(measured / law) of each run."""
        return self.log_loss - np.log(self._terms(point).sum(0))

    def objective(self, point: Floats, counts: Floats | None = None) -> tuple[float, Floats]:
        """Σ Huber × SCALE, and its gradient in the point's coordinates."""
        terms = self._terms(point)
        total = terms.sum(0)
        off = self.log_loss - np.log(total)
        slope = np.clip(off, -DELTA, DELTA)
        huber = slope * (off - slope / 2)
        if counts is not None:
            slope, huber = slope * counts, huber * counts
        pull = -slope * (terms / total)
        gradient = (*pull.sum(1), -(pull[0] @ self.x), -(pull[1] @ self.y))
        return SCALE * float(huber.sum()), SCALE * np.array(gradient)

    def _terms(self, point: Floats) -> Floats:
        """A/N^alpha, B/D^beta and E at each run [3, runs]."""
        a, b, e, alpha, beta = point
        return np.exp(np.stack([a - alpha * self.x, b - beta * self.y, np.full_like(self.x, e)]))

    def _projected(self, exponents: object) -> tuple[float, Floats]:
        """(Σ squared relative error, best heights of the three terms) for (alpha, beta)."""
        from scipy.optimize import nnls

        alpha, beta = np.asarray(exponents, dtype=float)
        columns = np.stack([np.exp(-alpha * self.x), np.exp(-beta * self.y), np.ones_like(self.x)])
        heights, norm = nnls((columns / np.exp(self.log_loss)).T, np.ones_like(self.x))
        return norm * norm, heights


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """L-BFGS on five numbers: more threads of the linear algebra only wait for one another."""
    import scipy.optimize  # noqa: F401 - a library that is loaded later would not be limited
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


@one_blas_thread()
def fit(runs: Runs) -> Fit:
    """The law that describes `runs` best.

    Raises PlanError for runs that cannot tell the five coefficients: fewer than 6, fewer than 3
    different N or D, N and D in one fixed relation, or a loss that does not fall with N or D.
    """
    runs.check()
    problem = Problem(runs)
    point, objective = problem.polish(problem.start())
    _check_identified(point, problem)
    return Fit(
        law=problem.law(point), runs=runs, residuals=problem.residuals(point), objective=objective
    )


def _check_identified(point: Floats, problem: Problem) -> None:
    bounds = problem.bounds
    for i, what in ((0, "parameters"), (1, "tokens")):
        slope = point[3 + i]
        gone = point[i] <= bounds[i][0] + math.log(10)
        if gone or slope <= _RANGE[0] * 1.01 or slope >= _RANGE[1] * 0.99:
            raise PlanError(
                f"the loss of these runs does not fall with {what} as a power (exponent "
                f"{slope:.3g}, {'no such term' if gone else 'at the end of the range'}), so that "
                f"nothing can be allocated. Add runs that differ in {what} only, trained to the "
                "end of their schedule, or check the units."
            )
