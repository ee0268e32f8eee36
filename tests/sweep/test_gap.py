import numpy as np
import pytest

from halfulp.sweep.gap import best_rate, gap_at, gap_at_best, mean_losses

NAN = float("nan")


def test_means_and_the_best_rate_are_over_known_runs():
    losses = np.array([[3.0, 3.2], [2.0, NAN], [NAN, NAN]])
    assert mean_losses(losses) == pytest.approx([3.1, 2.0, NAN], nan_ok=True)
    assert best_rate(losses) == 1
    assert best_rate(np.full((2, 3), NAN)) is None
    assert best_rate(np.array([[2.0], [2.0]])) == 0  # of equals the smaller rate


def test_a_gap_is_paired_by_seed():
    seeds = np.array([0.0, 0.5, -0.5])  # common to both: it must cancel
    reference = np.array([2.3 + seeds, 2.4 + seeds])
    losses = reference + np.array([0.01, 0.02, 0.03])
    gap = gap_at(losses, reference, 0)
    assert gap is not None
    assert gap.value == pytest.approx(0.02)
    assert gap.high - gap.value == pytest.approx(4.30265 * 0.01 / 3**0.5, rel=1e-4)
    assert gap.bootstrap == pytest.approx((0.01, 0.03))
    assert gap.n == 3


def test_a_seed_without_its_pair_is_left_out():
    reference = np.array([[2.3, 2.4, NAN]])
    gap = gap_at(np.array([[2.4, NAN, 2.6]]), reference, 0)
    assert gap is not None
    assert (gap.value, gap.n) == (pytest.approx(0.1), 1)
    assert gap_at(np.array([[NAN, NAN, 2.6]]), reference, 0) is None


def test_each_seed_is_judged_at_the_rate_that_is_best_on_the_others():
    losses = np.array([[2.0, 3.0, 3.0], [3.0, 2.0, 2.0]])
    reference = np.zeros((2, 3))
    # Seeds 1, 2 choose rate 1 for seed 0 (3.0); seeds 0 and 2, 0 and 1 tie: rate 0 (3.0, 3.0).
    gap = gap_at_best(losses, reference)
    assert gap is not None
    assert gap.value == 3.0
    assert mean_losses(losses).min() == pytest.approx(7 / 3)


def test_where_one_rate_is_best_for_every_seed_cross_fitting_changes_nothing():
    rng = np.random.default_rng(0)
    curve = np.array([3.0, 2.5, 2.9])[:, None]
    losses, reference = (curve + rng.normal(0, 0.01, (3, 3)) for _ in range(2))
    gap, same = gap_at_best(losses, reference), gap_at(losses, reference, 1)
    assert gap == same


def test_seeds_that_choose_different_rates_share_noise_and_widen_the_interval():
    losses = np.array([[2.0, 3.1, 3.0], [3.0, 2.0, 2.2]])
    reference = np.zeros((2, 3))
    gap = gap_at_best(losses, reference)
    assert gap is not None
    held_out = [3.0, 3.1, 2.2]  # seeds 0 and 2 choose rate 1, seed 1 rate 0
    half = 4.30265 * np.std(held_out, ddof=1) / 3**0.5
    assert gap.value == pytest.approx(np.mean(held_out))
    assert gap.high - gap.value == pytest.approx(half * (1 + 3 / 2) ** 0.5, rel=1e-4)
    assert gap.value - gap.low == pytest.approx(gap.high - gap.value)


def test_choosing_among_rates_does_not_flatter_the_recipe():
    # 9 rates that are all alike for the recipe, and one best rate for the reference: the truth is
    # 0. Standard error of the mean of 600 gaps 0.0024: |mean| above 5 of them once in 10^6.
    rng, cross, naive = np.random.default_rng(1), [], []
    for _ in range(600):
        losses = rng.normal(2, 0.1, (9, 3))
        reference = np.full((9, 3), 3.0)
        reference[4] = 2.0
        gap = gap_at_best(losses, reference)
        assert gap is not None
        cross.append(gap.value)
        naive.append(mean_losses(losses).min() - 2)
    assert abs(np.mean(cross)) < 0.012
    assert np.mean(naive) < -0.07


# Rates of which one is best, two are nearly, all are: the last is the hardest.
CURVES = {
    "clear": [2.6, 2.4, 2.3, 2.32, 2.7],
    "near": [2.6, 2.31, 2.3, 2.31, 2.7],
    "alike": [2.3] * 5,
}


@pytest.mark.slow
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("seeds", [3, 5])
def test_coverage_of_the_gap_with_few_seeds(seeds, curve):
    """1500 sweeps of 5 rates: standard error 0.006; the bounds are 3 of them from 0.94 or more."""
    rng, inside = np.random.default_rng(2), 0
    true = np.array(CURVES[curve])[:, None]
    for _ in range(1500):
        seed = rng.normal(0, 0.05, (1, seeds))
        reference = true + seed + rng.normal(0, 0.01, (5, seeds))
        losses = true + 0.02 + seed + rng.normal(0, 0.01, (5, seeds))
        gap = gap_at_best(losses, reference)
        assert gap is not None
        inside += 0.02 in gap
    assert 0.92 < inside / 1500 < 0.98
