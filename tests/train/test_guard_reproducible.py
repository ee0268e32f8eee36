"""A step that gives other bits than its rehearsal is the hardware's."""

import pytest

from halfulp.guard.faults import NoisyGemm
from halfulp.run import Run
from halfulp.train import guard
from halfulp.train.loop import train


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(guard, "SHADOW", 10)


def incidents(path):
    return [(e["step"], e["trigger"], e["verdict"]) for e in Run.open(path).events("guard")]


def test_noise_that_no_threshold_sees_is_found_at_the_next_rehearsal(make_config, often):
    config = make_config(train={"steps": 24, "count_every": 0}, policy={"recipe": "te_current"})
    fault = NoisyGemm(5, module="model.layers.1.mlp.down_proj", error=1e-3, lasting=True)
    train(config, faults=(fault,))
    assert incidents(config.run.out) == [(21, "irreproducible", "hardware")]


def test_a_healthy_run_is_rehearsed_without_an_incident(make_config, often):
    config = make_config(train={"steps": 24, "count_every": 6}, policy={"recipe": "nvfp4_all"})
    train(config)
    assert all(trigger != "irreproducible" for _, trigger, _ in incidents(config.run.out))


def test_a_stage_that_begins_after_a_rehearsal_is_no_other_result(make_config, often):
    schedule = [{"until": 20 / 24, "recipe": "nvfp4_all"}]
    config = make_config(
        train={"steps": 24, "count_every": 0},
        policy={"recipe": "te_current", "schedule": schedule},
    )
    train(config)
    assert incidents(config.run.out) == []
