"""What a recipe costs once failed runs, the search for a learning rate and the guard are counted.

Costs are in *runs*: 1 is the compute of one successful run of the recipe itself. Probabilities may
be arrays. docs/sweep_cost.md derives every formula and says what it assumes.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from halfulp.errors import ConfigError

Numbers = Any  # a float or an array of floats
JEFFREYS = (0.5, 0.5)  # the Beta distribution of a probability of which nothing is known


@dataclass(frozen=True, kw_only=True)
class Guard:
    """What a guard that rolls back costs and saves. Hours are GPU-hours of the same job.

    The stretch that is run again does not spike again: the guard has changed something.
    """

    spikes_per_hour: float  # λ, per GPU-hour of progress
    rollback_hours: float  # ρ, progress given up per spike
    detection_hours: float = 0.0  # d, from the spike to its detection
    restart_hours: float = 0.0  # o, from the detection to the first step that counts
    rescue: float = 0.0  # q, share of the failing attempts that a rollback saves

    def __post_init__(self) -> None:
        for field in fields(self):
            _check(field.name, getattr(self, field.name), 0, 1 if field.name == "rescue" else None)

    @property
    def overhead(self) -> float:
        """1 + λ (ρ + d + o): compute per hour of progress."""
        lost_hours = self.rollback_hours + self.detection_hours + self.restart_hours
        return 1 + self.spikes_per_hour * lost_hours

    def success(self, success: Numbers) -> Numbers:
        """p' = p + (1 − p) q: of an attempt that succeeds with probability p without the guard."""
        return success + (1 - success) * self.rescue


def expected_runs(
    success: Numbers, *, abandoned_fraction: Numbers = 0.5, guard: Guard | None = None
) -> Numbers:
    """Runs' worth of compute until one attempt succeeds: 1 + (1 − p) / p · ψ.

    Attempts succeed independently with probability p = `success`; a failing one is given up after
    the share ψ = `abandoned_fraction` of a run on average. With a guard p becomes p' and everything
    takes 1 + λ (ρ + d + o) times as long.
    Raises ConfigError for a success outside (0, 1]: what never succeeds has no finite cost.
    """
    _check("success", success, 0, 1, open_low=True)
    _check("abandoned_fraction", abandoned_fraction, 0, 1)
    if guard is None:
        return 1 + (1 - success) / success * abandoned_fraction
    inner = expected_runs(guard.success(success), abandoned_fraction=abandoned_fraction)
    return guard.overhead * inner


def break_even_speedup(
    *,
    success: Numbers,
    success_reference: Numbers,
    abandoned_fraction: Numbers = 0.5,
    abandoned_fraction_reference: Numbers | None = None,
    extra_tokens: Numbers = 0.0,
    guard: Guard | None = None,
    guard_reference: Guard | None = None,
) -> Numbers:
    """The ratio of step times r* at which a recipe costs what its reference costs.

    r* = (1 + τ) · [1 + (1 − p) / p · ψ] / [1 + (1 − p_ref) / p_ref · ψ_ref], τ = `extra_tokens`:
    the share of tokens that the recipe needs on top for an equal loss. ψ_ref is ψ unless given. The
    search for a learning rate is not in it; `halfulp.sweep.money` has it.
    """
    _check("extra_tokens", extra_tokens, -1, None, open_low=True)
    other = (
        abandoned_fraction if abandoned_fraction_reference is None else abandoned_fraction_reference
    )
    own = expected_runs(success, abandoned_fraction=abandoned_fraction, guard=guard)
    reference = expected_runs(success_reference, abandoned_fraction=other, guard=guard_reference)
    return (1 + extra_tokens) * own / reference


def grid_search_runs(
    prior_octaves: Numbers, window_octaves: Numbers, *, proxy_fraction: float, seeds: int = 1
) -> Numbers:
    """κ · k · ⌈P / W⌉: a grid of learning rates so fine that one lies in the window for certain.

    P: how many octaves (factors of two) the best learning rate is uncertain by, W: width of the
    window, κ: cost of a proxy run in runs, k: seeds. inf for a window of no width.
    """
    _check("prior_octaves", prior_octaves, 0, None)
    points = np.ceil(_windows_in(prior_octaves, window_octaves))
    return _proxies(proxy_fraction, seeds) * np.maximum(points, 1.0)


def random_search_runs(
    prior_octaves: Numbers, window_octaves: Numbers, *, proxy_fraction: float, seeds: int = 1
) -> Numbers:
    """κ · k · P / W: expected cost of drawing learning rates until one lies in the window."""
    _check("prior_octaves", prior_octaves, 0, None)
    draws = _windows_in(prior_octaves, window_octaves)
    return _proxies(proxy_fraction, seeds) * np.maximum(draws, 1.0)


