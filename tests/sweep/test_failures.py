import numpy as np
import pytest
from scipy import stats

from halfulp.sweep.failures import Failures


@pytest.mark.parametrize(("failed", "runs"), [(0, 3), (0, 29), (1, 3), (2, 7), (18, 188), (5, 5)])
def test_each_bound_is_the_exact_one_at_95_percent(failed, runs):
    found = Failures(failed, runs)
    # Two-sided at 90 %: each side at 95 %.
    exact = stats.binomtest(failed, runs).proportion_ci(0.9, method="exact")
    assert (found.lower, found.upper) == pytest.approx((exact.low, exact.high))
    assert found.share == failed / runs


@pytest.mark.parametrize(
    ("runs", "at_least"), [(3, 0.37), (5, 0.55), (8, 0.69), (14, 0.81), (29, 0.90)]
)
def test_no_failure_is_no_proof(runs, at_least):
    assert 1 - Failures(0, runs).upper == pytest.approx(at_least, abs=0.005)


@pytest.mark.parametrize("runs", [3, 9])
def test_whatever_the_truth_the_bound_holds_19_times_in_20(runs):
    k = np.arange(runs + 1)
    upper = np.array([Failures(int(failed), runs).upper for failed in k])
    lower = np.array([Failures(int(failed), runs).lower for failed in k])
    least_upper = least_lower = 1.0
    for p in np.linspace(0.001, 0.999, 200):
        chance = stats.binom.pmf(k, runs, p)
        least_upper = min(least_upper, chance[upper >= p].sum())
        least_lower = min(least_lower, chance[lower <= p].sum())
    # At least 95 % everywhere, and not more than that somewhere.
    assert 0.95 - 1e-9 <= least_upper < 0.96
    assert 0.95 - 1e-9 <= least_lower < 0.96


def test_lost_runs_count_neither_way_and_both_cases_are_told():
    found = Failures(1, 3) + Failures(0, 3, lost=2)
    assert (found.failed, found.runs, found.lost) == (1, 6, 2)
    assert found.best == Failures(1, 8)
    assert found.worst == Failures(3, 8)
    assert found.best.upper < found.upper < found.worst.upper


def test_without_runs_nothing_is_known():
    none = Failures(0, 0)
    assert (none.share, none.lower, none.upper) == (None, 0.0, 1.0)


def test_the_sentence_gives_the_bound():
    assert str(Failures(0, 5)) == "0 of 5 failed (at most 45 % at 95 % confidence)"
    assert str(Failures(0, 5, lost=1)).endswith("95 % confidence), 1 lost")
