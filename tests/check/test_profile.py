"""Depth profile and composed bound on models of transformers and a plain module."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from halfulp.blocks import block_map
from halfulp.check.composed import stream_bounds
from halfulp.check.measure import low_copy
from halfulp.check.profile import (
    fp64,
    layer_matrices,
    log_slope,
    omegas,
    profile_depth,
    reference_copy,
    stream,
)
from halfulp.errors import CheckError

IDS = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
COMMON = {"vocab_size": 64, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
}
SHAPES = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 32},
    "llama": LLAMA,
    "qwen2": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "qwen3": LLAMA,
}


def build(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **COMMON, **SHAPES[family])
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", SHAPES)
def test_errors_of_the_stream(family):
    model = build(family)
    before = copy.deepcopy(model.state_dict())
    by_dtype = {d: profile_depth(model, IDS, low=d) for d in (torch.float32, torch.bfloat16)}
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for dtype, profile in by_dtype.items():
        names = [f"layers.{n}.{part}" for n in range(3) for part in ("attn", "ffn")]
        assert [p.name for p in profile.points] == names
        u = torch.finfo(dtype).eps / 2
        for p in profile.points:
            assert 0.1 * u < p.linf[2] < 20 * u
            assert p.comp[2] > p.linf[2]
            assert list(p.linf) == sorted(p.linf)
            assert p.norm == pytest.approx(p.rms * math.sqrt(32))
        assert abs(profile.slope) < 1


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_reference_is_fp64_throughout(family):
    model = build(family)
    blocks = block_map(model)
    wide = stream(reference_copy(model), IDS, blocks, in_fp64=True)
    walked = {name: bound.value for name, bound in stream_bounds(model, IDS, "fp32")}
    for name, x in wide.items():
        assert x.dtype is torch.float64
        assert (x - walked[name]).abs().max() < 1e-14
    partly = stream(reference_copy(model), IDS, blocks)  # Llama's norms fall back to fp32
    off = max((partly[k] - x).abs().max().item() for k, x in wide.items())
    assert (off > 1e-9) == (family == "llama")


@pytest.mark.parametrize("fmt", ["fp32", "bf16"])
@pytest.mark.parametrize("family", SHAPES)
def test_composed_bound_covers_every_element(family, fmt):
    model, blocks = build(family), block_map(build(family))
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[fmt]
    reference = stream(reference_copy(model), IDS, blocks, in_fp64=True)
    low = stream(low_copy(model, dtype), IDS, blocks)
    ratios = []
    for name, bound in stream_bounds(model, IDS, fmt):
        if name in reference:
            off = (low[name].double() - reference[name]).abs()
            assert (off <= bound.error).all(), name
            ratios.append((off / bound.error).max().item())
    assert 1e-4 < ratios[0] < 1
    assert ratios[-1] < ratios[0] / 10  # worst cases compound, errors do not


def test_functionals_of_the_weights():
    model = build("llama")
    w = layer_matrices(model, block_map(model), 1)
    assert w.keys() == {"q", "k", "v", "o", "gate", "up", "down"}
    x = torch.empty(4000, 32, dtype=torch.float64).uniform_(-1, 1).sign()
    measured = omegas(model, block_map(model))[1]
    v = (x @ w["v"].T).view(-1, 2, 8).repeat_interleave(2, 1).flatten(1)
    assert (v @ w["o"].T).abs().max() <= measured.ov
    q, k = (x @ w["q"].T).view(-1, 4, 8), (x @ w["k"].T).view(-1, 2, 8).repeat_interleave(2, 1)
    scores = torch.einsum("ihd,jhd->hij", q[:500], k[:500]).abs().max() / math.sqrt(8)
    assert 0.02 * measured.kq < scores <= measured.kq / 2
    sizes = {r: w[r].abs().sum(1).max().item() for r in w}
    assert measured.ud == pytest.approx(max(sizes["up"], sizes["gate"]) * sizes["down"])
    fused = layer_matrices(build("gpt2"), block_map(build("gpt2")), 0)
    attn = build("gpt2").transformer.h[0].attn
    assert torch.equal(fused["k"], attn.c_attn.weight.detach().double().T[32:64])
    assert fused["o"].shape == (32, 32)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.ffn = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x):
        return x + self.ffn(self.norm(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(64, 32), nn.Linear(32, 64)
        self.layers = nn.ModuleList(Block() for _ in range(4))

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def test_plain_module():
    torch.manual_seed(0)
    model = Plain()
    profile = profile_depth(model, IDS)
    assert [p.name for p in profile.points] == [f"layers.{n}.ffn" for n in range(4)]
    assert all(1e-4 < p.linf[2] < 0.05 for p in profile.points)
    assert math.isnan(profile.omegas[0].ov)
    silent = profile_depth(model, IDS, low=lambda m: m.double())
    assert all(p.linf[2] == 0 for p in silent.points)
    assert math.isnan(silent.slope)


def test_models_without_layers_or_of_other_families():
    with pytest.raises(CheckError, match="stack of layers"):
        profile_depth(nn.ModuleDict({"fc1": nn.Linear(4, 4)}), torch.zeros(1, 4))
    with pytest.raises(CheckError, match="knows gpt2, llama"):
        next(stream_bounds(nn.Linear(2, 2), IDS, "fp32"))


def test_rotary_frequencies_stay_fp32():
    low = low_copy(build("llama"), torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in low.buffers()} == {torch.float32}
    assert torch.equal(low.model.rotary_emb.inv_freq, build("llama").model.rotary_emb.inv_freq)
    assert profile_depth(build("llama"), IDS, low=low_copy_of(torch.bfloat16)).points == (
        profile_depth(build("llama"), IDS, low=torch.bfloat16).points
    )


def low_copy_of(dtype):
    return lambda model: low_copy(model, dtype)


def test_slope_and_mode():
    assert log_slope([1.0, math.e, math.e**2]) == pytest.approx(1)
    assert math.isnan(log_slope([1.0]))
    with fp64():
        assert torch.ones(2).double().float().dtype is torch.float64
        assert torch.ones(2, dtype=torch.float64).to(torch.float32).dtype is torch.float64
    assert torch.ones(2).double().float().dtype is torch.float32
