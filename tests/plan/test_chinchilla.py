"""Golden values, inverses and optima of the sums of powers."""

import numpy as np
import pytest

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import Chinchilla, chinchilla

NAMES = ("hoffmann", "hoffmann_tex", "epoch", "muennighoff")


@pytest.mark.parametrize(
    ("name", "large", "small"),
    [
        ("hoffmann", 1.93665, 2.58005),
        ("hoffmann_tex", 1.92084, 2.53054),
        ("epoch", 1.97388, 2.53005),
        ("muennighoff", 2.02460, 2.56464),
    ],
)
def test_losses_are_the_published_ones(name, large, small):
    law = chinchilla(name)
    assert law.loss(70e9, 1.4e12) == pytest.approx(large, rel=1e-5)
    assert law.loss(1e9, 2e10) == pytest.approx(small, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "flops", "n", "d", "per_parameter", "loss"),
    [
        ("epoch", 1e21, 2.778e9, 5.999e10, 21.6, 2.3055),
        ("epoch", 5.88e23, 7.302e10, 1.342e12, 18.4, None),
        ("epoch", 1e23, None, None, None, 2.0321),
        ("hoffmann", 5.88e23, 3.249e10, None, 92.8, None),
        ("hoffmann_tex", 5.88e23, 4.069e10, None, 59.2, None),
    ],
)
def test_optima_are_the_golden_ones(name, flops, n, d, per_parameter, loss):
    law = chinchilla(name)
    found_n, found_d = law.allocate(flops)
    found = (found_n, found_d, found_d / found_n, law.loss(found_n, found_d))
    for value, golden in zip(found, (n, d, per_parameter, loss), strict=True):
        if golden is not None:
            assert value == pytest.approx(golden, rel=3e-3 if golden == per_parameter else 2.5e-4)


def test_least_compute_for_a_loss_is_golden():
    law = chinchilla("epoch")
    flops = law.flops_for(2.2)
    assert flops == pytest.approx(3.918e21, rel=1e-4)
    assert law.allocate(flops) == pytest.approx((5.595e9, 1.167e11), rel=1e-4)
    assert law.exponent == pytest.approx(0.5126, abs=5e-5)


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_random_budgets_close(name):
    law = chinchilla(name)
    budgets = np.sort(10 ** np.random.default_rng(0).uniform(18, 26, 10_000))
    n, d = np.array([law.allocate(c) for c in budgets]).T
    best = law.loss(n, d)
    assert np.abs(6 * n * d / budgets - 1).max() < 1e-9
    assert (np.diff(n) > 0).all()
    assert (np.diff(d) > 0).all()
    assert (np.diff(best) < 0).all()
    for factor in (0.95, 1.05):
        moved = law.loss(n * factor, d / factor)
        assert (moved > best).all()
    back = np.array([law.flops_for(loss) for loss in best])
    assert np.abs(back / budgets - 1).max() < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_parameters_for_tokens_are_those_of_the_optimum(name):
    law = chinchilla(name)
    n, d = law.allocate(3e21)
    assert law.parameters_for(d) == pytest.approx(n, rel=1e-9)


def test_what_cannot_be_reached_or_spent_is_refused():
    law = chinchilla("epoch")
    for loss in (1.8172, 1.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="out of reach"):
            law.flops_for(loss)
    for flops in (0.0, -1e20, float("nan"), float("inf")):
        with pytest.raises(PlanError, match="cannot be spent"):
            law.allocate(flops)
    with pytest.raises(PlanError, match="no sum of powers"):
        chinchilla("steplaw")


def test_arrays_and_numbers_agree():
    law = Chinchilla(E=1.0, A=10.0, B=20.0, alpha=0.5, beta=0.25)
    n, d = np.array([1e4, 1e6]), np.array([1e8, 1e4])
    assert law.loss(n, d).tolist() == [law.loss(1e4, 1e8), law.loss(1e6, 1e4)]
    assert law.loss(1e4, 1e8) == pytest.approx(1.0 + 0.1 + 0.2)
