"""`halfulp guard explain` and `halfulp guard map` on a real run with two faults, and beside it."""

import json
import math
import random
from pathlib import Path

import pytest
from transformers import logging

from halfulp.blocks import block_map
from halfulp.cli import main
from halfulp.cli.progress import Progress
from halfulp.guard.faults import ScaledWeight, StaleScale
from halfulp.guard.ladder import Ladder
from halfulp.policy import Policy
from halfulp.run import Run
from halfulp.train.config import TrainConfig, load_config
from halfulp.train.loop import train
from halfulp.train.model import outline
from halfulp.train.precision_map import precision_map
from halfulp.train.tree import merge

logging.set_verbosity_error()
logging.disable_progress_bar()

STALE, SCALED = 80, 110


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("guard")
    chance = random.Random(0)
    words = ["loss", "round", "off", "error", "step", "bit", "scale", "block", "norm", "head"]
    (folder / "text").mkdir()
    for i in range(24):
        text = " ".join(chance.choice(words) for _ in range(600))
        (folder / "text" / f"{i}.txt").write_text(text)
    return folder


def config(home: Path, name: str, **sections) -> TrainConfig:
    base = {
        "model": {"preset": "llama-tiny", "hidden": 32},
        "data": {"source": [str(home / "text")], "length": 32, "val_fraction": 0.1},
        "train": {
            "steps": 130, "rows": 2, "lr": 0.01, "eval_every": 0, "eval_batches": 2,
            "checkpoint_every": 0, "count_every": 10, "threads": 1, "device": "cpu",
        },
        "sharpness": {"every": 0},
        "policy": {"recipe": "te_delayed"},
        "run": {"out": str(home / name)},
    }  # fmt: skip
    return load_config(merge(base, sections))


@pytest.fixture(scope="module")
def faulty(home) -> Path:
    """A run in which one delayed scale is stuck, and then one matrix is multiplied by 30."""
    faults = (
        StaleScale(STALE, "layers.1.ffn.down_proj"),
        ScaledWeight(SCALED, "model.layers.0.mlp.up_proj.weight", 30.0),
    )
    assert train(config(home, "faulty"), faults=faults).reason == "finished"
    return home / "faulty"


@pytest.fixture(scope="module")
def quiet(home) -> Path:
    train(config(home, "quiet", train={"steps": 4}))
    return home / "quiet"


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    code = 0
    try:
        main(["guard", *map(str, arguments)])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_explain_tells_what_came_first_what_was_done_and_what_it_cost(capsys, faulty, tmp_path):
    code, out, _ = run(capsys, "explain", faulty, "--json", tmp_path / "found.json")
    assert code == 0
    assert "faulty: the guard acted twice: one precision raised and one rollback; it cost" in out
    first, second = out.split("\n1. ")[1].split("\n2. ")
    assert "→ precision in layers.1.ffn" in first
    assert "done: layers.1.ffn raised to" in first
    assert "before it: stale in layers.1.ffn down_proj fprop.x was the first" in first
    assert second.startswith(f"step {SCALED}: ")
    assert "in layers.0.ffn" in second
    assert "rolled back to step" in second
    assert "no recorded signal was abnormal" in second  # memory gives no notice

    found = json.loads((tmp_path / "found.json").read_text())
    raised, back = found["incidents"]
    assert STALE < raised["step"] <= STALE + 10
    assert (back["step"], back["action"], back["cost"]["withheld"]) == (SCALED, "roll back", 1.0)
    assert (raised["signs"][0]["signal"], raised["signs"][0]["block"]) == ("stale", "layers.1.ffn")
    assert 0 < raised["signs"][0]["lead"] <= 10
    assert raised["above"] == back["above"] == ["layers.1.ffn"]
    cost = found["cost"]
    total = cost["withheld"] + cost["replayed"] + cost["passes"] + cost["shadows"]
    assert math.isclose(cost["steps"], total)
    assert math.isclose(cost["share"], total / 130)
    assert cost["replayed"] == SCALED - 1 - back["to"]
    booked = json.loads((faulty / "summary.json").read_text())["guard"]
    for key in ("withheld", "replayed", "passes", "shadows"):
        assert math.isclose(cost[key], booked[key]), key


def test_explain_of_a_run_without_incident(capsys, quiet):
    code, out, _ = run(capsys, "explain", quiet)
    assert code == 0
    assert out == "quiet: no incident: the guard watched 4 steps and saw nothing to act on.\n"


