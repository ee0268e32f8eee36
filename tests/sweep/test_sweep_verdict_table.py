"""The verdict on whole tables: made up ones, and ones with any runs missing, lost or broken."""

import itertools
import math
import random

import pytest
import sweeps

from halfulp.sweep.design import Design
from halfulp.sweep.inputs import Inputs
from halfulp.sweep.money import money
from halfulp.sweep.result import STATUSES, Result
from halfulp.sweep.table import Table
from halfulp.sweep.verdict import verdicts

LRS = (1e-3, 4e-3, 1.6e-2)
ABOVE = {"bf16_amp": 0.0, "te_current": 0.002, "fp8_unscaled": 0.3}
INPUTS = Inputs(gpu_hours=100, gpu="H100", tokens=1e9)


@pytest.fixture(scope="module")
def design(corpus) -> Design:
    return sweeps.design_of(corpus, recipes=list(ABOVE), lrs=LRS, seeds=6)


def result(cell, **more) -> Result:
    loss = 2.5 + 0.5 * abs(math.log(cell.lr / 4e-3)) + 0.01 * cell.seed
    loss += ABOVE[cell.recipe] + 0.0005 * math.sin(7 * cell.seed + 3 * len(cell.recipe))
    facts = {
        "status": "finished",
        "steps": 100,
        "planned_steps": 100,
        "tokens": 50_000,
        "loss_nats": loss,
        "initial_nats": 5.5,
        "tail_nats": loss,
        "best_nats": loss,
        "unigram_nats": 4.0,
    }
    place = {"recipe": cell.recipe, "lr": cell.lr, "seed": cell.seed, "data": cell.data}
    return Result(id=cell.id, **place, **(facts | more))


def test_a_harmless_and_a_harmful_recipe(design):
    table = Table(design, tuple(result(cell) for cell in design.cells()))
    harmless, harmful = table.verdict(bar_nats=0.01).splitlines()
    assert harmless.startswith("te_current: pass, loss +0.002 nats [")
    assert harmful.startswith("fp8_unscaled: fail, loss +0.3")
    assert "0 of 6 failed" in harmless
    paid = table.verdict(0.01, INPUTS).splitlines()[0]
    assert "of bf16_amp's cost at r = " in paid
    assert "evidence covers 0.005 % of your run" in paid


def test_a_refused_recipe(design):
    def made(cell):
        refused = {"status": "refused", "message": "no such layer", "loss_nats": math.nan}
        return result(cell, **(refused if cell.recipe == "fp8_unscaled" else {}))

    table = Table(design, tuple(made(cell) for cell in design.cells()))
    assert table.verdict().splitlines()[1] == (
        "fp8_unscaled: could not tell, the model cannot take it: no such layer"
    )
    assert [cost.recipe for cost in money(table, INPUTS).costs] == ["bf16_amp", "te_current"]


def test_a_refused_reference_leaves_nothing_to_compare_with(design):
    def made(cell):
        refused = {"status": "refused", "message": "no such layer", "loss_nats": math.nan}
        return result(cell, **(refused if cell.recipe == "bf16_amp" else {}))

    table = Table(design, tuple(made(cell) for cell in design.cells()))
    found = verdicts(table, money(table, INPUTS))
    assert {v.status for v in found} == {"could not tell"}
    assert "no learning rate is known that suits" in found[0].sentence


def test_nothing_that_a_sweep_can_come_to_breaks_the_verdict(design):
    chance = random.Random(3)
    statuses = [status for status in STATUSES if status != "refused"]
    for share, trial in itertools.product((0.0, 0.03, 0.2, 0.6, 1.0), range(6)):
        cells = [cell for cell in design.cells() if chance.random() < share]
        odd = {"status": chance.choice(statuses), "loss_nats": math.nan, "steps": 30}
        results = [result(c, **(odd if chance.random() < trial / 5 else {})) for c in cells]
        table = Table(design, tuple(results))
        found = verdicts(table, money(table, INPUTS))
        assert [v.recipe for v in found] == ["te_current", "fp8_unscaled"]
        for verdict in found:
            assert verdict.status in ("pass", "fail", "could not tell")
            assert verdict.status != "pass" or len(results) > 10
            assert "nan" not in verdict.sentence + " ".join(verdict.changes)
            assert "inf" not in verdict.sentence + " ".join(verdict.changes)
