import math
from itertools import pairwise

import pytest

from halfulp.train.config import Stage, TrainSection
from halfulp.train.schedule import lr_at, stage_at, warmup_steps


def rates(**options) -> list[float]:
    train = TrainSection(lr=1.0, **options)
    return [lr_at(step, train) for step in range(train.steps)]


def test_warmup_counts_steps_from_one_on_and_a_share_below():
    assert warmup_steps(TrainSection(steps=100, warmup=0.05)) == 5
    assert warmup_steps(TrainSection(steps=100, warmup=30)) == 30
    assert warmup_steps(TrainSection(steps=100, warmup=0)) == 0


def test_warmup_rises_linearly_and_never_gives_zero():
    assert rates(steps=10, warmup=4, schedule="constant")[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]


def test_cosine_falls_to_its_floor_at_the_last_step():
    lr = rates(steps=101, warmup=0, min_lr=0.1)
    assert lr[0] == 1.0
    assert lr[50] == pytest.approx(0.55)
    assert lr[-1] == pytest.approx(0.1)
    assert lr == sorted(lr, reverse=True)


def test_wsd_is_constant_and_then_falls_linearly():
    lr = rates(steps=100, warmup=10, schedule="wsd", decay=0.2, min_lr=0.0)
    assert set(lr[9:81]) == {1.0}
    assert lr[90] == pytest.approx(9 / 19)
    assert lr[-1] == 0.0
    drops = [a - b for a, b in pairwise(lr[80:])]
    assert drops == pytest.approx([1 / 19] * 19)


def test_constant_stays_where_warmup_left_it():
    assert set(rates(steps=20, warmup=0, schedule="constant")) == {1.0}


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("warmup", [0.0, 0.5, 1.0])
def test_the_shortest_runs_have_positive_rates(schedule, steps, warmup):
    lr = rates(steps=steps, warmup=warmup, schedule=schedule)
    assert all(0 < value <= 1 and math.isfinite(value) for value in lr)


def test_stages_change_at_their_share_of_the_run():
    stages = (Stage(until=0.2, recipe="a"), Stage(until=0.5, recipe="b"))
    assert [stage_at(step, 10, stages) for step in range(10)] == [0] * 2 + [1] * 3 + [2] * 5
    assert stage_at(3, 10, ()) == 0
