from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from halfulp.run import Run
from halfulp.train.loop import train
from halfulp.train.open import Start, open_session
from halfulp.train.parallel import open_world


def state(path: Path, step: int) -> dict[str, torch.Tensor]:
    files = sorted((path / f"checkpoints/step-{step:08d}").glob("*.safetensors"))
    return {f"{f.stem}/{name}": t for f in files for name, t in load_file(f).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def said(path: Path, *kinds: str) -> list[dict]:
    dull = ("time", "seconds")
    events = (e for e in Run.open(path, writer=False).events() if e["event"] in kinds)
    return [{k: v for k, v in e.items() if k not in dull} for e in events]


def session(config):
    world = open_world(config.train)
    return world, lambda w: open_session(config, w, Start(command=("test",)), None)


@pytest.mark.parametrize("recipe", ["fp32", "te_delayed", "bf16_weights_sr"])
def test_a_measured_run_has_the_bits_of_one_that_is_not(make_config, recipe):
    """50 steps, measured after every fifth: weights, moments, delayed scales and every event."""
    options = {"steps": 50, "checkpoint_every": 25, "eval_every": 10, "count_every": 10}
    runs = []
    for name, every in (("plain", 0), ("measured", 5)):
        sharpness = {"every": every, "draws": 2}
        config = make_config(name, policy={"recipe": recipe}, train=options, sharpness=sharpness)
        torch.manual_seed(7)
        runs.append(train(config).path)
        assert torch.equal(torch.get_rng_state(), torch.manual_seed(7).get_state())
    plain, measured = runs
    assert same(state(plain, 25), state(measured, 25))
    assert same(state(plain, 50), state(measured, 50))
    kinds = ("step", "eval", "counters", "loss_scale")
    assert said(plain, *kinds) == said(measured, *kinds)
    assert [e["step"] for e in said(measured, "sharpness")] == list(range(5, 51, 5))
    assert said(plain, "sharpness") == []