def _windows_in(prior_octaves: Numbers, window_octaves: Numbers) -> Numbers:
    _check("window_octaves", window_octaves, 0, math.inf)
    window = np.asarray(window_octaves, dtype=float)
    safe = np.where(window > 0, window, 1.0)
    # A window without an end is hit by the first point.
    return np.where(window > 0, prior_octaves / safe, math.inf)[()]


def _proxies(proxy_fraction: float, seeds: int) -> float:
    _check("proxy_fraction", proxy_fraction, 0, None, open_low=True)
    _check("seeds", seeds, 1, None)
    return proxy_fraction * seeds


def snapshot_spacing_hours(snapshot_hours: float, losses_per_hour: float) -> float:
    """√(2 C / λ): hours between snapshots that cost C hours each when λ losses come per hour.

    First order in √(λ C); Young (1974), Daly (2006).
    """
    _check("snapshot_hours", snapshot_hours, 0, None)
    _check("losses_per_hour", losses_per_hour, 0, None, open_low=True)
    return math.sqrt(2 * snapshot_hours / losses_per_hour)


def interrupted_factor(
    spacing_hours: Numbers,
    *,
    losses_per_hour: float,
    snapshot_hours: float = 0.0,
    restart_hours: float = 0.0,
) -> Numbers:
    """Expected hours per hour of progress under hardware failures, as in Daly (2006).

    (1 / λ + R) (e^{λ (s + C)} − 1) / s: each loss falls back to the last snapshot (every s hours,
    at C hours each) and takes R hours to restart, which nothing interrupts. Hours are wall-clock
    hours of the whole job and losses those of all its GPUs. Every recipe has the same factor.
    """
    _check("spacing_hours", spacing_hours, 0, None, open_low=True)
    _check("losses_per_hour", losses_per_hour, 0, None, open_low=True)
    stretch = np.expm1(losses_per_hour * (spacing_hours + snapshot_hours))
    return (1 / losses_per_hour + restart_hours) * stretch / spacing_hours


def success_posterior(
    successes: Numbers, failures: Numbers, *, prior: tuple[float, float] = JEFFREYS
) -> tuple[Numbers, Numbers]:
    """(a, b) of the Beta distribution of p after s successes and f failures: (½ + s, ½ + f).

    `prior`: (a, b) before them, in the place of (½, ½).
    """
    _check("successes", successes, 0, None)
    _check("failures", failures, 0, None)
    return successes + prior[0], failures + prior[1]


def expected_attempts(successes: float, failures: float) -> float:
    """E[1 / p] under the posterior: (a + b − 1) / (a − 1); inf without a success."""
    a, b = success_posterior(successes, failures)
    return (a + b - 1) / (a - 1) if a > 1 else math.inf


def success_lower_bound(successes: int, failures: int, *, confidence: float = 0.95) -> float:
    """The exact one-sided lower bound of p (Clopper-Pearson); 0 without a success."""
    from scipy.stats import beta

    success_posterior(successes, failures)
    if successes == 0:
        return 0.0
    return float(beta.ppf(1 - confidence, successes, failures + 1))


def hazard_upper_bound(tokens: float, *, failures: int = 0, confidence: float = 0.95) -> float:
    """Most failures per token after `failures` in `tokens` of all runs together; 3 / (n h) for 0.

    Exact for a hazard that is constant over a run.
    """
    from scipy.stats import chi2

    _check("tokens", tokens, 0, None, open_low=True)
    _check("failures", failures, 0, None)
    return float(chi2.ppf(confidence, 2 * failures + 2)) / (2 * tokens)


def tokens_needed(success: float, run_tokens: float, *, confidence: float = 0.95) -> float:
    """Tokens without a failure that show p ≥ `success` for a run of T tokens; 28.4 T for 0.9."""
    _check("success", success, 0, 1, open_low=True)
    if success >= 1:
        return math.inf
    return run_tokens * math.log(1 - confidence) / math.log(success)


def success_at(
    success: Numbers, tokens: float, run_tokens: float, *, shape: float = 1.0
) -> Numbers:
    """p of a run of `run_tokens` where runs of `tokens` succeed with p: p^((T / h)^shape).

    A Weibull hazard; shape 1 is a constant one, above 1 it grows with the tokens seen.
    """
    _check("success", success, 0, 1)
    _check("tokens", tokens, 0, None, open_low=True)
    return success ** ((run_tokens / tokens) ** shape)


def _check(
    name: str, value: Numbers, low: float, high: float | None, *, open_low: bool = False
) -> None:
    array = np.asarray(value, dtype=float)
    above = array > low if open_low else array >= low
    if np.all(above & ((array <= high) if high is not None else np.isfinite(array))):
        return
    left = f"> {low:g}" if open_low else f">= {low:g}"
    right = "" if high in (None, math.inf) else f" and <= {high:g}"
    shown = float(array) if array.ndim == 0 else [float(array.min()), float(array.max())]
    raise ConfigError(f"{name} = {shown} has no meaning here. Give a number {left}{right}.")
