import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import halfulp
from halfulp.errors import RunError
from halfulp.guard.numeric import Numeric
from halfulp.guard.readings import Reading, readings_of, worst
from halfulp.guard.rules import rules, table
from halfulp.site import histories


def reading(rule, value, block="layers.0.ffn", place="here", backward=False):
    return Reading(rule, block, place, value, backward)


def levels(rule, values, numeric=None):
    """The level of the finding at each step, "" where there is none."""
    numeric = Numeric() if numeric is None else numeric
    found = [numeric.observe(step, [reading(rule, v)]) for step, v in enumerate(values, 1)]
    assert all(len(f) <= 1 for f in found)
    return [f[0].level if f else "" for f in found]


def test_a_rule_fires_above_its_threshold_and_not_at_it():
    for rule in rules().values():
        limits = [t for t in (rule.warn, rule.act) if t is not None]
        assert limits, rule.name
        at, above = [limits[-1]] * rule.window, [limits[-1] + 1] * rule.window
        assert set(levels(rule.name, [min(limits)] * rule.window)) == {""}, rule.name
        expected = "act" if rule.raises and rule.act is not None else "warn"
        assert levels(rule.name, above)[rule.needs - 1] == expected, rule.name
        assert rule.act is None or "act" not in levels(rule.name, at), rule.name


def test_only_what_more_precision_cures_asks_for_it():
    assert {r.failure for r in rules().values() if not r.raises} == {"F5", "F7", "F8", "F14"}
    assert levels("attention_logits", [2e4]) == ["warn"]
    assert Numeric().observe(1, [reading("attention_logits", 2e4)])[0].threshold == 1e4


def test_windows():
    assert levels("lost_updates", [0.6, 0, 0.6]) == ["", "", "act"]
    assert levels("lost_updates", [0.6, 0, 0, 0.6]) == [""] * 4
    assert levels("stale", [3.0, 3.0, 0.9, *[3.0] * 5]) == [""] * 7 + ["act"]
    # After an act the window starts anew.
    assert levels("stale", [3.0] * 10) == [*[""] * 4, "act"] * 2
    assert levels("gradient_noise", [0.6, 0.6]) == ["", "warn"]


def test_a_warning_is_given_once_until_it_is_quiet_again():
    assert levels("lost_updates", [0.2] * 4) == ["", "warn", "", ""]
    quiet = [0.2, 0.2, 0, 0, 0, 0.2, 0.2]
    assert levels("lost_updates", quiet) == ["", "warn", "", "", "", "", "warn"]
    assert levels("lost_updates", [0.2, 0.2, 0.6, 0.6]) == ["", "warn", "", "act"]


def test_blocks_and_directions_are_judged_apart():
    numeric = Numeric()
    for step in (1, 2, 3, 4):
        found = numeric.observe(
            step,
            [
                reading("stale", 3.0, backward=True),
                reading("stale", 1.0),
                reading("stale", 3.0, block="layers.1.ffn"),
            ],
        )
        assert found == []
    found = numeric.observe(5, [reading("stale", 3.0, backward=True), reading("stale", 3.0)])
    assert [(f.block, f.backward, f.level) for f in found] == [("layers.0.ffn", True, "act")]
    assert numeric.observe(6, [reading("stale", 3.0, block="layers.1.ffn")])[0].level == "act"


def test_looks_of_steps_that_a_rollback_undid_do_not_count():
    numeric = Numeric()
    assert levels("stale", [0.0, *[3.0] * 4], numeric) == [""] * 5
    for step in (2, 3, 4, 5):  # again
        assert numeric.observe(step, [reading("stale", 3.0)]) == []
    assert numeric.observe(6, [reading("stale", 3.0)])[0].level == "act"


def test_forget_drops_one_block():
    numeric = Numeric()
    for block in ("layers.0.ffn", "layers.1.ffn"):
        for step in (1, 2, 3, 4):
            numeric.observe(step, [reading("stale", 3.0, block=block)])
    numeric.forget("layers.0.ffn")
    assert numeric.observe(5, [reading("stale", 3.0)]) == []
    assert len(numeric.observe(5, [reading("stale", 3.0, block="layers.1.ffn")])) == 1


def test_state_survives_json_in_the_middle_of_a_window():
    values = [0.2, 0.2, 0.6, 0.6, 0.2, 0.2]
    whole = levels("lost_updates", values)
    for cut in range(len(values)):
        first, second = Numeric(), Numeric()
        start = levels("lost_updates", values[:cut], first)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert second.state_dict() == first.state_dict()
        rest = [
            second.observe(step + 1, [reading("lost_updates", values[step])])
            for step in range(cut, len(values))
        ]
        assert start + [f[0].level if f else "" for f in rest] == whole


def test_state_with_an_unknown_rule_is_refused():
    with pytest.raises(RunError, match="looks at gone"):
        Numeric().load_state_dict({"looks": [], "warned": [["gone", "head", False]]})


def test_nan_is_no_finding_and_infinity_is():
    assert levels("stale", [math.nan] * 5) == [""] * 5
    assert levels("stale", [math.inf] * 5) == ["", "", "", "", "act"]


def test_worst_keeps_one_reading_per_block_and_direction():
    rows = [reading("stale", v, place=str(v)) for v in (1.0, 3.0, 2.0)]
    assert worst([*rows, reading("stale", 0.5, backward=True)]) == [
        rows[1],
        reading("stale", 0.5, backward=True),
    ]


