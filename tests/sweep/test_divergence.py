import math
from typing import Any

import pytest

from halfulp.sweep.divergence import (
    FAR,
    NONFINITE,
    STOPPED,
    UNIGRAM,
    UNRECOVERED,
    reason_of,
    score_nats,
)
from halfulp.sweep.result import Result

HEALTHY: dict[str, Any] = {
    "status": "finished", "loss_nats": 2.4, "tail_nats": 2.35, "best_nats": 2.3,
    "initial_nats": 5.5, "unigram_nats": 3.2,
}  # fmt: skip


def result(**fields: Any) -> Result:
    return Result(id="x", recipe="r", lr=1e-3, seed=0, data="d", **(HEALTHY | fields))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, ""),
        ({"loss_nats": math.nan}, NONFINITE),
        ({"loss_nats": math.inf}, NONFINITE),
        ({"status": "nonfinite", "loss_nats": 2.3}, NONFINITE),
        ({"status": "stopped"}, STOPPED),
        ({"tail_nats": 2.61}, UNRECOVERED),
        ({"tail_nats": 2.59}, ""),
        ({"loss_nats": 2.81}, FAR),
        ({"loss_nats": 2.79}, ""),
        ({"loss_nats": 2.7, "unigram_nats": 2.7}, UNIGRAM),
        ({"loss_nats": 2.7, "unigram_nats": 2.71}, ""),
        ({"status": "died"}, ""),
        ({"status": "stalled", "loss_nats": math.nan}, ""),
        ({"status": "refused"}, ""),
    ],
)
def test_reason(fields, reason):
    assert reason_of(result(**fields), reference_nats=2.3) == reason


def test_what_is_not_known_is_no_reason():
    unknown = result(tail_nats=math.nan, best_nats=math.nan, unigram_nats=math.nan)
    assert reason_of(unknown) == ""
    assert reason_of(result(loss_nats=3.1)) == ""  # no reference to be far from


@pytest.mark.parametrize(
    ("fields", "score"),
    [
        ({}, 2.4),
        ({"loss_nats": 9.0}, 5.5),
        ({"loss_nats": math.nan}, 5.5),
        ({"status": "nonfinite", "loss_nats": 2.3}, 5.5),
        ({"status": "stopped", "loss_nats": 2.3}, 5.5),
        ({"status": "nonfinite", "initial_nats": math.nan}, 5.6),
        ({"loss_nats": 9.0, "initial_nats": math.nan}, 5.6),
    ],
)
def test_a_run_without_a_loss_has_learned_nothing(fields, score):
    assert score_nats(result(**fields), initial_nats=5.6) == score


@pytest.mark.parametrize("status", ["died", "stalled", "refused"])
def test_lost_and_refused_runs_have_no_score(status):
    assert math.isnan(score_nats(result(status=status), initial_nats=5.6))


def test_a_loss_counts_where_no_initial_one_is_known():
    assert score_nats(result(initial_nats=math.nan)) == 2.4
    assert math.isnan(score_nats(result(status="nonfinite", initial_nats=math.nan)))
