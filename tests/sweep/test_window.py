import itertools
import math

import numpy as np
import pytest

from halfulp.sweep.interval import FEW
from halfulp.sweep.window import rates_within, window

NAN = float("nan")
X = np.arange(-12.0, -3.0)  # log2 of the rates
LRS = 2.0**X


def valley(center: float, *, width: float = 1.0, floor: float = 2.0, seeds: int = 3) -> np.ndarray:
    """Losses that rise linearly by 1 nat per `width` octaves, the same for every seed."""
    return np.repeat((floor + np.abs(X - center) / width)[:, None], seeds, axis=1)


def test_crossings_are_linear_in_octaves():
    losses = valley(-8, width=4)
    found = window(losses, losses, LRS, delta_nats=0.3)
    assert found is not None
    assert found.octaves == pytest.approx(2.4)
    assert (math.log2(found.lr_low), math.log2(found.lr_high)) == pytest.approx((-9.2, -6.8))
    assert (found.low, found.high) == pytest.approx((2.4, 2.4))  # the seeds agree
    assert not found.open_ended


def test_the_tolerance_is_2_percent_of_the_references_best_loss():
    found = window(valley(-8), valley(-7), LRS)
    assert found is not None
    assert found.delta_nats == pytest.approx(0.04)
    assert found.octaves == pytest.approx(0.08)


def test_a_recipe_that_never_comes_close_has_no_window():
    found = window(valley(-8, floor=2.1), valley(-8), LRS, delta_nats=0.05)
    assert found is not None
    assert (found.octaves, found.low, found.high) == (0, 0, 0)
    assert math.isnan(found.lr_low)
    assert not found.open_ended


def test_the_window_is_around_the_recipes_own_best_rate_and_contiguous():
    losses = valley(-10)
    losses[7:9] = 2.05  # as good again at the high end, beyond a bad rate
    found = window(losses, valley(-5), LRS, delta_nats=0.1)
    assert found is not None
    assert found.lr_high < 2.0**-9
    assert found.octaves == pytest.approx(0.2)


@pytest.mark.parametrize(("center", "low", "high"), [(-12, True, False), (-4, False, True)])
def test_a_window_that_reaches_the_edge_of_the_grid_is_a_lower_bound(center, low, high):
    losses = valley(center)
    found = window(losses, losses, LRS, delta_nats=0.5)
    assert found is not None
    assert (found.open_low, found.open_high) == (low, high)
    assert found.octaves == pytest.approx(0.5)
    assert found.high == math.inf
    assert str(found) == "at least 0.5 octaves [0.5, ∞]"


def test_a_rate_without_a_known_run_ends_the_grid():
    losses = valley(-8)
    losses[6] = NAN  # 2^-6
    found = window(losses, losses, LRS, delta_nats=1.5)
    assert found is not None
    assert (found.open_low, found.open_high) == (False, True)
    assert math.log2(found.lr_high) == -7
    assert window(np.full((9, 3), NAN), losses, LRS) is None
    assert window(losses, np.full((9, 3), NAN), LRS) is None


def test_octaves_do_not_depend_on_where_they_are_and_grow_with_the_tolerance():
    rng = np.random.default_rng(0)
    losses = valley(-8, width=3) + rng.normal(0, 0.02, (9, 3))
    first, moved = (window(losses, losses, lrs, delta_nats=0.3) for lrs in (LRS, 8 * LRS))
    assert first is not None
    assert moved is not None
    assert moved.octaves == pytest.approx(first.octaves)
    assert moved.lr_low == pytest.approx(8 * first.lr_low)
    widths = [window(losses, losses, LRS, delta_nats=d) for d in (0.1, 0.2, 0.4, 0.8)]
    octaves = [w.octaves for w in widths if w is not None]
    assert len(octaves) == 4
    assert octaves == sorted(octaves)
    assert all(w.low <= w.octaves <= w.high for w in widths if w is not None)