def test_readings_name_the_worst_operand_and_parameter():
    row = {"block": "layers.0.ffn", "n": 100.0, "amax": 1.0, "underflow_energy": 0.0}
    gemms = [
        {**row, "gemm": "a", "operand": "fprop.x", "format": "e4m3", "saturated": 0.1,
         "underflow": 0.2},
        {**row, "gemm": "b", "operand": "fprop.x", "format": "e4m3", "saturated": 0.3,
         "underflow": 0.1},
        {**row, "gemm": "c", "operand": "wgrad.g", "format": "e4m3@tensor:delayed(4)",
         "saturated": 0.2, "underflow": 0.0, "stale": 1.5},
        # A scale made for the tensor cannot be far off, whatever lies beyond it.
        {**row, "gemm": "d", "operand": "fprop.x", "format": "e2m1@1x16:nvfp4", "saturated": 0.9,
         "underflow": 0.0},
    ]  # fmt: skip
    optimizer = [
        {"block": "emb", "parameter": "t", "lost_updates": 0.4, "v_underflow": 0.5},
        {"block": "layers.0.ffn", "parameter": "p", "lost_updates": 0.6, "v_underflow": 0.1},
        {"block": "layers.0.ffn", "parameter": "q", "lost_updates": 0.5, "v_underflow": 0.2},
        {"block": "layers.0.ffn", "parameter": "q.bias", "lost_updates": 0.0, "v_underflow": 0.9},
    ]
    found = {
        (r.rule, r.block, r.backward): (r.place, r.value) for r in readings_of(gemms, optimizer)
    }
    ffn = "layers.0.ffn"
    assert found["saturation", ffn, False] == ("b fprop.x", 0.3)
    assert found["saturation", ffn, True] == ("c wgrad.g", 0.2)
    assert found["underflow", ffn, False] == ("a fprop.x", 0.2)
    assert found["stale", ffn, True] == ("c wgrad.g", 1.5)
    assert found["lost_updates", ffn, False] == ("p", 0.6)
    assert found["v_underflow", ffn, False] == ("q", 0.2)
    assert found["lost_updates", "emb", False] == ("t", 0.4)
    assert ("v_underflow", "emb", False) not in found
    assert ("stale", ffn, False) not in found


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))

    def forward(self, x):
        return self.mlp(x)


@pytest.fixture
def delayed():
    torch.manual_seed(0)
    policy = halfulp.Policy.from_recipe("te_delayed")
    model = Two().train()
    handle = halfulp.quantize(model, policy, hints={"mlp*": "layers.0.ffn"})
    return model, handle


def steps(model, handle, factors):
    """Train one step on inputs of each size; the stale ratio of the first fprop.x after each."""
    x, found = torch.randn(16, 8), []
    for step, factor in enumerate(factors):
        handle.set_step(step)
        model(x * factor).square().mean().backward()
        handle.end_step()
        rows = handle.stale()
        found.append(
            next(r["stale"] for r in rows if (r["operand"], r["gemm"][-1]) == ("fprop.x", "0"))
        )
    return found


def test_stale_is_the_growth_over_the_scale_in_force(delayed):
    first, *ratios = steps(*delayed, [1, 1, 3, 3, 1])
    assert 0 < first < 0.1  # no history yet: the scale is 1, and the largest value 448
    assert ratios == pytest.approx([1, 3, 1, 1 / 3], rel=1e-5)


def test_stale_equals_the_counter_and_covers_every_history(delayed):
    model, handle = delayed
    handle.count(True)
    steps(model, handle, [1])
    handle.counters()
    steps(model, handle, [2])
    counted = {(r["gemm"], r["operand"]): r["stale"] for r in handle.counters()}
    rows = handle.stale()
    assert {(r["gemm"], r["operand"]): r["stale"] for r in rows} == pytest.approx(counted, rel=1e-6)
    assert len(rows) == 6  # x, w and g of two linears, each shared by two GEMMs
    assert {r["block"] for r in rows} == {"layers.0.ffn"}


def test_stale_is_empty_without_delayed_scales_and_after_a_switch(delayed):
    model, handle = delayed
    assert handle.stale() == []
    steps(model, handle, [1])
    assert handle.stale()
    handle.switch(handle.resolution)
    assert handle.stale() == []
    handle.end_step()
    assert handle.stale() == []


def test_a_scale_that_is_stuck_is_found_after_five_steps_and_growth_is_not(delayed):
    model, handle = delayed
    numeric, x = Numeric(), torch.randn(64, 8)
    found = []
    for step in range(14):
        handle.set_step(step)
        model(x * (1.3**step if step < 6 else 1.3**6)).square().mean().backward()
        handle.end_step()
        found.append(numeric.observe(step, readings_of(handle.stale())))
        if step >= 6:  # the fault: the scale of one operand stays at a quarter of what it needs
            history, _ = histories(handle.sites)["layers.0.ffn.mlp.1/fprop_x"]
            history.scale = history.scale * 4
    assert [len(f) for f in found] == [0] * 11 + [1, 0, 0]
    (act,) = found[11]
    assert act.level == "act"
    assert act.place == "layers.0.ffn.mlp.1 fprop.x"
    assert 3.5 < act.value < 4.5


def test_the_document_shows_the_rules():
    text = (Path(__file__).parents[2] / "docs" / "signals.md").read_text(encoding="utf-8")
    assert table() in text, "print(halfulp.guard.rules.table()) is the table of docs/signals.md"
    assert all(f"`{name}`" in text for name in rules())
