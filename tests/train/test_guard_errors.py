"""What the guard refuses, and that a stop says how to go on: with commands that work."""

import json
import re
import shlex
from pathlib import Path

import pytest
from test_guard_resume import GUARD, HEAD, assert_same

from halfulp.cli import main
from halfulp.errors import ConfigError, PolicyError, RunError, StoppedError
from halfulp.guard import ring
from halfulp.guard.faults import NoisyGemm, ScaledWeight
from halfulp.run import Run
from halfulp.train import checkpoint
from halfulp.train.config import load_config
from halfulp.train.loop import config_of, train

OPTIONS = {"steps": 84, "checkpoint_every": 10, "eval_every": 0, "count_every": 0}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"rollbacks": 0}, r"guard\.rollbacks = 0 is too small\. Give 1 or more"),
        ({"snapshots": 0}, r"guard\.snapshots = 0 is too small"),
        ({"snapshot_every": 0}, r"guard\.snapshot_every = 0 is too small"),
        ({"wasted": 0.0}, r"guard\.wasted = 0 cannot be used\. Give a finite number above 0"),
        ({"raised": 0.0}, r"guard\.raised = 0 cannot be used"),
        ({"raised": 1.5}, r"guard\.raised = 1\.5 cannot be used.*at most 1"),
        ({"attribution": -1.0}, r"guard\.attribution = -1 cannot be used"),
        ({"on": False, "rollbacks": 3}, r"guard\.rollbacks has no effect with guard\.on = false"),
        ({"on": False, "ladder": ["fp32"]}, r"guard\.ladder has no effect"),
        ({"rungs": ["fp32"]}, r"unknown key 'rungs' in section \[guard\]"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_with_its_cure(section, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"guard": section})


@pytest.mark.parametrize(
    ("ladder", "message"),
    [
        (["mxfp8", "te_curent"], "te_current"),
        (
            ["fp32", "bf16_amp"],
            "each rung must be better than the one before.*for example nvfp4_all",
        ),
        (["nvfp4", "fp32"], "'nvfp4' cannot be a rung.*Choose another recipe"),
        ([], "the guard's ladder is none"),
    ],
)
def test_a_ladder_that_is_none_is_refused_before_there_is_a_run(make_config, ladder, message):
    config = make_config(guard={"ladder": ladder})
    with pytest.raises(PolicyError, match=message):
        train(config)
    assert not Path(config.run.out).exists()


def test_a_policy_that_does_not_cover_the_model_is_refused_before_there_is_a_run(
    make_config, tmp_path
):
    file = tmp_path / "policy.toml"
    file.write_text('[[rule]]\nmatch = "layers.*"\nrecipe = "te_current"\n')
    config = make_config(policy={"file": str(file)})
    with pytest.raises(PolicyError, match=r"head|emb"):
        train(config)
    assert not Path(config.run.out).exists()


