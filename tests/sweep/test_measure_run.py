import json
import math

import numpy as np
import pytest

from halfulp.guard.incident import BACK
from halfulp.run import Run
from halfulp.sweep.measure import entropy_nats, measure, tail_and_best, unigram_nats
from halfulp.sweep.result import Result
from halfulp.train.config import load_config
from halfulp.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 40 steps on random letters, some of them more frequent."""
    folder = tmp_path_factory.mktemp("measured")
    letters = np.random.default_rng(0).choice(list("eeeeaaoz "), (12, 3000))
    (folder / "text").mkdir()
    for i, row in enumerate(letters):
        (folder / "text" / f"{i}.txt").write_text("".join(row))
    config = load_config(
        {
            "model": {"preset": "llama-tiny", "hidden": 32, "layers": 1},
            "data": {"source": [str(folder / "text")], "length": 32, "val_fraction": 0.1},
            "train": {"steps": 40, "rows": 2, "lr": 0.01, "eval_every": 20, "eval_batches": 2},
            "policy": {"recipe": "te_current"},
            "guard": {"on": False},
            "run": {"out": str(folder / "run")},
        }
    )
    return train(config).path


def events(path, kind):
    return list(Run.open(path, writer=False).events(kind))


def test_the_numbers_of_a_run_are_those_of_its_events(run):
    found = measure(run)
    losses = [e["loss_nats"] for e in events(run, "step")]
    summary = Run.open(run, writer=False).summary()
    assert found["initial_nats"] == losses[0]
    assert found["tail_nats"] == np.median(losses[-10:])  # 5 % would be two steps
    assert found["best_nats"] == pytest.approx(min(np.convolve(losses, [0.1] * 10, "valid")))
    assert found["best_nats"] - 0.1 < found["tail_nats"] < losses[0]
    assert (found["steps"], found["planned_steps"], found["tokens"]) == (40, 40, 40 * 64)
    assert found["loss_nats"] == summary["loss_nats"]
    last = events(run, "eval")[-1]["logits"]
    assert {k: found[k] for k in ("sharpness", "sharpness_centered", "logz")} == {
        k: last[k] for k in ("sharpness", "sharpness_centered", "logz")
    }
    assert all(math.isnan(share) for share in found["spikes"].values())  # 40 steps: no window


def test_the_numbers_fit_a_result(run):
    result = Result(id="x", recipe="r", lr=0.1, seed=0, data="d", status="finished", **measure(run))
    assert Result.from_dict(json.loads(json.dumps(result.to_dict()))).tail_nats == result.tail_nats


def test_random_letters_have_the_loss_of_unigrams(run):
    p = np.array([4, 2, 1, 1, 1]) / 9
    expected = -(p * np.log(p)).sum()
    # 3000 held-out letters: the plug-in entropy has standard error 0.011, and ends of documents
    # add a little.
    assert unigram_nats(Run.open(run, writer=False)) == pytest.approx(expected, abs=0.06)
    assert measure(run)["loss_nats"] > expected - 0.06


def test_entropy():
    assert entropy_nats(np.array([5, 0, 5, 5, 5])) == pytest.approx(math.log(4))
    assert entropy_nats(np.array([7])) == 0


@pytest.mark.parametrize(("steps", "window"), [(1, 1), (7, 7), (12, 10), (200, 10), (400, 20)])
def test_the_best_loss_is_a_mean_of_consecutive_ones(steps, window):
    losses = np.random.default_rng(0).normal(size=steps)
    tail, best = tail_and_best(losses)
    slow = min(losses[i : i + window].mean() for i in range(steps - window + 1))
    assert (tail, best) == pytest.approx((np.median(losses[-window:]), slow))


@pytest.mark.parametrize("steps", [60, 300])
def test_batches_of_different_difficulty_are_no_divergence(steps):
    # Means of 10 have σ = 0.06 and the median 0.08: 0.3 above the smallest of 30 once in 1e4.
    noise = np.random.default_rng(1).normal(0, 0.2, (100, steps))
    healthy = 2.5 + 3 * np.exp(-np.arange(steps) / (steps / 5)) + noise
    assert all(tail < best + 0.3 for tail, best in map(tail_and_best, healthy))
    # The same, thrown back to 1 nat above in the last quarter.
    healthy[:, -steps // 4 - 10 :] += 1
    assert all(tail > best + 0.3 for tail, best in map(tail_and_best, healthy))


def test_steps_that_a_rollback_took_back_do_not_count(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.toml").write_text((run / "config.toml").read_text())
    steps = events(run, "step")
    bad = [{**e, "loss_nats": 0.001} for e in steps[10:14]]
    back = {"event": "guard", "action": BACK, "to": 10}
    lines = [*steps[:10], *bad, back, *steps[10:]]
    (copy / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in lines))
    found, whole = measure(copy), measure(run)
    assert (found["best_nats"], found["tail_nats"]) == (whole["best_nats"], whole["tail_nats"])


def test_a_run_that_broke_off_says_what_it_knows(run, tmp_path):
    copy = tmp_path / "run"
    copy.mkdir()
    (copy / "config.toml").write_text((run / "config.toml").read_text())
    found = measure(copy)
    assert found["planned_steps"] == 40
    assert "tail_nats" not in found
    assert math.isnan(found["sharpness"])
    (copy / "events.jsonl").write_text(json.dumps(events(run, "step")[0]) + "\n")
    found = measure(copy)
    assert found["initial_nats"] == found["tail_nats"] == found["best_nats"]
