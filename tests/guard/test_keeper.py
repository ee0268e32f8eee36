"""The keeper: which answer, how high, at what cost, and when it stops; on a scripted host."""

import json
import math
from collections.abc import Collection
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from halfulp.blocks import BlockMap, block_map
from halfulp.guard.attribute import DATA, HARDWARE, PRECISION, STATE
from halfulp.guard.budget import Budget
from halfulp.guard.host import ALL, Pass
from halfulp.guard.incident import BACK, LOWER, RAISE, RETRY, SKIP, STOP, Incident
from halfulp.guard.keeper import Keeper
from halfulp.guard.ladder import LOCK, Ladder
from halfulp.policy import Policy

FFN = "layers.1.ffn"


@cache
def blocks() -> BlockMap:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        shape = LlamaConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=6, num_attention_heads=4,
            intermediate_size=64,
        )  # fmt: skip
        return block_map(LlamaForCausalLM(shape))


class Host:
    """Replays are healthy but for what the script says: by what is in fp32, "" for as it is."""

    deterministic = True

    def __init__(self, units: tuple[str, ...]) -> None:
        self.units = units
        self.script: dict[str, Pass] = {}
        self.applied: list[Policy] = []
        self.skipped: list[tuple[int, int]] = []
        self.restored: list[int] = []

    def healthy(self, loss: float = 2.0, norm: float = 1.0, error: float = 0.05) -> Pass:
        each = dict.fromkeys(self.units, 0.3)
        differences = dict.fromkeys(self.units, error * 0.3)
        return Pass(loss, norm, each, differences, dict.fromkeys(self.units, 0.99))

    def replay(self, off: Collection[str] = (), *, fresh: int = 0, **_: Any) -> Pass:
        key = "fresh" if fresh else "reference" if tuple(off) == ALL else "".join(off)
        return self.script.get(key, self.healthy())

    def differing_unit(self) -> str:
        return FFN

    def broken_unit(self) -> str:
        return FFN

    def capture(self):
        return {}, {}

    def restore(self, snapshot) -> None:
        self.restored.append(snapshot.step)

    def apply(self, policy: Policy) -> None:
        self.applied.append(policy)

    def skip(self, first: int, last: int) -> int:
        self.skipped.append((first, last))
        return last - first + 1


class Scene:
    """A run of 2000 steps under te_delayed, healthy for its first `steps`."""

    def __init__(self, steps: int = 400, recipe: str = "te_delayed", **budget: Any) -> None:
        ladder = Ladder(Policy.from_recipe(recipe), blocks())
        self.host, self.booked = Host(ladder.units.names), list[Incident]()
        self.keeper = Keeper(self.host, ladder, 2000, Budget(**budget), self.booked.append)
        self.keeper.begin(0)
        self.run(1, steps)

    def run(self, first: int, last: int) -> None:
        for step in range(first, last + 1):
            wave = 0.02 * math.sin(step)
            self.keeper.accept(step, self.host.healthy(2 + wave, 1 + wave))
            self.keeper.keep(step)

    def meet(self, step: int, seen: Pass, **script: Pass) -> Incident:
        """The guard's answer to a step like this, with these replays."""
        self.host.script = script
        trigger = self.keeper.judge(step, seen)
        assert trigger is not None
        return self.keeper.respond(trigger, seen)

    def meet_data(self, step: int) -> Incident:
        bad = self.host.healthy(6.0, 9.0)
        return self.meet(step, bad, **{"": bad, "reference": bad})

    def meet_state(self, step: int) -> Incident:
        bad = self.host.healthy(6.0, 9.0)
        return self.meet(step, bad, **{"": bad, "reference": bad, "fresh": bad})

    def meet_precision(self, step: int, unit: str = FFN) -> Incident:
        bad = self.host.healthy(6.0, 9.0)
        others = dict.fromkeys(self.host.units, bad) | {unit: self.host.healthy()}
        reference = self.host.healthy()
        apart = {**reference.differences, unit: 0.1}
        reference = replace(reference, differences=apart)
        return self.meet(step, bad, **{"": bad, "reference": reference, **others})


def test_a_healthy_run_has_no_incident_and_its_snapshots_are_good():
    scene = Scene()
    assert scene.keeper.judge(401, scene.host.healthy(2.02)) is None
    assert scene.booked == []
    ring = {s.step: s.good for s in scene.keeper.ring.snapshots}
    assert ring[350]
    assert not ring[400]


