import json

import pytest

from halfulp.guard.budget import LEAST_WITHHELD, Budget, Spent


def test_a_few_steps_may_be_withheld_of_any_run_and_no_more():
    spent = Spent(withheld=LEAST_WITHHELD)
    assert spent.exceeded(Budget(), steps=50) is None
    spent.withheld += 1
    over = spent.exceeded(Budget(), steps=50)
    assert over is not None
    assert (over.budget, str(over)) == ("wasted", "21 steps were withheld, and guard.wasted = 0.05")
    assert spent.exceeded(Budget(wasted=over.enough or 0.0), steps=50) is None


def test_the_share_counts_in_long_runs():
    spent = Spent(withheld=51)
    assert spent.exceeded(Budget(wasted=0.05), steps=1000) is not None
    assert spent.exceeded(Budget(wasted=0.05), steps=1100) is None


def test_the_first_rollback_is_free_and_the_second_is_booked():
    spent = Spent()
    assert spent.cannot_replay(Budget(), steps=200, step=150, more=149) is None
    spent.rollbacks, spent.replayed = [150], 149.0
    over = spent.cannot_replay(Budget(), steps=200, step=180, more=50)
    assert over is not None
    assert over.budget == "wasted"
    assert str(over) == "199 of 200 steps would be wasted (guard.wasted = 0.05)"
    assert over.enough == 1.0
    assert spent.cannot_replay(Budget(wasted=1.0), steps=200, step=180, more=50) is None
    hopeless = spent.cannot_replay(Budget(wasted=1.0), steps=200, step=180, more=52)
    assert hopeless is not None
    assert hopeless.enough is None


@pytest.mark.parametrize(("step", "refused"), [(9_000, True), (10_099, True), (10_100, False)])
def test_rollbacks_are_counted_within_ten_thousand_steps(step, refused):
    spent, budget = Spent(rollbacks=[100, 200]), Budget(rollbacks=2, wasted=1.0)
    over = spent.cannot_replay(budget, steps=100_000, step=step, more=10)
    assert (over is not None) == refused
    if over is not None:
        assert (over.budget, over.enough) == ("rollbacks", 4)


def test_what_is_enough_allows_twice_as_much_and_is_no_more_than_all():
    over = Spent(withheld=60).exceeded(Budget(), steps=1000)
    assert over is not None
    assert over.enough == 0.12


def test_attributions_are_free_at_first():
    assert Spent(passes=50).may_attribute(Budget(), steps=10)
    assert not Spent(passes=51).may_attribute(Budget(), steps=10)
    assert Spent(passes=199).may_attribute(Budget(attribution=0.02), steps=10_000)
    assert not Spent(passes=201).may_attribute(Budget(attribution=0.02), steps=10_000)


def test_the_state_survives_json_and_is_a_copy():
    spent = Spent(1.0, 2.0, 3.5, skipped=4, rollbacks=[5])
    state = spent.state()
    spent.rollbacks.append(6)
    again = Spent()
    again.load(json.loads(json.dumps(state)))
    assert again == Spent(1.0, 2.0, 3.5, skipped=4, rollbacks=[5])
