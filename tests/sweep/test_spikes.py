import math

import numpy as np
import pytest

from halfulp.sweep.spikes import CONVENTIONS, is_spike, spike_score, spike_scores


def slowly(series, k: float, window: int) -> list[bool]:
    """As a training loop would count them, step by step."""
    found = []
    for step in range(window, len(series)):
        before = series[step - window : step]
        mean = sum(before) / window
        sigma = math.sqrt(sum((x - mean) ** 2 for x in before) / window)
        found.append(sigma > 0 and series[step] > mean + k * sigma)
    return found


@pytest.mark.parametrize(("k", "window"), [(2.0, 10), (1.0, 3), (6.0, 128)])
def test_spikes_are_those_that_a_loop_counts(k, window):
    rng = np.random.default_rng(0)
    series = 5 * np.exp(-np.arange(400) / 150) + rng.normal(0, 0.05, 400)
    series[[150, 151, 300]] += [1.0, 4.0, 2.0]
    expected = slowly(series, k, window)
    assert list(is_spike(series, k, window)) == expected
    assert spike_score(series, k, window) == pytest.approx(sum(expected) / len(expected))
    assert 0 < sum(expected) < 0.3 * len(expected)


def test_a_planted_spike_is_counted_once_and_a_drop_not():
    series = np.random.default_rng(1).normal(3, 0.01, 300)
    series[200] = 4.0
    assert spike_score(series, 6, 128) == 1 / 172
    series[200] = 2.0
    assert spike_score(series, 6, 128) == 0.0


def test_a_run_shorter_than_the_window_has_no_score():
    assert math.isnan(spike_score([1.0] * 128, 6, 128))
    assert math.isnan(spike_scores(np.ones(500), np.ones(500))["olmo2"])
    assert spike_scores(np.ones(500), np.ones(500))["olmo_core"] == 0.0


def test_what_does_not_vary_has_no_spikes():
    assert spike_score([0.1] * 50, 3, 10) == 0.0
    assert spike_score([0.1 * (1 + 1e-15 * (i % 2)) for i in range(50)], 3, 10) == 0.0


def test_a_value_that_is_not_finite_is_a_spike_and_hides_none_after_it():
    series = np.random.default_rng(2).normal(3, 0.01, 300)
    series[[180, 220]] = math.nan, math.inf
    series[230] = 4.0
    assert list(np.flatnonzero(is_spike(series, 6, 128)) + 128) == [180, 220, 230]


def test_a_spike_of_either_series_counts_once():
    loss = np.random.default_rng(3).normal(3, 0.01, 300)
    norm = np.random.default_rng(4).normal(1, 0.01, 300)
    loss[200] += 1
    norm[[200, 250]] += 1
    assert CONVENTIONS["olmo_core"] == (6.0, 128)
    assert spike_scores(loss, norm)["olmo_core"] == 2 / 172
