import math

import numpy as np
import pytest

from halfulp.report.stats import autocorrelation_time, band, mean, smooth, student


def ar1(n: int, rho: float, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    noise = rng.normal(size=n)
    series = np.empty(n)
    series[0] = noise[0] / math.sqrt(1 - rho**2)
    for i in range(1, n):
        series[i] = rho * series[i - 1] + noise[i]
    return series


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
def test_autocorrelation_time_is_that_of_the_process(rho):
    times = [autocorrelation_time(ar1(4000, rho, seed)) for seed in range(8)]
    exact = (1 + rho) / (1 - rho)
    assert 0.8 * exact < np.mean(times) < 1.25 * exact


def test_autocorrelation_time_of_constants_and_trends():
    assert autocorrelation_time(np.zeros(50)) == 1.0
    assert autocorrelation_time(np.array([])) == 1.0
    assert autocorrelation_time(np.array([1.0])) == 1.0
    assert autocorrelation_time(np.arange(100.0)) > 20


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_interval_covers_the_true_mean_as_often_as_it_says(rho):
    means = [mean(ar1(200, rho, seed)) for seed in range(400)]
    covered = np.mean([abs(m.value) < m.half_width for m in means])
    # 95 % nominal; the estimated correlation costs a few points. 4 standard errors are 4.4 points.
    assert 0.88 < covered < 0.995


def test_ignoring_the_correlation_would_not_cover():
    series = [ar1(200, 0.6, seed) for seed in range(400)]
    naive = [abs(s.mean()) < 1.96 * s.std(ddof=1) / math.sqrt(len(s)) for s in series]
    assert np.mean(naive) < 0.8


def test_mean_of_too_little_has_no_half_width():
    assert mean(np.array([])).half_width == math.inf
    assert mean(np.array([1.0])).half_width == math.inf


@pytest.mark.parametrize(("freedom", "exact"), [(2, 4.303), (5, 2.571), (10, 2.228), (100, 1.984)])
def test_student(freedom, exact):
    assert student(freedom) == pytest.approx(exact, rel=0.04)


def test_smooth_keeps_lines_inside_and_averages_what_exists_at_the_ends():
    line = np.arange(20.0)
    assert smooth(line, 5)[2:-2] == pytest.approx(line[2:-2])
    assert smooth(line, 5)[0] == pytest.approx(1.0)
    assert smooth(line, 1) == pytest.approx(line)


def test_band_is_the_error_of_the_moving_average():
    values = np.random.default_rng(0).normal(size=4000)
    inside = band(values, 25)[50:-50]
    exact = 1.96 / 5 * math.sqrt(1 - 1 / 25)
    assert 0.85 * exact < inside.mean() < 1.15 * exact
