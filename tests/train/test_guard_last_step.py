"""After the last update nothing is raised: the final loss is that of the precision that trained."""

import pytest

from halfulp.run import Run
from halfulp.train.drill import faults_of
from halfulp.train.loop import train

FOUND = 26  # a scale that is stuck from step 22 on is found after five steps


@pytest.mark.parametrize(("steps", "raised"), [(FOUND, False), (FOUND + 1, True)])
def test_a_unit_is_raised_only_if_a_step_is_left(make_config, steps, raised):
    config = make_config(policy={"recipe": "te_delayed"}, train={"steps": steps})
    train(config, faults=[faults_of(config)["stale-scale"](FOUND - 4)])
    run = Run.open(config.run.out, writer=False)
    incidents = [(e["step"], e["action"]) for e in run.events("guard")]
    told = [(e["step"], e["rule"]) for e in run.events("signal") if e["rule"] == "stale"]
    assert incidents == ([(FOUND, "raise")] if raised else [])
    assert told == ([] if raised else [(FOUND, "stale")])
