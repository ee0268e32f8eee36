from pathlib import Path

import pytest
import torch
from processes import poison_rank_1, stop_rank_1, train_together
from safetensors.torch import load_file

from halfulp.run import Run
from halfulp.train.loop import config_of, train


def state(path, step: int, part: str = "model") -> dict[str, torch.Tensor]:
    return load_file(path / f"checkpoints/step-{step:08d}/{part}.safetensors")


def apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    gaps = [(a[name].double() - b[name].double()).abs().max().item() for name in a]
    return max(gaps, default=0.0)


def events(path, kind: str) -> list[dict]:
    dull = ("time", "seconds", "event")
    run = Run.open(path, writer=False)
    return [{k: v for k, v in e.items() if k not in dull} for e in run.events(kind)]


@pytest.mark.parametrize("recipe", ["te_delayed", "bf16_weights_sr"])
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_two_processes_are_one_with_twice_the_micro_batches(make_config, parallel, recipe):
    """Bit for bit: with two terms, fp32 sums have one order only, and halving is exact.

    The gradient norm alone is a longer sum, of different parts under fsdp2; clipping is off, so
    that it decides nothing.
    """
    options = {"parallel": parallel, "clip": 0.0, "steps": 6, "checkpoint_every": 0}
    policy = {"recipe": recipe}
    one = make_config("one", policy=policy, train={**options, "accumulate": 2})
    two = make_config("two", policy=policy, train=options)
    train(one)
    assert train_together(two.to_dict()) == ["finished"] * 2
    a, b = Path(one.run.out), Path(two.run.out)
    for part in ("model", "optimizer", "quantizers"):
        assert apart(state(a, 6, part), state(b, 6, part)) == 0, part
    assert events(a, "eval") == events(b, "eval")
    assert events(a, "checkpoint") == events(b, "checkpoint")
    for x, y in zip(events(a, "step"), events(b, "step"), strict=True):
        assert x.pop("grad_norm") == pytest.approx(y.pop("grad_norm"), rel=1e-6)
        assert x == y
    for x, y in zip(events(a, "counters"), events(b, "counters"), strict=True):
        close(x["gemms"], y["gemms"])
        close(x["optimizer"], y["optimizer"])
    assert len(events(b, "start")) == 1
    assert events(b, "start")[0]["world"] == 2


def close(rows: list[dict], others: list[dict]) -> None:
    assert len(rows) == len(others)
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key, value in row.items():
            # Energies and rms are sums in another order; counts are exact.
            exact = isinstance(value, (str, int))
            assert other[key] == (value if exact else pytest.approx(value, rel=1e-5)), key


def test_a_sharded_run_goes_on_in_one_process_and_back(make_config):
    """Checkpoints do not depend on the processes; the step keeps its micro-batches."""
    stages = {"schedule": [{"until": 0.5, "recipe": "bf16_weights_sr"}], "recipe": "te_delayed"}
    options = {"parallel": "fsdp2", "clip": 0.0, "keep": 3}
    whole = make_config("whole", policy=stages, train={**options, "accumulate": 2})
    split = make_config("split", policy=stages, train=options)
    reference = train(whole).path
    assert train_together(split.to_dict()) == ["finished"] * 2
    path = reference.with_name("split")
    assert apart(state(reference, 12), state(path, 12)) == 0
    train(config_of(path), resume=path, from_step=4)
    assert apart(state(reference, 12), state(path, 12)) == 0
    (path / "summary.json").unlink()
    for late in ("step-00000012", "step-00000008"):
        (path / "checkpoints" / late / "state.json").unlink()
    assert train_together(split.to_dict(), resume=path) == ["finished"] * 2
    assert apart(state(reference, 12), state(path, 12)) == 0
    assert apart(state(reference, 12, "optimizer"), state(path, 12, "optimizer")) == 0
    assert [e["step"] for e in events(path, "step")] == list(range(1, 13))


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_one_process_with_a_non_finite_loss_stops_them_all(make_config, parallel):
    config = make_config(train={"parallel": parallel}, guard={"on": False})
    first, second = train_together(config.to_dict(), prepare=poison_rank_1)
    assert first == second
    assert first.startswith("NonFiniteError: step 5: the loss is not finite; first in layers.1.ffn")
    run = Run.open(Path(config.run.out), writer=False)
    assert [e["block"] for e in run.events("nonfinite")] == ["layers.1.ffn"]
    assert [p.name for p in run.checkpoints()] == ["step-00000004"]


@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
def test_one_process_that_is_asked_to_stop_stops_them_all(make_config, parallel):
    config = make_config(train={"parallel": parallel})
    raw = config.to_dict()
    assert train_together(raw, prepare=stop_rank_1) == ["interrupted"] * 2
    path = Path(config.run.out)
    assert [p.name for p in Run.open(path).checkpoints()][-1] == "step-00000006"
    assert train_together(raw, resume=path) == ["finished"] * 2


def test_storage_that_needs_the_whole_tensor_is_refused_when_sharded(make_config):
    policy = {"recipe": "msamp_o2", "allow_partial": True}
    config = make_config(policy=policy, train={"parallel": "fsdp2", "steps": 1})
    for said in train_together(config.to_dict()):
        assert said.startswith("PolicyError: ")
        assert "fsdp2 leaves each process a part" in said
    assert not Path(config.run.out).exists()


def test_a_mistake_is_told_by_every_process(make_config):
    config = make_config(train={"steps": 1})
    train(config)
    said = train_together(config.to_dict())
    assert said[0] == said[1]
    assert said[0].startswith("RunError: ")
