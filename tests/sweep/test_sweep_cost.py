"""Closed forms of the cost model against independent simulations and published values.

Simulated means are compared within 1 %. Each has a standard error of at most 0.2 % of itself, so
that a right formula fails with probability below 1e-6; the seed is fixed.
"""

import math
from typing import Any

import numpy as np
import pytest

from halfulp.errors import ConfigError
from halfulp.sweep import cost

N = 400_000


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def attempts(rng, p, psi, rescue=0.0):
    """Compute of N successes, attempt by attempt; a failing one stops at a random share."""
    spent = np.zeros(N)
    going = np.arange(N)
    while len(going):
        wins = rng.random(len(going)) < p
        wins |= rng.random(len(going)) < rescue
        spent[going[wins]] += 1
        going = going[~wins]
        spent[going] += rng.beta(2, 2 * (1 - psi) / psi, len(going))  # mean ψ
    return spent


@pytest.mark.parametrize("p", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("psi", [0.1, 0.5])
def test_retries(rng, p, psi):
    simulated = attempts(rng, p, psi).mean()
    assert cost.expected_runs(p, abandoned_fraction=psi) == pytest.approx(simulated, rel=0.01)
    assert simulated > 1.005


def test_retries_under_a_guard(rng):
    guard = cost.Guard(
        spikes_per_hour=0.02,
        rollback_hours=3.0,
        detection_hours=0.5,
        restart_hours=1.5,
        rescue=0.7,
    )
    hours = 100 * attempts(rng, 0.5, 0.4, guard.rescue)
    spikes = rng.poisson(guard.spikes_per_hour * hours)
    # n exponential losses with mean m add up to a Gamma(n, m).
    lost = sum(
        rng.gamma(np.maximum(spikes, 1e-9), mean)
        for mean in (guard.rollback_hours, guard.detection_hours, guard.restart_hours)
    )
    simulated = (hours + lost).mean() / 100
    closed = cost.expected_runs(0.5, abandoned_fraction=0.4, guard=guard)
    assert closed == pytest.approx(simulated, rel=0.01)
    assert closed < 0.95 * cost.expected_runs(0.5, abandoned_fraction=0.4)


def test_break_even_has_its_published_values():
    # ψ = ½ and a reference that succeeds nine times in ten.
    expected = {0.9: 1.0, 0.8: 1.07, 0.7: 1.15, 0.6: 1.263, 0.5: 1.42, 0.4: 1.66}
    for success, ratio in expected.items():
        r = cost.break_even_speedup(success=success, success_reference=0.9, abandoned_fraction=0.5)
        assert r == pytest.approx(ratio, abs=0.006 if ratio != 1.263 else 0.0005)


def test_break_even_is_where_simulated_costs_cross(rng):
    own, reference = attempts(rng, 0.6, 0.3).mean() * 1.1, attempts(rng, 0.9, 0.8).mean()
    closed = cost.break_even_speedup(
        success=0.6,
        success_reference=0.9,
        abandoned_fraction=0.3,
        abandoned_fraction_reference=0.8,
        extra_tokens=0.1,
    )
    assert closed == pytest.approx(own / reference, rel=0.01)


def test_the_verdict_flips_between_speedups_of_1_2_and_1_3(rng):
    own, reference = attempts(rng, 0.6, 0.5).mean(), attempts(rng, 0.9, 0.5).mean()
    assert own / 1.2 > reference * 1.01
    assert own / 1.3 < reference * 0.99


@pytest.mark.parametrize(("prior", "window"), [(8.0, 3.0), (8.0, 2.0), (5.0, 0.7)])
def test_a_grid_of_that_many_points_always_hits_and_one_fewer_does_not(rng, prior, window):
    points = int(cost.grid_search_runs(prior, window, proxy_fraction=1))
    for n, always in ((points, True), (points - 1, False)):
        grid = (np.arange(n) + 0.5) * prior / n
        low = rng.uniform(-window / 2, prior - window / 2, 20_000)  # its middle is in the prior
        hit = ((grid >= low[:, None]) & (grid <= low[:, None] + window)).any(axis=1)
        assert hit.all() == always


def test_random_search(rng):
    prior, window = 8.0, 1.5
    low = rng.uniform(0, prior - window, N)
    draws, going = np.zeros(N), np.arange(N)
    while len(going):
        draws[going] += 1
        x = rng.uniform(0, prior, len(going))
        going = going[(x < low[going]) | (x > low[going] + window)]
    closed = cost.random_search_runs(prior, window, proxy_fraction=0.02, seeds=3)
    assert closed == pytest.approx(0.02 * 3 * draws.mean(), rel=0.01)


def test_a_window_four_times_narrower_costs_four_times_the_search():
    wide, narrow = (cost.grid_search_runs(8, w, proxy_fraction=0.01, seeds=2) for w in (4, 1))
    assert (wide, narrow) == (pytest.approx(0.04), pytest.approx(0.16))
    assert cost.grid_search_runs(3, 4, proxy_fraction=0.01) == pytest.approx(0.01)
    assert cost.grid_search_runs(3, 0, proxy_fraction=0.01) == math.inf
    several = cost.grid_search_runs(8, np.array([0.0, 3.0]), proxy_fraction=1)
    assert several.tolist() == [math.inf, 3.0]


def test_interruptions(rng):
    rate, spacing, snapshot, restart = 0.05, 4.0, 0.25, 0.5
    hours, going = np.zeros(N), np.arange(N)
    while len(going):
        loss = rng.exponential(1 / rate, len(going))
        lost = loss < spacing + snapshot
        hours[going] += np.where(lost, loss + restart, spacing + snapshot)
        going = going[lost]
    closed = cost.interrupted_factor(
        spacing, losses_per_hour=rate, snapshot_hours=snapshot, restart_hours=restart
    )
    assert closed == pytest.approx(hours.mean() / spacing, rel=0.01)
    assert closed > 1.1


def test_the_snapshot_spacing_is_nearly_the_best_one():
    from scipy.optimize import minimize_scalar

    rate, snapshot = 0.01, 0.05

    def factor(spacing):
        return cost.interrupted_factor(spacing, losses_per_hour=rate, snapshot_hours=snapshot)

    spacing = cost.snapshot_spacing_hours(snapshot, rate)
    best: Any = minimize_scalar(factor, bounds=(0.1, 50), method="bounded")
    assert spacing == pytest.approx(best.x, rel=0.02)
    assert factor(spacing) < best.fun * 1.0001
    assert factor(spacing * 2) > best.fun * 1.003


@pytest.mark.parametrize(
    ("runs", "attempts", "bound"),
    [(3, 1.20, 0.37), (5, 1.11, 0.55), (8, 1.07, 0.69), (14, 1.04, 0.81), (29, 1.02, 0.90)],
)
def test_no_failure_has_its_published_bounds(runs, attempts, bound):
    assert cost.expected_attempts(runs, 0) == pytest.approx(attempts, abs=0.005)
    assert cost.success_lower_bound(runs, 0) == pytest.approx(bound, abs=0.006)


def test_expected_attempts_are_the_mean_over_the_posterior(rng):
    a, b = cost.success_posterior(6, 2)
    assert cost.expected_attempts(6, 2) == pytest.approx((1 / rng.beta(a, b, N)).mean(), rel=0.01)
    assert cost.expected_attempts(0, 3) == math.inf


def test_the_lower_bound_is_exact(rng):
    # At p equal to the bound of 7 of 9, 7 or more successes happen one time in twenty.
    p = cost.success_lower_bound(7, 2)
    share = (rng.binomial(9, p, N) >= 7).mean()  # standard error 3.4e-4
    assert share == pytest.approx(0.05, abs=0.002)
    assert cost.success_lower_bound(0, 4) == 0.0


def test_horizon(rng):
    runs, tokens = 5, 2e9
    hazard = cost.hazard_upper_bound(runs * tokens)
    assert hazard * runs * tokens == pytest.approx(3.0, rel=0.002)
    quiet = (rng.exponential(1 / hazard, (N, runs)) > tokens).all(axis=1).mean()
    assert quiet == pytest.approx(0.05, abs=0.002)
    assert cost.tokens_needed(0.9, 1.0) == pytest.approx(28.4, abs=0.05)
    # With exactly that many tokens the bound on the hazard gives a success of 0.9.
    enough = cost.tokens_needed(0.9, tokens)
    assert math.exp(-cost.hazard_upper_bound(enough) * tokens) == pytest.approx(0.9)
    assert cost.hazard_upper_bound(1.0, failures=2) > 2 * cost.hazard_upper_bound(1.0)


def test_a_longer_run_fails_more_often(rng):
    for shape in (1.0, 2.0):
        scale = 1 / (-math.log(0.99)) ** (1 / shape)  # runs of 1 succeed with 0.99
        share = (scale * rng.weibull(shape, N) > 10).mean()
        assert cost.success_at(0.99, 1.0, 10.0, shape=shape) == pytest.approx(share, rel=0.01)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: cost.expected_runs(0.0), "success = 0.0"),
        (lambda: cost.expected_runs(1.1), "success = 1.1"),
        (lambda: cost.expected_runs(math.nan), "success"),
        (lambda: cost.expected_runs(0.5, abandoned_fraction=2), "abandoned_fraction"),
        (lambda: cost.break_even_speedup(success=1, success_reference=1, extra_tokens=-1), "extra"),
        (lambda: cost.grid_search_runs(4, -1, proxy_fraction=0.1), "window_octaves"),
        (lambda: cost.grid_search_runs(4, 1, proxy_fraction=0), "proxy_fraction"),
        (lambda: cost.success_lower_bound(-1, 2), "successes"),
        (lambda: cost.Guard(spikes_per_hour=0.1, rollback_hours=1, rescue=1.5), "rescue"),
        (lambda: cost.snapshot_spacing_hours(0.1, 0.0), "losses_per_hour"),
    ],
)
def test_what_has_no_meaning_is_named(call, word):
    with pytest.raises(ConfigError, match=word):
        call()
