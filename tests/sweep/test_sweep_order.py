import itertools
from dataclasses import replace

import pytest

from halfulp.sweep.design import Design, make_design
from halfulp.sweep.order import left_out, next_cell, seconds_of, spread_order
from halfulp.sweep.result import Result
from halfulp.train.config import TrainConfig

LRS = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]


def design(**options) -> Design:
    given = {"recipes": ["fp32", "te_current"], "lrs": LRS, "seeds": 2} | options
    return make_design(TrainConfig(), **given)


def result_of(cell, **facts) -> Result:
    known = {"status": "finished", "loss_nats": 1.0, "unigram_nats": 3.0, "wall_seconds": 5.0}
    same = {"id": cell.id, "recipe": cell.recipe, "lr": cell.lr}
    return Result(**same, seed=cell.seed, data=cell.data, **(known | facts))


def course(plan: Design, come_to=lambda cell: {}) -> list:
    """The cells in the order in which they run, one at a time."""
    results, order = [], []
    while (cell := next_cell(plan, results, {r.id for r in results})) is not None:
        order.append(cell)
        results.append(result_of(cell, **come_to(cell)))
    return order


@pytest.mark.parametrize("n", range(1, 20))
def test_the_spread_visits_every_place_once_in_ever_smaller_gaps(n):
    order = spread_order(n)
    assert sorted(order) == list(range(n))
    gaps = []
    for k in range(1, n + 1):
        ends = [-1, *sorted(order[:k]), n]
        gaps.append(max(b - a for a, b in itertools.pairwise(ends)))
    assert gaps == sorted(gaps, reverse=True)
    assert all(gap <= 2 * n / k + 2 for k, gap in enumerate(gaps, start=1))


def test_every_cell_runs_once_and_the_first_seed_comes_first():
    plan = design()
    order = course(plan)
    assert sorted(c.id for c in order) == sorted(c.id for c in plan.cells())
    assert [c.seed for c in order] == [0] * 10 + [1] * 10


def test_pairs_run_together_from_the_middle_of_the_rates():
    order = course(design())
    assert [(c.recipe, c.lr) for c in order[:2]] == [("fp32", 1e-2), ("te_current", 1e-2)]
    assert {c.lr for c in order[:6]} == {1e-2, order[2].lr, order[4].lr}
    assert len({c.lr for c in order[:10]}) == 5


def test_later_seeds_begin_at_the_best_rate_of_each_recipe():
    best = {"fp32": 1e-1, "te_current": 1e-3}
    order = course(design(), lambda c: {"loss_nats": 1.0 if c.lr == best[c.recipe] else 2.0})
    later = [c for c in order if c.seed == 1]
    for recipe, lr in best.items():
        rates = [c.lr for c in later if c.recipe == recipe]
        assert rates[0] == lr
        steps = [abs(LRS.index(rate) - LRS.index(lr)) for rate in rates]
        assert steps == sorted(steps)


@pytest.mark.parametrize(
    "failure", [{"status": "nonfinite", "loss_nats": float("nan")}, {"loss_nats": 3.0}]
)
def test_rates_at_which_every_run_has_failed_come_last(failure):
    """Not finished, or no better than a model without context."""
    order = course(design(seeds=3), lambda c: failure if c.lr == 1e-2 else {})
    assert [c.lr for c in order[-4:]] == [1e-2] * 4
    assert all(c.lr != 1e-2 for c in order[10:-4])


def test_a_refused_recipe_is_not_run_again():
    order = course(design(), lambda c: {"status": "refused"} if c.recipe == "te_current" else {})
    assert [c.recipe for c in order].count("te_current") == 1
    assert [c.recipe for c in order].count("fp32") == 10


def test_what_a_refused_recipe_leaves_out_is_neither_run_nor_done():
    plan = design()
    refused = {"status": "refused"}
    order = course(plan, lambda c: refused if c.recipe == "te_current" else {})
    results = [result_of(c, **(refused if c.recipe == "te_current" else {})) for c in order]
    never = left_out(plan, results)
    assert {c.id for c in order}.isdisjoint(c.id for c in never)
    assert len(order) + len(never) == len(plan.cells())
    assert [c.recipe for c in never] == ["te_current"] * 9
    assert left_out(plan, results[:1]) == []


def test_a_recipe_refused_on_one_data_set_runs_on_the_other():
    plan = design(data={"a": ["a.txt"], "b": ["b.txt"]}, lrs=LRS[:2])
    refused = {"status": "refused"}
    order = course(plan, lambda c: refused if (c.recipe, c.data) == ("te_current", "a") else {})
    assert [(c.recipe, c.data) for c in order].count(("te_current", "a")) == 1
    assert [(c.recipe, c.data) for c in order].count(("te_current", "b")) == 4


def test_a_taken_cell_is_not_given_twice():
    plan = design()
    taken: set[str] = set()
    while (cell := next_cell(plan, [], taken)) is not None:
        assert cell.id not in taken
        taken.add(cell.id)
    assert len(taken) == len(plan.cells())


def test_the_time_of_a_run_is_that_of_its_recipe():
    fp32, te = design().cells()[:2]
    done = [result_of(fp32, wall_seconds=s) for s in (1.0, 9.0, 2.0)]
    assert seconds_of([], "fp32") == 0.0
    assert seconds_of(done, "fp32") == 2.0
    assert seconds_of(done, "te_current") == 2.0
    assert seconds_of([*done, result_of(te, wall_seconds=30.0)], "te_current") == 30.0
    lost = replace(done[0], status="died", wall_seconds=100.0)
    assert seconds_of([*done, lost], "fp32") == 2.0
