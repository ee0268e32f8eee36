"""The guard under DDP and FSDP2: one decision on all processes, and directories that resume."""

import shutil
from pathlib import Path

import pytest
import torch
from processes import Killed, OnRank1, train_together
from test_guard_resume import HEAD, MATRIX, actions, events, facts, tensors

from halfulp.guard.faults import BadBatch, ScaledWeight
from halfulp.run import Run
from halfulp.train import guard
from halfulp.train.loop import config_of, train

BAD, WORSE, STEPS = 80, 86, 90
OPTIONS = {
    "steps": STEPS, "clip": 0.0, "rows": 1, "checkpoint_every": 10, "keep": 99,
    "eval_every": 0, "count_every": 0,
}  # fmt: skip
GUARD = {"snapshot_every": 5, "wasted": 1.0, "raised": 1.0}


def faults():
    return BadBatch(BAD, vocab=256), ScaledWeight(WORSE, HEAD, 30.0)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_do_what_one_does(make_config, parallel):
    """A batch skipped, a run rolled back: bit by bit as one process of twice the micro-batches.

    The sharded run then goes on from its checkpoint, ring and all, in one process and in two.
    """
    policy, off = {"recipe": "te_current"}, {"every": 0}
    given = {"policy": policy, "guard": GUARD, "sharpness": off}
    one = make_config("one", train=OPTIONS | {"accumulate": 2, "parallel": parallel}, **given)
    two = make_config("two", train=OPTIONS | {"parallel": parallel}, **given)
    alone = train(one, faults=faults()).path
    assert train_together(two.to_dict(), faults=faults()) == ["finished"] * 2
    path = Path(two.run.out)
    assert actions(path) == actions(alone)
    assert [action for action, *_ in actions(path)] == ["skip", "roll back"]
    same(path, alone)
    back = actions(path)[-1][-1]
    for size in (1, 2):
        again = path.with_name(f"again-{size}")
        shutil.copytree(path, again)
        (again / "summary.json").unlink()
        for later in (s for s in (80, STEPS) if s > back):
            shutil.rmtree(again / f"checkpoints/step-{later:08d}")
        if size == 1:
            train(config_of(again), resume=again, faults=faults())
        else:
            assert train_together(two.to_dict(), resume=again, faults=faults()) == ["finished"] * 2
        same(again, path)
        assert actions(again) == actions(path)


def same(path: Path, other: Path) -> None:
    """Weights, moments, histories and snapshots; norms are sums in an order of their own."""
    a, b = tensors(path, STEPS), tensors(other, STEPS)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    mine, its = facts(path, STEPS), facts(other, STEPS)
    assert mine["cursor"] == its["cursor"]
    assert mine["guard"]["keeper"]["spent"] == its["guard"]["keeper"]["spent"]


def act_early(_rank: int) -> None:
    guard.YOUNG = 0


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_block_is_raised_on_every_process(make_config, parallel, monkeypatch):
    monkeypatch.setattr(guard, "YOUNG", 0)
    options = OPTIONS | {"steps": 20, "count_every": 5, "rows": 2}
    given = {"policy": {"recipe": "fp8_unscaled"}, "guard": GUARD, "sharpness": {"every": 0}}
    one = make_config("one", train=options | {"accumulate": 2, "parallel": parallel}, **given)
    two = make_config("two", train=options | {"parallel": parallel}, **given)
    alone = train(one).path
    assert train_together(two.to_dict(), prepare=act_early) == ["finished"] * 2
    path = Path(two.run.out)
    told = [[e["raised"] for e in events(p) if e["event"] == "guard"] for p in (alone, path)]
    assert told[0] == told[1] != []
    a, b = tensors(alone, 20), tensors(path, 20)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_replica_that_leaves_the_others_is_noticed_before_it_is_saved(make_config):
    """Too little for the loss to show: the next snapshot compares the weights."""
    config = make_config(
        train=OPTIONS | {"steps": 20, "parallel": "ddp"}, guard=GUARD, sharpness={"every": 0}
    )
    bit = OnRank1(7, ScaledWeight(7, MATRIX, 1.0001))
    for said in train_together(config.to_dict(), faults=(bit,)):
        assert said.startswith(f"StoppedError: after step 10 {MATRIX} is not the same on all")
        assert f"halfulp train --resume {config.run.out}" in said
    path = Path(config.run.out)
    assert [e["reason"] for e in Run.open(path).events("end")] == ["stopped"]
    assert Run.open(path).checkpoints() == []


def test_a_replica_that_breaks_is_rolled_back_with_the_others(make_config):
    """Its loss shows it, to all of them; the checkpoints after it are of equal replicas."""
    options = OPTIONS | {"steps": 88, "parallel": "ddp"}
    config = make_config(train=options, guard=GUARD, sharpness={"every": 0})
    broken = OnRank1(81, ScaledWeight(81, HEAD, 30.0))
    assert train_together(config.to_dict(), faults=(broken,)) == ["finished"] * 2
    path = Path(config.run.out)
    (action, step, to) = actions(path)[0]
    assert (action, step in (81, 82)) == ("roll back", True)
    whole = make_config("whole", train=options, guard=GUARD, sharpness={"every": 0})
    assert train_together(whole.to_dict()) == ["finished"] * 2
    a, b = tensors(path, 88), tensors(Path(whole.run.out), 88)
    model = [name for name in a if name.startswith("model/")]
    assert all(torch.equal(a[name], b[name]) for name in model)
    assert to < 81


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_a_process_killed_in_the_middle_leaves_a_run_that_resumes(make_config, parallel):
    options = OPTIONS | {"steps": 16, "checkpoint_every": 5, "parallel": parallel}
    given = {"policy": {"recipe": "te_delayed"}, "guard": GUARD, "sharpness": {"every": 0}}
    whole = make_config("whole", train=options, **given)
    assert train_together(whole.to_dict()) == ["finished"] * 2
    config = make_config("killed", train=options, **given)
    with pytest.raises(AssertionError, match="a process hangs or died"):
        train_together(config.to_dict(), faults=(OnRank1(13, Killed(13)),))
    path = Path(config.run.out)
    assert [p.name for p in Run.open(path).checkpoints()][-1] == "step-00000010"
    assert train_together(config.to_dict(), resume=path) == ["finished"] * 2
    a, b = tensors(path, 16), tensors(Path(whole.run.out), 16)
    assert all(torch.equal(a[name], b[name]) for name in a)
