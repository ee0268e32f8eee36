"""Learning rates and batches, the first laws, and what serving does to the size."""

import pytest

from halfulp.errors import PlanError
from halfulp.plan import kaplan
from halfulp.plan.chinchilla import chinchilla
from halfulp.plan.inference import cheapest, serve_optimal, total_flops
from halfulp.plan.rates import between, deepseek, steplaw


def test_golden_rates_and_batches():
    step, deep = steplaw(1e9, 1e11), deepseek(6e20)
    assert (step.lr, step.batch_tokens) == pytest.approx((1.632e-3, 1.108e6), rel=4e-4)
    assert (deep.lr, deep.batch_tokens) == pytest.approx((7.881e-4, 1.828e6), rel=4e-4)
    lr, batch = between((step, deep))
    assert deep.lr < lr < step.lr
    assert step.batch_tokens < batch < deep.batch_tokens
    assert lr**2 == pytest.approx(step.lr * deep.lr)


@pytest.mark.parametrize(("served", "n"), [(0.0, 2.944e10), (1e12, 1.967e10), (1e13, 1.136e10)])
def test_golden_sizes_of_models_to_be_served(served, n):
    law = chinchilla("epoch")
    target = law.loss(*law.allocate(1e23))
    assert target == pytest.approx(2.0321, abs=5e-5)
    found, d = cheapest(law, target, served)
    assert found == pytest.approx(n, rel=3e-4)
    assert law.loss(found, d) == pytest.approx(target, rel=1e-12)
    for factor in (0.97, 1.03):
        left = target - law.E - law.A / (factor * found) ** law.alpha
        other = total_flops(factor * found, (law.B / left) ** (1 / law.beta), served)
        assert other > total_flops(found, d, served)


@pytest.mark.parametrize("served", [1e10, 1e12, 1e14])
def test_both_ways_to_a_served_model_agree(served):
    law = chinchilla("epoch")
    n, d = cheapest(law, 2.1, served)
    flops = 6 * n * d
    found = serve_optimal(law.loss, flops, served, law.allocate(flops)[0])
    assert found == pytest.approx((n, d), rel=1e-5)
    assert found[0] < law.allocate(flops)[0]


def test_an_unreachable_balance_is_refused():
    law = chinchilla("epoch")
    with pytest.raises(PlanError, match="served tokens"):
        serve_optimal(law.loss, 1e21, 1e60, law.allocate(1e21)[0])


def test_kaplan_is_consistent_with_its_limits():
    assert kaplan.loss(1e9, 1e30) == pytest.approx(kaplan.loss_of_parameters(1e9), rel=0.03)
    assert kaplan.loss(1e30, 1e10) == pytest.approx(kaplan.loss_of_tokens(1e10), rel=0.06)
    assert kaplan.loss_of_compute(3.1e8 * kaplan.PF_DAY) == pytest.approx(1.0)
    assert kaplan.critical_batch_tokens(3.0) == pytest.approx(2e8 / 3**4.76)