def test_bad_data_is_skipped_and_nothing_else_is_done():
    scene = Scene()
    found = scene.meet_data(401)
    assert (found.verdict.kind, found.level, found.action, found.step) == (DATA, 1, SKIP, 400)
    assert scene.host.skipped == [(401, 401)]
    assert scene.host.restored == scene.host.applied == []
    assert found.cost == {"withheld": 1, "passes": 3, "replayed": 0}
    assert scene.keeper.spent.skipped == 1


def test_a_bad_state_goes_back_further_each_time():
    scene = Scene(wasted=0.2)
    first = scene.meet_state(401)
    assert (first.verdict.kind, first.level, first.action, first.step) == (STATE, 1, BACK, 350)
    assert scene.host.restored == [350]
    assert scene.host.skipped == []
    assert first.cost["replayed"] == 50
    scene.run(351, 405)
    second = scene.meet_state(406)
    assert (second.level, second.action, second.step) == (2, BACK, 300)
    assert scene.host.skipped == [(401, 426)]
    assert scene.keeper.factors(300) == {}


def test_rollbacks_end_with_the_budget_of_wasted_steps():
    scene = Scene()
    assert scene.meet_state(401).action == BACK
    scene.run(351, 405)
    stopped = scene.meet_state(406)  # 2 withheld and 155 replayed, of 100 that may be wasted
    assert (stopped.action, stopped.exceeded.budget) == (STOP, "wasted")
    assert scene.host.restored == [350]


def test_the_third_answer_lowers_the_learning_rates_and_warms_them_up():
    scene = Scene(wasted=1.0)
    for _ in range(3):
        last = scene.keeper.ring.snapshots[-1].step
        scene.run(last + 1, 400)
        found = scene.meet_state(401)
    assert (found.level, found.action) == (3, BACK)
    slowed = scene.keeper.factors(found.step)
    assert set(slowed) == set(scene.host.units)  # no unit has grown apart: all are
    assert set(slowed.values()) == {0.7 / 100}
    assert set(scene.keeper.factors(found.step + 500).values()) == {0.7}
    scene.run(found.step + 1, 400)
    fourth = scene.meet_state(401)
    assert fourth.level == 4
    assert fourth.raised == {"*": "bf16_amp"}
    assert scene.host.applied[-1] == Policy.from_recipe("bf16_amp")
    scene.run(fourth.step + 1, 400)
    fifth = scene.meet_state(401)
    assert (fifth.level, fifth.action) == (5, STOP)


def test_trouble_at_another_place_begins_at_the_first_rung():
    scene = Scene(wasted=1.0)
    assert scene.meet_state(401).level == 1
    scene.run(351, 700)
    assert scene.meet_state(701).level == 1


def test_guilty_precision_is_raised_and_the_batch_repeated():
    scene = Scene()
    found = scene.meet_precision(401)
    assert (found.verdict.kind, found.verdict.units) == (PRECISION, (FFN,))
    assert (found.action, found.step) == (RETRY, 400)
    assert found.raised[FFN].endswith("te_current")
    assert scene.keeper.ladder.stands[FFN].lock_until == 401 + LOCK
    assert len(scene.host.applied) == 1
    assert scene.host.restored == scene.host.skipped == []


def test_too_many_raised_units_make_the_whole_model_fall_back():
    scene = Scene(raised=0.1, wasted=1.0, recipe="mask_e8m1")
    ffns = [f"layers.{i}.ffn" for i in range(6)]
    actions = []
    for i, unit in enumerate(ffns):
        step = 401 + 10 * i
        actions.append(scene.meet_precision(step, unit))
        if scene.keeper.ladder.fallback:
            break
        scene.run(step, step + 9)
    # 6 layers have 25 units with a GEMM: the third is more than a tenth of them.
    assert len(actions) == 3
    assert actions[-1].action == BACK
    assert actions[-1].raised == {"*": "bf16_amp"}