def test_one_failed_seed_leaves_open_whether_the_rate_is_good():
    reference = valley(-8, width=4)
    losses = reference.copy()
    losses[5, 0] = 5.5  # 2^-7, one of three
    found = window(losses, reference, LRS, delta_nats=0.4)
    assert found is not None
    assert found.octaves == pytest.approx(1.6 + 0.4 / (10 / 3 - 2))
    assert found.high >= 3.2
    assert found.low < found.octaves


def test_with_one_seed_the_interval_says_nothing():
    losses = valley(-8, seeds=1)
    found = window(losses, losses, LRS, delta_nats=0.5)
    assert found is not None
    other = window(losses + 0.1, losses, LRS, delta_nats=0.5)
    assert other is not None
    assert (other.low, other.high) == (0, math.inf)
    assert other.octaves == pytest.approx(0.8)


def test_with_many_seeds_the_interval_is_the_bootstrap_of_pairs(monkeypatch):
    rng = np.random.default_rng(3)
    common = rng.normal(0, 0.2, (1, 4))
    reference = valley(-8, width=3, seeds=4) + common
    losses = reference + rng.normal(0, 0.05, (9, 4))
    widths = []
    for drawn in itertools.product(range(4), repeat=4):
        once = window(losses[:, drawn], reference[:, drawn], LRS, delta_nats=0.3)
        assert once is not None
        widths.append(once.octaves)
    monkeypatch.setattr("halfulp.sweep.window.FEW", 4)
    found = window(losses, reference, LRS, delta_nats=0.3)
    assert found is not None
    assert found.method == "bootstrap"
    # Φ(−√(4 / 3) · 3.18) = 0.00012 of 256 draws: all of them.
    assert (found.low, found.high) == pytest.approx((min(widths), max(widths)))
    assert found.high - found.low > 0.05


def test_draws_without_a_known_run_of_the_reference_say_nothing():
    losses, reference = valley(-8, width=4, seeds=FEW), valley(-8, width=4, seeds=FEW)
    reference[:, 1:] = NAN
    found = window(losses, reference, LRS, delta_nats=0.3)
    assert found is not None
    assert (found.low, found.octaves, found.high) == pytest.approx((2.4, 2.4, 2.4))


def test_rates_in_the_references_window():
    reference = valley(-8, width=4)
    assert list(rates_within(reference, delta_nats=0.3)) == [3, 4, 5]
    reference[2] = 2.1  # good again, but not next to the others
    reference[3] = 3.0
    assert list(rates_within(reference, delta_nats=0.3)) == [4, 5]
    assert list(rates_within(np.full((9, 3), NAN))) == []


def widths_covered(seeds: int, repeats: int) -> tuple[float, float]:
    """Share of sweeps whose interval holds the true octaves; and of the range of the seeds."""
    rng, inside, plain = np.random.default_rng(4), 0, 0
    truth = window(valley(-8, width=4), valley(-8, width=4), LRS, delta_nats=0.3)
    assert truth is not None
    for _ in range(repeats):
        reference = valley(-8, width=4, seeds=seeds) + rng.normal(0, 0.1, (1, seeds))
        losses = reference + rng.normal(0, 0.06, (9, seeds))
        reference = reference + rng.normal(0, 0.02, (9, seeds))
        found = window(losses, reference, LRS, delta_nats=0.3)
        assert found is not None
        inside += found.low <= truth.octaves <= found.high
        ends = [
            window(losses[:, [s]], reference[:, [s]], LRS, delta_nats=0.3) for s in range(seeds)
        ]
        octaves = [w.octaves for w in ends if w is not None]
        plain += min(octaves) <= truth.octaves <= max(octaves)
    return inside / repeats, plain / repeats


@pytest.mark.slow
def test_coverage_of_the_window_with_three_seeds():
    """400 sweeps: standard error at most 0.022; 3 seeds' own range covers too little."""
    inside, plain = widths_covered(3, 400)
    assert inside > 0.93
    assert plain < 0.85


@pytest.mark.slow
def test_coverage_of_the_window_with_many_seeds():
    """120 sweeps: standard error 0.02, failure below 1e-3."""
    assert 0.87 < widths_covered(FEW, 120)[0] < 0.995
