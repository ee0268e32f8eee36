"""What the guard knows survives: the run goes on bit by bit from every checkpoint that it has."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import start, train_or_resume
from safetensors.torch import load_file
from test_train_kill import count, wait_for

from halfulp.guard.faults import BadBatch, ScaledWeight
from halfulp.guard.flip_back import FlipBack
from halfulp.run import Run
from halfulp.train import guard
from halfulp.train.loop import config_of, train

BAD, WORSE = 80, 92  # steps of a batch of noise, and of a broken matrix
STEPS = 105
OPTIONS = {"steps": STEPS, "checkpoint_every": 10, "keep": 99, "eval_every": 30, "count_every": 5}
GUARD = {"snapshot_every": 10, "wasted": 1.0, "raised": 1.0}
MATRIX = "model.layers.1.mlp.down_proj.weight"
HEAD = "lm_head.weight"


def faults():
    return BadBatch(BAD, vocab=256), ScaledWeight(WORSE, MATRIX, 300.0)


def tensors(path: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights, moments, histories and snapshots."""
    files = sorted((path / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    return {f"{f.stem}/{name}": t for f in files for name, t in load_file(f).items()}


def facts(path: Path, step: int = STEPS) -> dict:
    """Everything else of a checkpoint: cursor, skip list, locks, windows, budgets spent."""
    state = json.loads((path / f"checkpoints/step-{step:08d}/state.json").read_text())
    return {k: v for k, v in state.items() if k not in ("seconds", "files", "events")}


def events(path: Path) -> list[dict]:
    """All events but starts and ends, without times."""
    told = Run.open(path, writer=False).events()
    return [
        {k: v for k, v in event.items() if k not in ("time", "seconds")}
        for event in told
        if event["event"] not in ("start", "end")
    ]


def assert_same(path: Path, whole: Path, step: int = STEPS) -> None:
    """All that the last checkpoints hold and all that was told is equal."""
    a, b = tensors(path, step), tensors(whole, step)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    # Through JSON, where nan is equal to nan.
    assert json.dumps(facts(path, step)) == json.dumps(facts(whole, step))
    assert json.dumps(events(path)) == json.dumps(events(whole))


def actions(path: Path) -> list[tuple]:
    return [(e["action"], e["step"], e["to"]) for e in events(path) if e["event"] == "guard"]


SLOW = pytest.param("te_delayed", marks=pytest.mark.slow)


@pytest.mark.parametrize("recipe", ["fp8_unscaled", "bf16_weights_sr", SLOW])
def test_every_checkpoint_continues_the_run_bit_by_bit(make_config, recipe, monkeypatch):
    """Before any incident or in a lock, after a rollback, and long after it."""
    monkeypatch.setattr(guard, "YOUNG", 0)
    config = make_config("whole", policy={"recipe": recipe}, train=OPTIONS, guard=GUARD)
    whole = train(config, faults=faults()).path
    done = actions(whole)
    assert BAD in [step for _, step, _ in done]
    back = [to for action, _, to in done if action == "roll back"][-1]
    assert 20 <= back < WORSE
    if recipe == "fp8_unscaled":
        assert done[0][0] == "raise"
        stands = facts(whole)["guard"]["keeper"]["ladder"]["stands"].values()
        assert any(stand["lock_until"] > STEPS for stand in stands)
    for step in (20, back, 100):
        path = whole.with_name(f"from-{step}")
        shutil.copytree(whole, path)
        again = faults()
        train(config_of(path), resume=path, from_step=step, faults=again)
        assert_same(path, whole)
        # The matrix broke once in the life of the run, not once per process.
        assert again[1].done


def test_the_whole_ring_is_in_the_checkpoint(make_config):
    path = train(make_config(train=OPTIONS | {"steps": 40}, guard=GUARD)).path
    ring = facts(path, 40)["guard"]["ring"]
    assert [row["step"] for row in ring] == [0, 10, 20, 30, 40]
    assert [row["good"] for row in ring] == [True, True, True, True, False]
    saved = tensors(path, 40)
    for step in (20, 30):  # a snapshot is the checkpoint of its step
        for name, tensor in tensors(path, step).items():
            if not name.startswith("snapshots/"):
                assert torch.equal(saved[f"snapshots/{step}/{name}"], tensor), name


def test_without_saved_snapshots_a_resumed_run_goes_back_to_its_checkpoint(make_config):
    """It is the same run until it has to go back farther than it was resumed."""
    section = GUARD | {"save_snapshots": False}
    config = make_config("whole", train=OPTIONS, guard=section)
    whole = train(config, faults=faults()).path
    assert not [name for name in tensors(whole) if re.match(r"snapshots/\d", name)]
    assert facts(whole)["guard"]["ring"] == []
    path = whole.with_name("late")
    shutil.copytree(whole, path)
    late = (BadBatch(BAD, vocab=256), ScaledWeight(BAD + 5, MATRIX, 300.0))
    train(config_of(path), resume=path, from_step=70, faults=late)
    assert ("roll back", 70) in [(action, to) for action, _, to in actions(path)]
    first = [e for e in events(whole) if e["event"] == "step"][:70]
    assert [e for e in events(path) if e["event"] == "step"][:70] == first
    assert Run.open(path, writer=False).summary()["reason"] == "finished"


@pytest.mark.parametrize("recipe", ["bf16_weights_sr", SLOW])
def test_a_guarded_run_killed_at_random_moments_ends_like_a_whole_one(make_config, recipe):
    """Also right after its rollback, when the checkpoint of it may be half written."""
    given = {"policy": {"recipe": recipe}, "train": OPTIONS | {"keep": 2}, "guard": GUARD}
    whole = train(make_config("whole", **given), faults=faults()).path
    config = make_config("killed", **given)
    path, chance = Path(config.run.out), random.Random(recipe)
    moments = [lambda: count(path) > 10, lambda: rolled_back(path), lambda: rolled_back(path)]
    for moment in moments:
        process = start(train_or_resume, config.to_dict(), path, faults())
        wait_for(lambda: moment() or not process.is_alive())  # noqa: B023
        process.join(chance.uniform(0.0, 0.1))
        process.kill()
        process.join()
    last = start(train_or_resume, config.to_dict(), path, faults())
    last.join(120)
    assert last.exitcode == 0
    assert_same(path, whole)
    assert not list((path / "checkpoints").glob(".*"))


def rolled_back(path: Path) -> bool:
    file = path / "events.jsonl"
    return file.exists() and b'"roll back"' in file.read_bytes()


def test_a_checkpoint_of_a_left_course_is_set_aside(make_config):
    """Two are kept, and the run goes back behind both."""
    options = OPTIONS | {"keep": 2, "checkpoint_every": 3}
    path = train(make_config(train=options, guard=GUARD), faults=faults()).path
    back = next(to for action, _, to in actions(path) if action == "roll back")
    assert [p.name for p in Run.open(path).checkpoints()] == ["step-00000102", "step-00000105"]
    dropped = sorted(p.name for p in (path / "checkpoints/dropped").iterdir())
    assert dropped
    assert all(back < int(name.split("-")[1].split(".")[0]) <= WORSE for name in dropped)
    saved = [e["step"] for e in events(path) if e["event"] == "checkpoint"]
    assert saved.count(back) >= 1


def test_a_look_that_was_begun_is_finished_after_a_resume(make_config, monkeypatch):
    """Codes of weights are compared over three steps; a checkpoint falls between them."""
    seen: list[list] = []
    readings = FlipBack.readings
    monkeypatch.setattr(FlipBack, "readings", lambda f: seen.append(readings(f)) or seen[-1])
    options = {"steps": 12, "checkpoint_every": 5, "count_every": 6, "keep": 9}
    config = make_config("whole", policy={"recipe": "te_current"}, train=options)
    whole = train(config).path
    codes = [name for name in tensors(whole, 5) if name.startswith("snapshots/looks/")]
    assert len(codes) == 14  # every GEMM of two layers
    path = whole.with_name("late")
    shutil.copytree(whole, path)
    train(config_of(path), resume=path, from_step=5)
    assert_same(path, whole, 12)
    assert seen[:2] == seen[2:]
    assert all(seen)