def test_explain_of_a_run_without_a_guard_that_diverged(capsys, tmp_path):
    with Run.create(tmp_path / "run", {"train": {"steps": 400}}, command=["halfulp"]) as events:
        chance = random.Random(0)
        for step in range(1, 301):
            loss = 2.0 + chance.uniform(-0.04, 0.04) + max(0, step - 250) * 0.05
            events.write("step", step=step, loss_nats=loss, grad_norm=1.0, lr=1e-3, tokens=8 * step)
            if step % 50 == 0:
                row = {
                    "block": "layers.1.qk", "gemm": "layers.1.qk.k_proj", "operand": "dgrad.g",
                    "format": "e5m2", "n": 100, "saturated": 0, "underflow": step // 3,
                }  # fmt: skip
                events.write("counters", step=step, gemms=[row], optimizer=[])
        events.write("nonfinite", step=301, what="loss", block="layers.1.qk")
        events.write("end", step=300, reason="nonfinite")
    code, out, _ = run(capsys, "explain", tmp_path / "run")
    assert code == 0
    assert "no guard was there; its detector finds one incident" in out
    assert "cost:" not in out
    assert "nonfinite" in out
    assert "no guard in layers.1.qk" in out
    (line,) = [line for line in out.splitlines() if line.startswith("   underflow")]
    assert line.split()[:6] == ["underflow", "layers.1.qk", "k_proj", "dgrad.g", "200", "54"]


def test_the_map_is_a_policy_that_starts_where_the_run_ended(capsys, home, faulty, tmp_path):
    out = tmp_path / "raised.toml"
    code, text, _ = run(capsys, "map", faulty, "-o", out)
    assert code == 0
    assert "1 of 13 blocks stand above the run's own policy" in text
    policy = Policy.load(out)
    assert [rule.match for rule in policy.rules] == ["layers.1.ffn", "*"]
    events = [json.loads(line) for line in (faulty / "events.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "guard"][-1]
    blocks = block_map(outline(config(home, "x").model))
    assert Ladder(policy, blocks).map() == last["map"]
    assert Ladder(policy, blocks).above() == []

    again = config(
        home,
        "again",
        policy={"recipe": "", "file": str(out)},
        train={"steps": 3},
        guard={"on": 1 < 0},
    )
    assert train(again).reason == "finished"
    rows = json.loads((home / "again" / "summary.json").read_text())["policy"]
    assert rows[0][:2] == ["layers.1.ffn", last["map"]["layers.1.ffn"]]
    assert rows[0][2] == 3


def test_the_map_of_a_fallback_is_one_recipe(home, quiet, tmp_path):
    every = list(block_map(outline(config(home, "x").model)).blocks)
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in ("config.toml", "policy.toml", "events.jsonl"):
        (copy / name).write_bytes((quiet / name).read_bytes())
    event = {"event": "guard", "step": 3, "above": every, "map": dict.fromkeys(every, "bf16_amp")}
    with (copy / "events.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    found = precision_map(copy)
    assert found.policy is not None
    assert [(rule.match, rule.recipe.name) for rule in found.policy.rules] == [("*", "bf16_amp")]
    assert len(found.raised) == len(every)


def test_an_existing_file_is_only_replaced_by_force(capsys, faulty, tmp_path):
    out = tmp_path / "policy.toml"
    out.write_text("mine")
    code, _, err = run(capsys, "map", faulty, "-o", out)
    assert (code, out.read_text()) == (2, "mine")
    assert "exists" in err
    assert run(capsys, "map", faulty, "-o", out, "--force")[0] == 0
    assert Policy.load(out).name == "te_delayed_raised"


def test_a_map_with_nothing_raised_is_the_policy_of_the_run(capsys, quiet, tmp_path):
    code, text, _ = run(capsys, "map", quiet, "-o", tmp_path / "policy.toml")
    assert code == 0
    assert "every block stands on the run's own policy" in text
    assert Policy.load(tmp_path / "policy.toml") == Policy.load(quiet / "policy.toml")


@pytest.mark.parametrize("command", ["explain", "map"])
def test_what_is_no_run_is_refused(capsys, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, command, tmp_path / "nothing")
    assert code == 2
    assert "does not exist" in err


def test_a_run_without_its_policy_is_refused(capsys, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    for name in ("config.toml", "events.jsonl"):
        (tmp_path / "run" / name).write_bytes((quiet / name).read_bytes())
    code, _, err = run(capsys, "map", "run")
    assert code == 2
    assert "has no policy.toml" in err


def test_the_progress_shows_incidents_as_they_happen(capsys, faulty):
    events = [json.loads(line) for line in (faulty / "events.jsonl").read_text().splitlines()]
    back = next(event for event in events if event.get("action") == "roll back")
    with Progress() as progress:
        progress.begin("te_delayed", 130)
        for event in events:
            progress.event(event)
            if event is back:
                assert progress.rows[0].step == back["to"]
    lines = [line for line in capsys.readouterr().out.splitlines() if "→" in line]
    assert len(lines) == 2
    assert lines[1].startswith(f"te_delayed: step {SCALED}: ")
    assert lines[1].endswith(f"rolled back to step {back['to']}")
    assert progress.rows[0].step == 130
