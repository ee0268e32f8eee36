import itertools
import math

import numpy as np
import pytest
from scipy import stats

from halfulp.sweep.interval import (
    FEW,
    bootstrap,
    bootstrap_t,
    expanded_tail,
    mean_interval,
    outer_quantiles,
    resamples,
    student,
)


def test_few_values_have_students_interval():
    values = np.array([0.1, 0.4, -0.2])
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.1, low, high))
    assert (found.n, found.method) == (3, "Student")
    assert 0.1 in found
    assert 2.0 not in found


def test_another_level_is_another_quantile():
    values = np.array([0.1, 0.4, -0.2])
    found = mean_interval(values, 0.99)
    low, high = stats.t.interval(0.99, 2, loc=values.mean(), scale=stats.sem(values))
    assert found is not None
    assert (found.low, found.high) == pytest.approx((low, high))
    many = np.random.default_rng(3).normal(size=40)
    for level in (0.8, 0.95, 0.99):
        wide, exact = bootstrap_t(many, level), student(many, level)
        assert wide.high - wide.low == pytest.approx(exact.high - exact.low, rel=0.15)
    assert expanded_tail(6, 0.99) < expanded_tail(6) / 2


def test_one_value_says_nothing_of_its_spread_and_none_nothing_at_all():
    one = mean_interval(np.array([math.nan, 0.3]))
    assert one is not None
    assert (one.value, one.low, one.high, one.n) == (0.3, -math.inf, math.inf, 1)
    assert mean_interval(np.array([math.nan])) is None
    assert mean_interval(np.array([])) is None


def test_equal_values_have_an_interval_without_width():
    for n in (3, FEW + 2):
        found = mean_interval(np.full(n, 0.25))
        assert found is not None
        assert found.low == found.value == found.high == 0.25


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_resamples_are_all_of_them(n):
    assert sorted(map(tuple, resamples(n))) == sorted(itertools.product(range(n), repeat=n))


def test_many_resamples_are_the_same_every_time_and_leave_no_value_out():
    drawn = resamples(20)
    assert np.array_equal(drawn, resamples(20))
    # Each index comes 2000 times on average, σ = 44.
    assert np.abs(np.bincount(drawn.ravel()) - 2000).max() < 5 * 44


def test_the_studentized_bootstrap_leans_toward_the_long_tail():
    skewed = np.random.default_rng(1).lognormal(size=30)
    found, plain = mean_interval(skewed), student(skewed)
    assert found is not None
    assert found.method == "bootstrap-t"
    assert found.high - found.value > 1.3 * (found.value - found.low)
    assert found.high > plain.high
    assert found.low > plain.low


def test_shift_and_scale_move_the_interval_along():
    values = np.random.default_rng(2).normal(size=12)
    for of in (student, bootstrap, bootstrap_t):
        a, b = of(values), of(3 * values + 1)
        assert (b.value, b.low, b.high) == pytest.approx(
            (3 * a.value + 1, 3 * a.low + 1, 3 * a.high + 1)
        )


def test_quantiles_go_outward_and_the_tail_shrinks_with_few_values():
    assert outer_quantiles(np.arange(27.0)) == (0, 26)
    assert outer_quantiles(np.arange(101.0), 0.1) == (10, 90)
    assert outer_quantiles(np.arange(100.0), 0.1) == (9, 90)
    assert expanded_tail(3) < 1e-6
    assert expanded_tail(8) == pytest.approx(0.0057, abs=1e-4)
    assert expanded_tail(10_000) == pytest.approx(0.025, rel=1e-3)


def coverage(of, draw, n: int, repeats: int, seed: int = 0) -> float:
    rng = np.random.default_rng(seed)
    return sum(0.0 in of(draw(rng, n)) for _ in range(repeats)) / repeats


def normal(rng, n):
    return rng.normal(size=n)


def exponential(rng, n):
    return rng.exponential(size=n) - 1


def test_with_three_values_student_covers_and_the_percentile_bootstrap_does_not():
    # Standard errors 0.007 and 0.014: bounds 4.3 of them away, failure below 1e-4.
    assert 0.92 < coverage(student, normal, 3, 1000) < 0.98
    # All three on one side, 2 / 8, is missed; else its extremes hold the mean: each of them is one
    # of 27 draws, and 1 / 27 > 2.5 %.
    assert 0.69 < coverage(bootstrap, normal, 3, 1000) < 0.81


@pytest.mark.slow
def test_coverage_of_the_intervals_that_are_used():
    """Standard errors 0.008 to 0.015; bounds 4 of them away or more, failure below 1e-3 in all."""
    for n in (3, 5, FEW, 20):
        of = student if n < FEW else bootstrap_t
        assert 0.91 < coverage(of, normal, n, 800) < 0.985
    # Skewed: the bootstrap of few seeds covers even less, and from FEW on Student falls behind.
    assert coverage(student, exponential, 3, 800) > coverage(bootstrap, exponential, 3, 800) + 0.05
    studentized = coverage(bootstrap_t, exponential, FEW, 800)
    assert studentized > 0.9
    assert studentized > coverage(student, exponential, FEW, 800)
