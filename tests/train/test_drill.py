import json
import math
from dataclasses import replace

import pytest

from halfulp.cli import main
from halfulp.errors import ConfigError, RunError
from halfulp.guard.attribute import DATA, HARDWARE, PRECISION, STATE
from halfulp.run import Run
from halfulp.train import gates
from halfulp.train.config import load_config
from halfulp.train.drill import config_of_drill, drill
from halfulp.train.gates import Look

SPEC = ("bad-batch", "weight-x8", "stale-scale")


def toy(corpus, out, **sections):
    """A drill of 250 steps on a model with one layer, in the directory `out`."""
    train = {"steps": 250, "rows": 4, "lr": 0.01, "eval_every": 25, "eval_batches": 2}
    base = {
        "model": {"layers": 1, "hidden": 32},
        "data": {"source": [str(corpus)], "length": 32, "val_fraction": 0.1},
        "train": train | sections.pop("train", {}),
        "run": {"out": str(out)},
    }
    return config_of_drill(base | sections)


@pytest.fixture(scope="module")
def drilled(corpus, tmp_path_factory):
    """The report on the faults of the specification, and the runs in their order."""
    runs: list[str] = []
    config = toy(corpus, tmp_path_factory.mktemp("drill") / "toy")
    report = drill(config, SPEC, on_run=lambda name, steps: runs.append(name))
    return report, runs


def row(report, name):
    return next(r for r in report.rows if r.fault == name)


def met(row) -> dict[str, bool | None]:
    return {gate.asked: gate.passed for gate in row.gates}


def test_a_drill_trains_once_and_goes_on_from_there_with_each_fault(drilled):
    report, runs = drilled
    assert runs == ["fault-free", "bad-batch", "skipping", "weight-x8", "stale-scale"]
    assert [r.fault for r in report.rows] == list(SPEC)
    assert report.false_alarms == 0
    assert report.passed
    steps = [
        e["step"] for e in Run.open(row(report, "weight-x8").path, writer=False).events("step")
    ]
    assert steps[:150] == list(range(1, 151))
    assert steps[150:] == list(range(101, 251))  # rolled back by 50


def test_the_batch_of_a_bad_batch_is_as_if_it_had_been_skipped(drilled):
    found = row(drilled[0], "bad-batch")
    assert (found.delay, found.verdict, found.action) == (0, DATA, "skip")
    assert (found.withheld, found.replayed) == (1, 0)
    assert met(found)["parameters of a run that skips the batch"] is True
    skipping = drilled[0].path / "skipping"
    look = Look(
        151, 250, skipping, "finished", (), drilled[0].path / "fault-free", lambda: skipping
    )
    assert gates.same_as_clean(look).passed is False  # one batch does change the parameters


def test_a_corrupted_weight_is_named_and_undone(drilled):
    found = row(drilled[0], "weight-x8")
    assert found.delay in (0, 1)
    assert (found.verdict, found.units, found.action) == (STATE, ("layers.0.ffn",), "roll back")
    assert found.loss_gap == pytest.approx(0, abs=0.02)
    assert 1 <= found.replayed <= 60


def test_a_stale_scale_that_the_loss_hardly_shows_is_found_named_and_cured(drilled):
    found = row(drilled[0], "stale-scale")
    assert (found.trigger, found.verdict, found.units) == ("numeric", PRECISION, ("layers.0.ffn",))
    assert 0 < found.delay <= 25
    assert found.margin >= 5
    assert abs(found.loss_gap) <= 0.01
    counted = list(Run.open(found.path, writer=False).events("counters"))[-1]
    gemm = "layers.0.ffn.down_proj"
    inputs = [r for r in counted["gemms"] if (r["gemm"], r["operand"]) == (gemm, "fprop.x")]
    assert inputs[0]["saturated"] == 0


def test_the_report_is_plain_values(drilled):
    told = json.loads(json.dumps(drilled[0].to_dict()))
    assert told["passed"] is True
    assert [r["fault"] for r in told["rows"]] == list(SPEC)
    assert all(gate["passed"] for r in told["rows"] for gate in r["gates"])


