import pytest

from halfulp.sweep.split import rounding_pairs
from tests.sweep.grids import Plan, table

LOSSES = {"fp32": 2.322, "mask_e8m2": 2.386, "mask_e8m2_nearest": 2.324}
PLAN = Plan(recipes=tuple(LOSSES))


def test_twins_differ_in_nothing_but_truncation():
    recipes = [
        "mask_e8m2", "mask_e8m2_stochastic", "mask_e8m3_nearest", "fp32", "mask_e8m2_nearest",
        "mask_e5m2:0.2+fp32", "own.toml",
    ]  # fmt: skip
    assert rounding_pairs(recipes) == [("mask_e8m2", "mask_e8m2_nearest")]
    assert rounding_pairs(["mask_e8m2_truncate", "mask_e8m2_nearest"]) == [
        ("mask_e8m2_truncate", "mask_e8m2_nearest")
    ]
    assert rounding_pairs(["fp32", "te_current"]) == []


def test_the_gap_is_the_sum_of_its_parts():
    found = table(PLAN, lambda c: {"loss_nats": LOSSES[c.recipe] + 0.1 * c.seed + 100 * c.lr})
    (split,) = found.splits()
    assert (split.truncate, split.nearest, split.lr) == ("mask_e8m2", "mask_e8m2_nearest", 1e-3)
    assert split.bias.value == pytest.approx(0.062)
    assert split.resolution.value == pytest.approx(0.002)
    assert split.total.value == pytest.approx(split.bias.value + split.resolution.value)
    assert split.bias_share == pytest.approx(0.062 / 0.064)


def test_a_gap_that_cannot_be_told_from_zero_has_no_shares():
    noise = {("mask_e8m2", 0): 0.2}
    found = table(PLAN, lambda c: {"loss_nats": 2.4 + noise.get((c.recipe, c.seed), 0.0)})
    (split,) = found.splits()
    assert split.total.value > 0
    assert split.bias_share is None


def test_a_pair_without_runs_is_left_out():
    assert table(PLAN, lambda c: None if "nearest" in c.recipe else {}).splits() == ()
    assert table(PLAN, lambda c: None).splits() == ()
