import random
import time
from pathlib import Path

import pytest
import torch
from processes import start, train_or_resume
from safetensors.torch import load_file

from halfulp.errors import RunError
from halfulp.run import Run
from halfulp.train.loop import config_of, train

KILLS = 5


def state(path: Path, step: int) -> dict[str, torch.Tensor]:
    folder = path / f"checkpoints/step-{step:08d}"
    files = sorted(folder.glob("*.safetensors"))
    return {f"{f.stem}/{name}": t for f in files for name, t in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def said(path: Path) -> list[dict]:
    """Events that a killed run must share with a whole one: everything but times and starts."""
    dull = ("time", "seconds")
    kinds = ("step", "eval", "counters", "schedule", "sharpness")
    events = (e for e in Run.open(path, writer=False).events() if e["event"] in kinds)
    return [{k: v for k, v in e.items() if k not in dull} for e in events]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_killed_at_random_moments_ends_bit_by_bit_like_a_whole_one(make_config, seed):
    """Stochastic weights first, delayed scales later: all the state that a run can have."""
    stages = {"recipe": "te_delayed", "schedule": [{"until": 0.4, "recipe": "bf16_weights_sr"}]}
    options = {"steps": 30, "checkpoint_every": 1 + 2 * seed, "eval_every": 5}
    given = {"policy": stages, "train": options, "sharpness": {"every": 3}}
    whole = train(make_config("whole", **given)).path
    config = make_config("killed", **given)
    path, chance = Path(config.run.out), random.Random(seed)
    kills = 0
    while kills < KILLS:
        process = start(train_or_resume, config.to_dict(), path)
        seen = count(path)
        wait_for(lambda: count(path) > seen or not process.is_alive())  # noqa: B023
        process.join(chance.uniform(0.0, 0.15))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert kills >= 2
    last = start(train_or_resume, config.to_dict(), path)
    last.join(60)
    assert last.exitcode == 0
    assert same(state(path, 30), state(whole, 30))
    assert said(path) == said(whole)
    assert not list((path / "checkpoints").glob(".*"))
    assert Run.open(path, writer=False).summary()["reason"] == "finished"


def count(path: Path) -> int:
    file = path / "events.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(condition) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_torn_line_does_not_stop_the_resume(make_config):
    whole = train(make_config("whole")).path
    path = train(make_config("torn", train={"keep": 3})).path
    (path / "summary.json").unlink()
    events = path / "events.jsonl"
    lines = events.read_bytes().splitlines(keepends=True)
    events.write_bytes(b"".join(lines[:-3]) + lines[-3][:17])
    train(config_of(path), resume=path, from_step=8)
    assert same(state(path, 12), state(whole, 12))
    assert said(path) == said(whole)


@pytest.mark.parametrize("before", ["bf16_amp", "te_delayed"])
def test_a_resume_in_the_stage_after_another_has_the_bits_of_the_whole_run(make_config, before):
    """bf16_amp rounds the products of attention and the stage after it does not."""
    stages = {"recipe": "bf16_weights_sr", "schedule": [{"until": 0.4, "recipe": before}]}
    path = train(make_config("run", policy=stages, train={"keep": 3})).path
    expected, events = state(path, 12), said(path)
    train(config_of(path), resume=path, from_step=8)
    assert same(state(path, 12), expected)
    assert said(path) == events


def test_a_broken_checkpoint_is_named_and_the_one_before_it_serves(make_config):
    whole = train(make_config("whole")).path
    path = train(make_config("broken")).path
    (path / "summary.json").unlink()
    file = path / "checkpoints/step-00000012/optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"optimizer\.safetensors has .*--from-step 8"):
        train(config_of(path), resume=path)
    train(config_of(path), resume=path, from_step=8)
    assert same(state(path, 12), state(whole, 12))


def test_a_run_without_a_checkpoint_starts_over(make_config):
    whole = train(make_config("whole")).path
    path = train(make_config("early", train={"checkpoint_every": 0})).path
    (path / "summary.json").unlink()
    (path / "checkpoints/step-00000012/state.json").unlink()
    train(config_of(path), resume=path)
    assert same(state(path, 12), state(whole, 12))
    assert said(path) == said(whole)