def test_a_guard_that_sees_nothing_fails_the_drill(drilled):
    report = drilled[0]
    clean = report.path / "fault-free"
    look = Look(151, 250, clean, "finished", (), clean, lambda: clean)
    assert gates.noticed(25)(look).passed is False
    assert gates.verdict(DATA)(look).passed is False
    assert gates.named("")(look).passed is False
    assert gates.ahead(5)(look).passed is None
    assert gates.recovered_soon(0.02)(look).passed is None
    assert gates.ended("stopped")(look).passed is False
    missed = replace(report.rows[0], gates=(gates.noticed(25)(look),))
    assert not missed.passed
    assert not replace(report, rows=(missed,)).passed
    assert math.isnan(missed.margin)


def test_a_loss_that_does_not_come_back_fails_its_gate(drilled, monkeypatch):
    report = drilled[0]
    found, clean = row(report, "weight-x8").path, report.path / "fault-free"
    incidents = list(Run.open(found, writer=False).events("guard"))
    look = Look(151, 250, found, "finished", incidents, clean, lambda: clean)
    assert gates.recovered(0.01)(look).passed is True
    worse = {step: 1.0 + 0.03 * (step > 151) for step in range(25, 251, 25)}
    losses = {found: worse, clean: dict.fromkeys(worse, 1.0)}
    monkeypatch.setattr(gates, "held_out", losses.__getitem__)
    assert gates.recovered(0.01)(look).passed is False
    assert gates.recovered_soon(0.02)(look).passed is False
    assert gates.recovered_soon(0.04)(look).passed is True


@pytest.mark.parametrize(
    ("sections", "names", "message"),
    [
        ({"train": {"steps": 200}}, None, "too short for a drill.*Give 250 or more"),
        ({"guard": {"on": False}}, None, "guard.on = false"),
        ({}, ["weight-x9"], "Did you mean 'weight-x8'"),
        ({"policy": {"recipe": "te_current"}}, ["stale-scale"], "te_delayed"),
    ],
)
def test_what_cannot_be_drilled_is_refused_before_any_run(
    corpus, tmp_path, sections, names, message
):
    with pytest.raises(ConfigError, match=message):
        drill(toy(corpus, tmp_path / "out", **sections), names)
    assert not (tmp_path / "out").exists()


def test_a_drill_in_use_is_replaced_only_when_asked_and_only_a_drill(corpus, drilled, tmp_path):
    with pytest.raises(RunError, match="--force"):
        drill(toy(corpus, drilled[0].path), ["weight-x8"])
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match="holds more than a drill"):
        drill(toy(corpus, tmp_path), ["weight-x8"], force=True)
    assert (tmp_path / "thesis.tex").exists()


def test_the_default_drill_has_a_delayed_scale_and_quick_is_shorter():
    whole, quick = config_of_drill(), config_of_drill(quick=True)
    assert whole.policy.recipe == quick.policy.recipe == "te_delayed"
    assert quick.train.steps * quick.train.rows < whole.train.steps * whole.train.rows
    assert load_config(whole.to_dict()) == whole


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--faults", "weight-x9"), "Did you mean 'weight-x8'"),
        (("--set", "guard.on=false"), "a drill tests the guard"),
        (("--steps", "100"), "too short for a drill"),
    ],
)
def test_the_command_says_what_cannot_be_drilled(arguments, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as end:
        main(["guard", "drill", "--out", str(tmp_path / "out"), *arguments])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_the_quick_drill_passes_on_the_command_line(tmp_path, capsys):
    out, figures = tmp_path / "drill", tmp_path / "drill.json"
    with pytest.raises(SystemExit) as end:
        main(["guard", "drill", "--quick", "--out", str(out), "--json", str(figures)])
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    told = json.loads(figures.read_text())
    assert len(told["rows"]) == 9
    verdicts = {r["fault"]: r["verdict"] for r in told["rows"]}
    assert verdicts["noisy-gemm"] == verdicts["broken-gemm"] == HARDWARE
    assert "pass: 9 of 9 faults" in printed


@pytest.mark.slow
def test_without_the_guard_the_faults_cost_loss(corpus, tmp_path):
    config = toy(corpus, tmp_path / "drill")
    names = ["nan-batch", "lr-jump", "broken-gemm"]
    report = drill(config, names, unguarded=True)
    nan, jump, broken = report.rows
    assert report.passed
    assert nan.unguarded_gap == math.inf
    assert jump.unguarded_gap > 0.1 > abs(jump.loss_gap)
    assert broken.reason == "stopped"
    assert broken.unguarded_gap > 0.1
