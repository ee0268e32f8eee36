"""docs/own_loop.md runs, and its advice on resuming gives the same bits."""

import re
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import halfulp

PAGE = (Path(__file__).parent.parent / "docs" / "own_loop.md").read_text(encoding="utf-8")
DATA = torch.randint(0, 64, (4, 2, 16), generator=torch.Generator().manual_seed(1))


def test_the_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    names: dict = {}
    exec(compile(example, "own_loop.md", "exec"), names)
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Quantized(LlamaForCausalLM: * → te_delayed, 19 GEMMs)"
    assert sum("of the updates asked for were lost" in line for line in out) == 2
    assert set(names["saved"]) == {"model", "optimizer", "scales"}
    assert names["saved"]["scales"]


def made(recipe: str):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    handle = halfulp.quantize(model, recipe)
    return model, handle, halfulp.AdamW(halfulp.param_groups(model, handle.resolution), lr=1e-2)


def train(model, handle, optimizer, steps: range) -> list[torch.Tensor]:
    for step in steps:
        handle.set_step(step)
        model(input_ids=DATA[step], labels=DATA[step]).loss.backward()
        handle.end_step()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("recipe", ["te_delayed", "bf16_pure_sr"])
def test_three_state_dicts_resume_with_the_same_bits(recipe: str) -> None:
    whole = train(*made(recipe), range(4))
    first = made(recipe)
    half = train(*first, range(2))
    second = made(recipe)
    for new, old in zip(second, first, strict=True):
        new.load_state_dict(old.state_dict())
    resumed = train(*second, range(2, 4))
    assert all(map(torch.equal, whole, resumed))
    assert not any(map(torch.equal, whole, half))
