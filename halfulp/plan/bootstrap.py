"""What the runs leave open: laws fitted to resampled runs, and bands of anything that follows.

Pairs bootstrap (Efron & Tibshirani 1993, chapter 9): runs are drawn with replacement, and each
resample is fitted from the coefficients of the whole.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import Chinchilla
from halfulp.plan.fit import Fit, Floats, Problem, one_blas_thread
from halfulp.plan.runs_table import LEAST_RUNS, LEAST_VALUES

LEVEL = 0.8
_TRIES = 20  # resamples per wanted one, before the runs are called too few


@dataclass(frozen=True)
class Band:
    """A value by the fitted law, and the interval of it by the resampled ones."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        """Whether `value` lies in the interval."""
        return self.low <= value <= self.high


@dataclass(frozen=True, kw_only=True)
class Bootstrap:
    """Laws of resampled runs [draws, 5], in the order of fit.COEFFICIENTS."""

    fit: Fit
    draws: Floats
    seed: int

    @property
    def laws(self) -> Chinchilla:
        """All laws at once: every coefficient is an array [draws, 1], and so is what follows."""
        return Chinchilla(*self.draws.T[:, :, None])  # pyright: ignore[reportArgumentType]

    def band(self, of: Callable[[Chinchilla], object], level: float = LEVEL) -> Band:
        """The central interval of a number that follows from a law, such as `law.exponent`."""
        values = np.ravel(np.asarray(of(self.laws), dtype=float))
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        return Band(float(of(self.fit.law)), float(low), float(high))  # pyright: ignore[reportArgumentType]

    def loss(self, n: float, d: float, level: float = LEVEL) -> Band:
        """The law's loss in nats/token at (n, d): what many runs there would have on average."""
        return self.band(lambda law: law.loss(n, d), level)

    def run_loss(self, n: float, d: float, level: float = LEVEL) -> Band:
        """The loss of a single run at (n, d): the law's, with the scatter of the fitted runs."""
        rng = np.random.default_rng(self.seed + 1)
        count = len(self.fit.residuals)
        free = np.sqrt(count / max(1, count - self.draws.shape[1]))
        scatter = free * rng.choice(self.fit.residuals, size=len(self.draws))
        losses = self.laws.loss(n, d)[:, 0] * np.exp(scatter)  # pyright: ignore[reportIndexIssue]
        low, high = np.quantile(losses, [(1 - level) / 2, (1 + level) / 2])
        return Band(self.fit.law.loss(n, d), float(low), float(high))


@one_blas_thread()
def bootstrap(
    fit: Fit, draws: int = 1000, *, seed: int = 0, progress: Callable[[int], None] | None = None
) -> Bootstrap:
    """`draws` laws of resampled runs; `progress` is told how many are done.

    Resamples that cannot tell five coefficients (fewer than 6 different runs, or 3 different N or
    D) are drawn again. PlanError for fewer than 20 draws, a negative seed, and for runs of
    which few resamples can.
    """
    if draws < 20:
        raise PlanError(f"{draws} resamples give no band. Give 20 or more; 1000 are usual.")
    if seed < 0:
        raise PlanError(f"the seed {seed} cannot be used. Give 0 or more.")
    runs, problem = fit.runs, Problem(fit.runs)
    start = problem.point(fit.law)
    rng = np.random.default_rng(seed)
    chance = np.full(len(runs), 1 / len(runs))
    laws: list[Floats] = []
    for _ in range(_TRIES * draws):
        counts = rng.multinomial(len(runs), chance).astype(float)
        if not _tells(fit, counts > 0):
            continue
        law = problem.law(problem.polish(start, counts)[0])
        laws.append(np.array([law.E, law.A, law.B, law.alpha, law.beta]))
        if progress is not None:
            progress(len(laws))
        if len(laws) == draws:
            return Bootstrap(fit=fit, draws=np.stack(laws), seed=seed)
    raise PlanError(
        f"{len(runs)} runs are too few to be resampled: most resamples cannot tell the five "
        "coefficients. Add runs, or fit without --bootstrap."
    )


def _tells(fit: Fit, drawn: NDArray[np.bool_]) -> bool:
    n, d = fit.runs.parameters[drawn], fit.runs.tokens[drawn]
    enough = len(np.unique(n)) >= LEAST_VALUES and len(np.unique(d)) >= LEAST_VALUES
    return len(n) >= LEAST_RUNS and enough