def test_a_ring_that_does_not_fit_is_refused_and_the_run_left_as_it_was(make_config, monkeypatch):
    config = make_config(train={"checkpoint_every": 4})
    monkeypatch.setattr(ring, "available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match=r"ring of 7 snapshots needs .* GiB.*guard\.on = false"):
        train(config)
    assert not Path(config.run.out).exists()
    monkeypatch.undo()
    path = train(config).path
    before = (path / "events.jsonl").read_bytes()
    monkeypatch.setattr(ring, "available_bytes", lambda: 2**20)
    with pytest.raises(ConfigError, match="ring of 7 snapshots"):
        train(config_of(path), resume=path, from_step=8)
    assert (path / "events.jsonl").read_bytes() == before
    assert checkpoint.steps_in(path / "checkpoints") == [8, 12]


def test_a_resume_with_another_ladder_or_without_the_guard_is_refused(make_config):
    path = train(make_config(train={"steps": 4})).path
    for section in ({"ladder": ["fp32"]}, {"on": False}, {"snapshots": 9}):
        with pytest.raises(RunError, match="another configuration"):
            train(make_config(train={"steps": 4}, guard=section), resume=path)


def test_budgets_are_no_part_of_what_a_run_is():
    plain = load_config({})
    larger = load_config({"guard": {"rollbacks": 99, "wasted": 1.0, "raised": 0.5}})
    other = load_config({"guard": {"snapshots": 9}})
    assert plain.digest() == larger.digest() != other.digest()


def two_breaks() -> tuple[ScaledWeight, ScaledWeight]:
    return ScaledWeight(70, HEAD, 30.0), ScaledWeight(80, HEAD, 30.0)


def test_a_stop_for_a_budget_gives_the_command_that_goes_on(make_config, monkeypatch):
    options = OPTIONS | {"steps": 105}  # the second rollback goes back to the beginning
    config = make_config("stopped", train=options, guard=GUARD | {"rollbacks": 1})
    with pytest.raises(StoppedError) as error:
        train(config, faults=two_breaks())
    said = str(error.value)
    path = Path(config.run.out)
    assert "it has rolled back 1 times (guard.rollbacks = 1)" in said
    command = f"halfulp train --resume {path} --set guard.rollbacks=2"
    assert said.endswith(command)
    assert Run.open(path).summary()["reason"] == "stopped"
    # As typed, but that the fault must be there again.
    from halfulp.train import loop

    run = loop.train
    monkeypatch.setattr(loop, "train", lambda *a, **k: run(*a, **k, faults=two_breaks()))
    assert code_of(shlex.split(command)[1:]) == 0
    assert config_of(path).guard.rollbacks == 2
    assert load_config(Run.open(path).config()).guard.rollbacks == 1
    starts = [e["budgets"]["rollbacks"] for e in Run.open(path).events("start")]
    assert starts == [1, 2]
    whole = make_config("whole", train=options, guard=GUARD | {"rollbacks": 2})
    run(whole, faults=two_breaks())
    assert_same(path, Path(whole.run.out), 105)


def code_of(words: list[str]) -> int:
    with pytest.raises(SystemExit) as end:
        main(words)
    return int(end.value.code or 0)


def test_a_stop_without_a_budget_gives_a_command_that_starts_anew(make_config):
    """Broken hardware that stays broken: nothing helps, and no number would."""
    config = make_config(train=OPTIONS | {"steps": 70}, guard=GUARD)
    broken = NoisyGemm(66, "model.layers.0.mlp.up_proj", error=1e4, lasting=True)
    with pytest.raises(StoppedError) as error:
        train(config, faults=(broken,))
    said = str(error.value)
    found = re.findall(r"halfulp train .*?(?=\. To go on|\.? *$|$)", said)
    assert found, said
    assert code_of(shlex.split(found[0])[1:]) == 0


def test_a_full_disk_at_a_rollback_leaves_every_checkpoint(make_config, monkeypatch):
    """The rollback's checkpoint cannot be written: the run ends, and goes on from before it."""
    whole = make_config("whole", train=OPTIONS, guard=GUARD)
    train(whole, faults=two_breaks()[:1])
    config = make_config("full", train=OPTIONS, guard=GUARD)
    path, write = Path(config.run.out), checkpoint._write

    def full(scratch, content):
        if any(e["action"] == "roll back" for e in Run.open(path, writer=False).events("guard")):
            raise OSError(28, "No space left on device")
        write(scratch, content)

    monkeypatch.setattr(checkpoint, "_write", full)
    with pytest.raises(RunError, match=r"cannot write the checkpoint .*No space left.*--resume"):
        train(config, faults=two_breaks()[:1])
    assert checkpoint.steps_in(path / "checkpoints")[-1] >= 60
    assert not (path / "checkpoints/dropped").exists()
    monkeypatch.undo()
    train(config_of(path), resume=path, faults=two_breaks()[:1])
    assert_same(path, Path(whole.run.out), 84)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--set", "guard.ladder=['fp32']"), "no other option can be given but --from-step"),
        (("--no-guard",), "with --set the budgets guard.rollbacks, guard.wasted"),
        (("--set", "guard.rollbacks=0"), "guard.rollbacks = 0 is too small"),
        (("--lr", "1"), "no other option can be given"),
    ],
)
def test_what_cannot_be_changed_on_a_resume(make_config, capsys, arguments, message):
    path = train(make_config(train={"steps": 1})).path
    assert code_of(["train", "--resume", str(path), *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flag", "on"), [((), True), (("--guard",), True), (("--no-guard",), False)]
)
def test_the_guard_is_on_unless_it_is_said(make_config, tmp_path, capsys, flag, on):
    source = make_config().data.source[0]
    words = ["train", "--model", "llama-tiny", "--steps", "1", "--data", source, *flag]
    words += ["--set", "train.rows=2", "--set", "data.length=32", "--set", "train.device=cpu"]
    assert code_of([*words, "--out", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    assert config_of(tmp_path / "new").guard.on is on
    summary = json.loads((tmp_path / "new/summary.json").read_text())
    assert ("guard" in summary) is on