def test_a_result_that_does_not_repeat_is_tried_again_and_the_fourth_time_stops():
    scene, incidents = Scene(), []
    for step in (401, 402, 403, 404):
        bad = scene.host.healthy(6.0, 9.0)
        incidents.append(scene.meet(step, bad))
        scene.run(step, step)
    assert {i.verdict.kind for i in incidents} == {HARDWARE}
    assert [i.action for i in incidents] == [RETRY, RETRY, RETRY, STOP]
    assert incidents[0].verdict.units == (FFN,)


def test_no_more_than_the_budget_of_rollbacks():
    scene = Scene(rollbacks=1, wasted=1.0)
    assert scene.meet_state(401).action == BACK
    scene.run(351, 700)
    stopped = scene.meet_state(701)
    assert stopped.action == STOP
    assert stopped.exceeded.budget == "rollbacks"
    assert stopped.exceeded.enough == 2
    assert "guard.rollbacks = 1" in stopped.done[-1]


def test_attribution_ends_with_its_budget_and_the_answer_is_to_skip():
    scene = Scene(attribution=0.001)
    scene.keeper.spent.passes = 51
    found = scene.meet_state(401)
    assert (found.verdict.kind, found.action) == ("could not tell", SKIP)
    assert found.cost["passes"] == 0


def test_a_numeric_finding_raises_without_withholding_anything():
    scene = Scene()
    signals = {"stale of it": 9.0}
    found = scene.keeper.check(400, {FFN: 4.5}, backward=False, signals=signals)
    assert (found.trigger.kind, found.action, found.level) == ("numeric", RAISE, 0)
    assert found.trigger.evidence == signals
    assert found.raised == {FFN: "te_delayed_forward_te_current"}
    assert found.cost["withheld"] == 0
    assert {s.step for s in scene.keeper.ring.snapshots} >= {350, 400}
    top = Scene(recipe="fp32")
    assert top.keeper.check(400, {FFN: 4.5}) is None


def test_a_lock_that_has_run_out_brings_a_unit_down_if_its_gradient_holds():
    scene = Scene(wasted=1.0)
    scene.meet_precision(401)
    scene.host.script = {}
    scene.run(401, 400 + LOCK)
    assert scene.keeper.descend(400 + LOCK) is None
    scene.run(401 + LOCK, 401 + LOCK)
    found = scene.keeper.descend(401 + LOCK)
    assert (found.action, found.trigger.kind, found.cost["passes"]) == (LOWER, "lock", 6)
    assert scene.keeper.ladder.recipe_of(FFN) == "te_delayed"
    again = scene.meet_precision(402 + LOCK)  # on probation: raised for good
    assert again.raised
    assert scene.keeper.ladder.stands[FFN].permanent


def test_a_unit_whose_gradient_would_not_hold_stays():
    scene = Scene(wasted=1.0)
    scene.meet_precision(401)
    scene.run(401, 401 + LOCK)
    scene.host.script = {"fresh": scene.host.healthy(error=0.9)}
    before = scene.keeper.ladder.recipe_of(FFN)
    found = scene.keeper.descend(401 + LOCK)
    assert (found.action, found.raised) == (LOWER, {})
    assert scene.keeper.ladder.recipe_of(FFN) == before
    assert scene.keeper.ladder.stands[FFN].lock_until == 401 + 2 * LOCK


def test_a_keeper_goes_on_from_its_state():
    scene, other = Scene(), Scene(0)
    scene.meet_precision(401)
    scene.meet_data(402)
    other.keeper.load(json.loads(json.dumps(scene.keeper.state())))
    assert other.keeper.state() == scene.keeper.state()
    assert other.keeper.ladder.policy() == scene.keeper.ladder.policy()
    other.keeper.ring = scene.keeper.ring
    assert other.meet_data(410).fields() == scene.meet_data(410).fields()


@pytest.mark.parametrize("norm", [24.0, math.inf])
def test_a_weight_that_jumps_is_put_back_without_any_replay(norm):
    scene = Scene(0)
    name = "model.layers.1.mlp.down_proj.weight"
    for step in range(1, 401):
        scene.keeper.accept(step, Pass(2.0, 1.0, {}, weights={name: 3.0}))
        scene.keeper.keep(step)
    found = scene.meet(401, Pass(2.0, 1.0, {}, weights={name: norm}))
    assert (found.verdict.kind, found.verdict.units, found.action) == (STATE, (FFN,), BACK)
    assert (found.step, found.cost["passes"]) == (350, 0)
