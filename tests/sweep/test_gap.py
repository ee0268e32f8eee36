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


@pytest.mark.slow
def test_coverage_of_the_gap_with_three_seeds():
    """2000 sweeps of 5 rates: standard error 0.005; the bounds are 4 of them from 0.95 or more."""
    rng, inside = np.random.default_rng(2), 0
    curve = np.array([2.6, 2.4, 2.3, 2.32, 2.7])[:, None]
    for _ in range(2000):
        seed = rng.normal(0, 0.05, (1, 3))
        reference = curve + seed + rng.normal(0, 0.01, (5, 3))
        losses = curve + 0.02 + seed + rng.normal(0, 0.01, (5, 3))
        gap = gap_at_best(losses, reference)
        assert gap is not None
        inside += 0.02 in gap
    assert 0.92 < inside / 2000 < 0.975
