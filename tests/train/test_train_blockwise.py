import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from processes import start, train_or_resume, train_together
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from halfulp.errors import ConfigError, NonFiniteError
from halfulp.pieces import pieces
from halfulp.run import Run
from halfulp.train import loop
from halfulp.train.blockwise import last_ratios
from halfulp.train.config import TrainSection
from halfulp.train.loop import config_of, train
from halfulp.train.rate_guard import Alarm, RateGuard, Track
from halfulp.train.schedule import lr_at

FIXED = {"ratios": "emb=3,qk=2.5,ffn=2,vo=1.5"}
AUTO = {"ratios": "auto"}


def state(path: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((path / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    return {f"{f.stem}/{name}": t for f in files for name, t in load_file(f).items()}


def same(a: Path, b: Path, step: int = 12) -> bool:
    x, y = state(a, step), state(b, step)
    return x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in x)


def events(path: Path, kind: str) -> list[dict]:
    dull = ("time", "seconds", "event")
    found = Run.open(path, writer=False).events(kind)
    return [{k: v for k, v in e.items() if k not in dull} for e in found]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_rates_of_blocks_rise_alike_and_end_at_one_floor(schedule):
    train = TrainSection(lr=0.5, steps=200, warmup=10, schedule=schedule, min_lr=0.1)
    one, six = ([lr_at(step, train, ratio) for step in range(train.steps)] for ratio in (1.0, 6.0))
    assert one == [lr_at(step, train) for step in range(train.steps)]
    assert six[:10] == pytest.approx(one[:10])
    assert max(six) == pytest.approx(6 * max(one)) == pytest.approx(six[60])
    assert six[-1] == pytest.approx(one[-1] if schedule != "constant" else 3.0)
    plain = [lr_at(step, train, 6.0, stretch=False, scaled=True) for step in range(200)]
    assert plain == pytest.approx([6 * lr for lr in one])


def test_a_fractional_warmup_never_exceeds_the_peak():
    train = TrainSection(lr=1.0, steps=100, warmup=3, schedule="constant")
    assert max(lr_at(step, train, 1.5) for step in range(100)) == 1.5


@pytest.mark.parametrize("recipe", ["fp32", "te_delayed", "bf16_weights_sr"])
def test_ratios_of_one_train_the_same_bits_as_no_ratios(make_config, recipe):
    """And a watched run as one that is not."""
    plain = train(make_config("plain", policy={"recipe": recipe})).path
    one = make_config("one", policy={"recipe": recipe}, blockwise={"ratios": "uniform"})
    assert same(train(one).path, plain)
    assert events(plain, "lr_ratios") == []
    assert "lr_ratios" not in Run.open(plain, writer=False).summary()


def test_each_block_learns_at_its_rate(make_config, monkeypatch):
    plain, seen = train(make_config("plain")).path, []

    def spy(s, *, interrupted):
        out = run_step(s, interrupted=interrupted)
        seen.append({g["lr_type"]: g["lr"] for g in s.precision.optimizer.param_groups})
        return out

    run_step = loop.run_step
    monkeypatch.setattr(loop, "run_step", spy)
    config = make_config(blockwise=FIXED)
    path = train(config).path
    ratios = {"emb": 3, "qk": 2.5, "ffn": 2, "vo": 1.5, "norm": 1, "head": 3}
    for step, lrs in enumerate(seen):
        assert lrs == {k: lr_at(step, config.train, r) for k, r in ratios.items()}
    first = events(path, "lr_ratios")
    assert [(e["step"], e["ratios"]) for e in first] == [(1, ratios)]
    assert Run.open(path, writer=False).summary()["lr_ratios"] == ratios
    assert not same(path, plain)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_are_one_with_twice_the_micro_batches(make_config, parallel):
    options = {"parallel": parallel, "clip": 0.0, "steps": 6, "checkpoint_every": 0}
    policy = {"recipe": "bf16_weights_sr"}
    one = make_config("one", policy=policy, train={**options, "accumulate": 2}, blockwise=FIXED)
    two = make_config("two", policy=policy, train=options, blockwise=FIXED)
    train(one)
    assert train_together(two.to_dict()) == ["finished"] * 2
    assert same(Path(one.run.out), Path(two.run.out), 6)
    assert events(Path(one.run.out), "lr_ratios") == events(Path(two.run.out), "lr_ratios")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_measure_and_agree(make_config, parallel):
    """Traces are means over other batches than one process has; what follows is of one size."""
    options = {"parallel": parallel, "clip": 0.0}
    two = make_config("two", train=options, blockwise=AUTO)
    one = make_config("one", train={"clip": 0.0, "accumulate": 2}, blockwise=AUTO)
    train(one)
    assert train_together(two.to_dict()) == ["finished"] * 2
    alone, shared = (
        [e for e in events(Path(c.run.out), "lr_ratios") if "sharpness" in e] for c in (one, two)
    )
    assert [e["step"] for e in alone] == [e["step"] for e in shared] == [1, 2, 4, 8]
    for kind, value in alone[0]["sharpness"].items():
        # 16 draws each; the standard error of a mean is below 12 % here.
        assert shared[0]["sharpness"][kind] == pytest.approx(value, rel=0.6), kind


def test_a_run_that_follows_the_sharpness_resumes_bit_by_bit(make_config):
    stages = {"recipe": "te_delayed", "schedule": [{"until": 0.4, "recipe": "bf16_weights_sr"}]}
    options = {"keep": 5, "checkpoint_every": 3}
    config = make_config("whole", policy=stages, train=options, blockwise=AUTO)
    whole = train(config).path
    told = events(whole, "lr_ratios")
    final = state(whole, 12)
    assert any("sharpness" in e for e in told)
    assert any(max(e["ratios"].values()) > 1.5 for e in told)
    train(config_of(whole), resume=whole, from_step=3)
    again = state(whole, 12)
    assert all(torch.equal(final[name], again[name]) for name in final)
    assert events(whole, "lr_ratios") == told


def test_a_killed_run_that_follows_the_sharpness_ends_like_a_whole_one(make_config):
    options = {"checkpoint_every": 2, "steps": 20}
    whole = train(make_config("whole", train=options, blockwise=AUTO)).path
    config = make_config("killed", train=options, blockwise=AUTO)
    path = Path(config.run.out)
    process = start(train_or_resume, config.to_dict(), path)
    while process.is_alive() and not list((path / "checkpoints").glob("step-*")):
        process.join(0.01)
    process.kill()
    process.join()
    last = start(train_or_resume, config.to_dict(), path)
    last.join(60)
    assert last.exitcode == 0
    assert same(path, whole, 20)
    assert events(path, "lr_ratios") == events(whole, "lr_ratios")


def test_ratios_move_no_faster_than_allowed_and_stay_within_the_cap(make_config):
    config = make_config(
        train={"steps": 60, "eval_every": 0, "checkpoint_every": 0, "count_every": 0, "lr": 1e-4},
        blockwise=AUTO | {"cap": 3.0, "guard": False},
    )
    path = train(config).path
    told = events(path, "lr_ratios")
    most = 1.25 ** (1 / 0.6)
    for before, after in pairwise(told):
        steps = after["step"] - before["step"] + 1
        for kind, ratio in after["ratios"].items():
            assert ratio / before["ratios"][kind] <= most**steps * (1 + 1e-9)
            assert ratio <= (3.0 if kind not in ("emb", "head") else math.sqrt(30)) * (1 + 1e-9)
    assert max(told[-1]["ratios"].values()) > 2
    assert [e["step"] for e in told if "sharpness" in e] == [3, 5, 10, 20, 39]


def test_alarms_halve_the_excess_and_are_told(make_config, monkeypatch):
    due = {4: "vo", 5: "vo", 9: None}

    def observe(guard, step, loss_nats, norms):
        assert set(norms) == {"emb", "qk", "vo", "ffn", "norm", "head"}
        if step not in due:
            return []
        if due[step]:
            guard.norms.setdefault(due[step], Track(1.0)).alarms += 1
        return [Alarm(due[step], "of a test")]

    monkeypatch.setattr(RateGuard, "observe", observe)
    config = make_config(blockwise={"ratios": "emb=5,qk=1,ffn=3,vo=5"})
    path = train(config).path
    told = {e["step"]: e for e in events(path, "lr_ratios")}
    assert list(told) == [1, 4, 5, 9]
    assert told[4]["ratios"]["vo"] == 3
    assert told[5]["ratios"]["vo"] == 1  # the second alarm of one type
    assert told[5]["ratios"]["emb"] == 5
    assert (told[9]["ratios"]["emb"], told[9]["ratios"]["ffn"]) == (3, 2)
    assert "vo lowered: of a test" in told[4]["why"]
    assert "all lowered" in told[9]["why"]
    assert "vo = 5 is above qk = 1, ffn = 3" in told[1]["why"]
    assert Run.open(path, writer=False).summary()["lr_ratios"] == told[9]["ratios"]
    unwatched = train(make_config("b", blockwise={"ratios": "paper", "guard": False})).path
    assert len(events(unwatched, "lr_ratios")) == 1


def test_gradient_norms_of_types_add_up_to_that_of_all(make_config, monkeypatch):
    seen = []

    def observe(guard, step, loss_nats, norms):
        seen.append(math.hypot(*norms.values()))
        return []

    monkeypatch.setattr(RateGuard, "observe", observe)
    path = train(make_config(blockwise=FIXED)).path
    assert seen == pytest.approx([e["grad_norm"] for e in events(path, "step")], rel=1e-5)


@pytest.mark.parametrize("floor", ["scaled", "shared"])
def test_the_last_update_knows_the_rates_of_its_blocks(make_config, floor):
    config = make_config(blockwise=FIXED | {"floor": floor})
    path = train(config).path
    model = AutoModelForCausalLM.from_pretrained(path / "checkpoints/step-00000012")
    found = last_ratios(config, pieces(model), path / "checkpoints/step-00000012")
    assert set(found) == {name for name, _ in model.named_parameters()}
    ffn = [found[name] for name in found if "mlp" in name]
    assert ffn == pytest.approx([2.0 if floor == "scaled" else 1.0] * len(ffn))
    assert last_ratios(make_config("plain"), pieces(model), path) == {}


def test_a_diverged_run_names_the_highest_ratio(make_config):
    section = {"ratios": "emb=1,qk=1,ffn=1,vo=1e9", "stretch_warmup": False, "guard": False}
    with pytest.raises(NonFiniteError, match=r"halve train.lr .*the highest is vo = 1e\+09"):
        train(make_config(blockwise=section, guard={"on": False}))


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"ratios": "papr"}, "Nearest: paper"),
        ({"ratios": "emb=1,qk=1"}, "leave out ffn, vo"),
        ({"ratios": "emb=1,qk=1,ffn=1,vo=1,pos=2"}, "pos, and the model has none"),
        ({"ratios": "paper-gpt2"}, "pos, and the model has none"),
        ({"ratios": "paper", "power": 0.7}, "blockwise.power has no effect.*'auto'"),
        ({"floor": "scaled"}, "blockwise.floor has no effect.*Give ratios"),
        ({"ratios": "auto", "stretch_warmup": False}, "stretch_warmup has no effect"),
        ({"ratios": "auto", "power": 2.0}, "power = 2"),
        ({"ratios": "auto", "cap": 0.5}, "cap = 0.5"),
        ({"ratios": "paper", "anchor": "mean"}, "'mean' does not exist"),
        ({"ratios": "paper", "floor": "own"}, "'own' does not exist"),
        ({"ratios": "emb=1,qk=1,ffn=1,vo=4", "stretch_warmup": False}, "ruin runs.*guard=false"),
        ({"ratios": "emb=20,qk=1,ffn=1,vo=1"}, "the warm-up of emb takes 20 steps"),
    ],
)
def test_what_cannot_be_used_is_refused_before_there_is_a_run(make_config, section, told):
    with pytest.raises(ConfigError, match=told):
        train(make_config(blockwise=section))
    assert not Path(make_config().run.out).exists()
