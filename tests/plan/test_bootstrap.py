import numpy as np
import pytest
from lawful_runs import grid, truth
from threadpoolctl import threadpool_info, threadpool_limits

from halfulp.errors import PlanError
from halfulp.plan.bootstrap import bootstrap
from halfulp.plan.fit import fit
from halfulp.plan.next_run import next_run

FAR = 1e10, 2e11  # 10 times the largest size and length of the grid


@pytest.fixture(scope="module")
def boot():
    return bootstrap(fit(grid(0.003, 0)), 200)


def test_bands_have_the_width_of_the_scatter(boot):
    """The standard deviation of a is 0.0071 over seeds: an 80 % band is 2.56 times as wide."""
    a = boot.band(lambda law: law.exponent)
    assert a.low < a.value < a.high
    assert 0.008 < a.high - a.low < 0.036
    narrow = bootstrap(fit(grid(0.0003, 0)), 60).band(lambda law: law.exponent)
    assert narrow.high - narrow.low < 0.2 * (a.high - a.low)


def test_one_run_is_less_certain_than_the_law(boot):
    law, run = boot.loss(1e8, 2e9), boot.run_loss(1e8, 2e9)
    assert law.value == run.value
    assert 1.5 * (law.high - law.low) < run.high - run.low < 20 * (law.high - law.low)
    assert 0.003 < (run.high - run.low) / run.value < 0.012  # 2.56 × 0.003, ± half


def test_a_wider_level_holds_a_narrower_one(boot):
    half, most = boot.loss(*FAR, level=0.5), boot.loss(*FAR, level=0.95)
    assert most.low < half.low < half.high < most.high


def test_the_same_seed_gives_the_same_laws_and_another_others(boot):
    again, other = bootstrap(boot.fit, 20), bootstrap(boot.fit, 20, seed=1)
    np.testing.assert_array_equal(again.draws, boot.draws[:20])
    assert not np.array_equal(other.draws, again.draws)


def test_resamples_run_on_one_thread_of_linear_algebra(boot):
    """More of them wait for one another: a fit of five numbers then takes tens of times as long."""

    def threads(*_):
        pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
        return sorted({pool["num_threads"] for pool in pools})

    seen = []
    with threadpool_limits(2, user_api="blas"):
        bootstrap(boot.fit, 20, progress=lambda _: seen.append(threads()))
        after = threads()
    assert seen == [[1]] * 20
    assert after != [1]


def test_too_few_resamples_are_refused(boot):
    with pytest.raises(PlanError, match="20 or more"):
        bootstrap(boot.fit, 5)


def test_runs_that_cannot_be_resampled_are_refused():
    wanted = [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 2)]
    six = grid().where(np.isin(np.arange(42), [7 * i + j for i, j in wanted]))
    with pytest.raises(PlanError, match="too few to be resampled"):
        bootstrap(fit(six), 400)


def test_the_next_run_costs_no_more_than_asked_and_tells_something(boot):
    runs = boot.fit.runs
    best = next_run(boot)
    assert best.flops <= runs.flops.max() * (1 + 1e-9)
    assert 0.0 < best.doubt_after < 0.98 * best.doubt
    cheap = next_run(boot, float(runs.flops.max()) / 1000)
    assert cheap.flops <= runs.flops.max() / 1000
    assert cheap.doubt_after >= best.doubt_after


def test_the_next_run_helps_as_much_as_it_says(boot):
    """Trained in a simulation, it narrows the far loss; a repeated middle run does not."""
    best = next_run(boot)
    after = [_doubt_with(best.parameters, best.tokens, seed) for seed in range(4)]
    middle = [_doubt_with(1e8, 2e9, seed) for seed in range(4)]
    assert np.mean(after) < 0.97 * np.mean(middle)


def _doubt_with(n: float, d: float, seed: int) -> float:
    runs = grid(0.003, 0)
    noise = np.exp(0.003 * np.random.default_rng(seed).standard_normal(4))
    more = type(runs)(
        parameters=np.append(runs.parameters, [n] * 4), tokens=np.append(runs.tokens, [d] * 4),
        loss_nats=np.append(runs.loss_nats, truth().loss(n, d) * noise),
    )  # fmt: skip
    found = fit(more)
    target = truth().allocate(10 * float(runs.flops.max()))
    losses = np.log(bootstrap(found, 60).laws.loss(*target))
    return float(losses.std())


def test_no_run_for_too_little_compute(boot):
    with pytest.raises(PlanError, match="fewer than the smallest useful run"):
        next_run(boot, 1e9)


@pytest.mark.slow
def test_the_bands_hold_the_truth_as_often_as_they_say():
    """200 data sets: the standard error of a share of 0.8 is 0.028, so that 0.72 to 0.88 are 2.8.

    A right band fails with probability 0.5 %; bands half as wide hold the truth half of the time.
    """
    held = []
    for seed in range(200):
        boot = bootstrap(fit(grid(0.003, 1000 + seed)), 120, seed=seed)
        noise = np.exp(0.003 * np.random.default_rng(9000 + seed).standard_normal())
        held.append(
            (boot.band(lambda law: law.exponent).holds(truth().exponent),
             boot.loss(*FAR).holds(truth().loss(*FAR)),
             boot.run_loss(*FAR).holds(truth().loss(*FAR) * noise))
        )  # fmt: skip
    for share in np.mean(held, axis=0):
        assert 0.72 <= share <= 0.88, np.mean(held, axis=0)
