"""One row of a sweep's table: everything that its runs say about a recipe on a data set."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from halfulp.sweep.divergence import reason_of, score_nats
from halfulp.sweep.failures import Failures
from halfulp.sweep.gap import Gap, best_rate, gap_at, gap_at_best, mean_losses
from halfulp.sweep.interval import LEVEL, Interval, mean_interval
from halfulp.sweep.result import Result
from halfulp.sweep.sensitivity import Sensitivity, sensitivity
from halfulp.sweep.spikes import CONVENTIONS
from halfulp.sweep.window import Window, rates_within, window


@dataclass(frozen=True)
class Outcome:
    """One run: the loss that it counts with (nan if lost or refused), and why it failed, or ""."""

    result: Result
    score_nats: float
    failure: str

    @property
    def known(self) -> bool:
        """Whether it counts as a success or as a failure."""
        return not self.result.lost and self.result.status != "refused"


@dataclass(frozen=True)
class Point:
    """The runs of a recipe at one learning rate, in the order of their seeds."""

    lr: float
    outcomes: tuple[Outcome, ...]

    @property
    def mean_nats(self) -> float:
        """Mean of the scores of known runs; nan without any."""
        return float(mean_losses(np.array([o.score_nats for o in self.outcomes] or [math.nan])))

    @property
    def failures(self) -> Failures:
        known = [outcome for outcome in self.outcomes if outcome.known]
        lost = sum(outcome.result.lost for outcome in self.outcomes)
        return Failures(sum(bool(outcome.failure) for outcome in known), len(known), lost)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A recipe on a data set. None: the runs so far do not say.

    Losses are min(held-out loss, loss at initialization) in nats/token, in the recipe's own
    arithmetic; a failed run without a loss counts as the latter, a lost one not at all. The best
    learning rate is that of the smallest mean over seeds. Intervals are over seeds, at the level
    that `Table.rows` was asked for, 95 % unless said.

    * `loss`: at `best_lr`; chosen on the same runs, and so on the low side.
    * `gap`: to the reference, each at its own best rate, chosen on the other seeds.
      `gap_same_lr`: both at the reference's best rate. Both None for the reference itself.
    * `failures` at `best_lr`: the probability of failing with the rate that a search would find.
      `failures_window` at the rates in the reference's window; `failures_grid` at all.
    * `sharpness` in percent, `logz` of the held-out logits and the ratios of sharpness to the
      reference (geometric mean), at the reference's best rate. A format that truncates shrinks
      the logits, and with them φ: compare within one rounding.
    * `spikes`: convention → mean share of steps at `best_lr`, of runs that broke too; conventions
      that the runs are too short for are left out.
    * `abandoned_fraction`: mean share of the planned steps that failed runs have made, all rates.
    """

    recipe: str
    data: str
    is_reference: bool
    points: tuple[Point, ...]
    planned: int
    done: int
    lost: int
    refused: str  # why the model or the data cannot take the recipe; "" if they can
    tokens: int
    parameters: int
    best_lr: float | None
    loss: Interval | None
    gap: Gap | None
    gap_same_lr: Gap | None
    window: Window | None
    sensitivity: Sensitivity | None
    failures: Failures
    failures_window: Failures
    failures_grid: Failures
    sharpness: float | None
    logz: float | None
    sharpness_ratio: Interval | None
    sharpness_centered_ratio: Interval | None
    spikes: Mapping[str, float]
    abandoned_fraction: float | None

    @property
    def missing(self) -> int:
        """Planned runs that are not done."""
        return self.planned - self.done


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The runs of one recipe on one data set, [learning rates][seeds], None where not done."""

    recipe: str
    data: str
    lrs: tuple[float, ...]
    results: tuple[tuple[Result | None, ...], ...]

    def array(self, of: Callable[[Result], float]) -> np.ndarray:
        """`of` each result, [learning rates, seeds]; nan where not done."""
        return np.array([[math.nan if r is None else of(r) for r in row] for row in self.results])

    def losses(self, initial_nats: float) -> np.ndarray:
        """The losses that the runs count with."""
        return self.array(lambda r: score_nats(r, initial_nats=initial_nats))

    def finished(self, of: Callable[[Result], float]) -> np.ndarray:
        """`of` the results that have reached their last step, as `array`."""
        return self.array(lambda r: of(r) if r.status == "finished" else math.nan)

    def done(self) -> list[Result]:
        return [r for row in self.results for r in row if r is not None]


def make_row(grid: Grid, reference: Grid, *, initial_nats: float, level: float = LEVEL) -> Row:
    """The row of `grid`, paired with the reference's runs on the same data set.

    `initial_nats` is the loss of a model that has learned nothing, for runs that broke off before
    they had recorded theirs.
    """
    losses, reference_losses = grid.losses(initial_nats), reference.losses(initial_nats)
    best, star = best_rate(losses), best_rate(reference_losses)
    is_reference = grid.recipe == reference.recipe
    gap = same = None
    if star is not None and not is_reference:
        gap = gap_at_best(losses, reference_losses, level)
        same = gap_at(losses, reference_losses, star, level)
    lrs = np.array(grid.lrs)
    star_nats = math.nan if star is None else float(mean_losses(reference_losses)[star])
    points = _points(grid, initial_nats, star_nats)
    done = grid.done()
    return Row(
        recipe=grid.recipe,
        data=grid.data,
        is_reference=is_reference,
        points=points,
        planned=losses.size,
        done=len(done),
        lost=sum(r.lost for r in done),
        refused=next((r.message or "refused" for r in done if r.status == "refused"), ""),
        tokens=max((r.tokens for r in done), default=0),
        parameters=max((r.parameters for r in done), default=0),
        best_lr=None if best is None else grid.lrs[best],
        loss=None if best is None else mean_interval(losses[best], level),
        gap=gap,
        gap_same_lr=same,
        window=window(losses, reference_losses, lrs, level=level),
        sensitivity=sensitivity(losses, reference_losses, lrs, level),
        failures=_failures(points, [] if best is None else [best]),
        failures_window=_failures(points, rates_within(reference_losses)),
        failures_grid=_failures(points, range(len(points))),
        sharpness=_mean(grid, star, lambda r: r.sharpness),
        logz=_mean(grid, star, lambda r: r.logz),
        sharpness_ratio=_ratio(grid, reference, star, level, lambda r: r.sharpness),
        sharpness_centered_ratio=_ratio(
            grid, reference, star, level, lambda r: r.sharpness_centered
        ),
        spikes=_spikes(grid, best),
        abandoned_fraction=_abandoned(points),
    )


def _points(grid: Grid, initial_nats: float, star_nats: float) -> tuple[Point, ...]:
    def outcome(result: Result) -> Outcome:
        score = score_nats(result, initial_nats=initial_nats)
        return Outcome(result, score, reason_of(result, reference_nats=star_nats))

    return tuple(
        Point(lr, tuple(outcome(r) for r in row if r is not None))
        for lr, row in zip(grid.lrs, grid.results, strict=True)
    )


def _failures(points: Sequence[Point], rates: Sequence[int]) -> Failures:
    return sum((points[rate].failures for rate in rates), start=Failures(0, 0))


def _mean(grid: Grid, rate: int | None, of: Callable[[Result], float]) -> float | None:
    values = [math.nan] if rate is None else grid.finished(of)[rate]
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else None


def _ratio(
    grid: Grid,
    reference: Grid,
    rate: int | None,
    level: float,
    of: Callable[[Result], float],
) -> Interval | None:
    """Geometric mean of the ratios to the reference by seed, its interval by their logarithms."""
    if rate is None or grid.recipe == reference.recipe:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(grid.finished(of)[rate]) - np.log(reference.finished(of)[rate])
    interval = mean_interval(logs[np.isfinite(logs)], level)
    if interval is None:
        return None
    with np.errstate(over="ignore"):
        value, low, high = np.exp([interval.value, interval.low, interval.high]).tolist()
    return Interval(value=value, low=low, high=high, n=interval.n, method=interval.method)


def _spikes(grid: Grid, rate: int | None) -> dict[str, float]:
    """Of runs that broke too: those are the ones that leap."""
    runs = [] if rate is None else [r for r in grid.results[rate] if r is not None and not r.lost]
    shares = {name: [r.spikes.get(name, math.nan) for r in runs] for name in CONVENTIONS}
    known = {name: [x for x in found if math.isfinite(x)] for name, found in shares.items()}
    return {name: float(np.mean(found)) for name, found in known.items() if found}


def _abandoned(points: Sequence[Point]) -> float | None:
    failed = [o.result for point in points for o in point.outcomes if o.failure]
    shares = [r.steps / r.planned_steps for r in failed if r.planned_steps]
    return float(np.mean(shares)) if shares else None
