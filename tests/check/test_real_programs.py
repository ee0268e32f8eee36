"""Sums of prices against programs that PyTorch runs (A7), policies, and flips (A9)."""

import pytest
import torch

from halfulp.check.detect import guard
from halfulp.check.measure import measure, measure_policy, measure_target, uniform
from halfulp.check.prices import price
from halfulp.check.reference import predicted_flips
from halfulp.check.survey import survey
from halfulp.check.trace import trace
from tests.check.toys import trained, untrained

FAMILIES = ("gpt2", "llama")


# A7: the sum of prices against programs that PyTorch runs.


def predicted_and_real(model, ids, target: str, *, probes: int = 4, without: str = ""):
    traced = trace(model, ids, target)
    prices = price(
        model, ids, formats=(traced.format,), sites=traced.names, probes=probes, margins=False
    )
    names = {s.name for s in prices.sites if not (without and f"{s.kind} {s.op}" == without)}
    real = measure_target(model, ids, target, prices.reference)
    unknown = [s.name for s, kl in zip(prices.sites, prices.kl[:, 0], strict=True) if kl.isnan()]
    # Falcon makes RoPE's tables and, with ALiBi, does not use them.
    assert all("rotary" in name for name in unknown)
    assert len(unknown) in (0, 2)
    return prices.total(traced.format, names), real.kl, prices, traced


@pytest.mark.parametrize("target", ["bf16", "fp16", "autocast-bf16"])
@pytest.mark.parametrize("family", [*FAMILIES, "qwen3"])
def test_random_models_in_real_programs(family, target):
    ids = trained("llama").batch(4)
    predicted, real, prices, traced = predicted_and_real(untrained(family), ids, target)
    assert 0.75 <= predicted / real <= 1.35
    if target != "fp16":  # its mask is −65504, which the trace takes for a value
        assert traced.names == {s.name for s in prices.sites}


@pytest.mark.parametrize("target", ["bf16", "fp16", "autocast-bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_trained_models_in_real_programs(family, target):
    toy = trained(family)
    ids = toy.batch(8)
    predicted, real, prices, traced = predicted_and_real(toy.model, ids, target)
    assert 0.75 <= predicted / real <= 1.35
    plan = uniform([s.name for s in prices.sites], traced.format)
    assert measure(toy.model, ids, plan, prices.reference).kl == pytest.approx(real, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["bf16", "fp16", "autocast-bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_six_layers_in_real_programs(family, target):
    toy = trained(family, "full")
    ids = toy.batch(8)
    predicted, real, _, _ = predicted_and_real(toy.model, ids, target, probes=8)
    assert 0.75 <= predicted / real <= 1.35
    if family == "gpt2" and target != "autocast-bf16":
        fewer, real, _, _ = predicted_and_real(toy.model, ids, target, without="scores mul")
        assert fewer / real <= 0.85


SMALL = {
    "vocab_size": 257,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def architecture(name: str, **fields) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SMALL | fields))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gemma2", {"num_key_value_heads": 2, "head_dim": 16}),  # caps scores and logits
        ("falcon", {"alibi": True}),  # a table made in the forward pass
        ("phi", {}),  # partial rotation, parallel blocks
    ],
)
def test_other_architectures_in_real_programs(name, fields):
    model, ids = architecture(name, **fields), trained("llama").batch(2)
    for target in ("bf16", "autocast-bf16"):
        predicted, real, prices, _ = predicted_and_real(model, ids, target)
        assert 0.75 <= predicted / real <= 1.35
        plan = uniform([s.name for s in prices.sites], "bf16")
        assert measure(model, ids, plan, prices.reference).kl == pytest.approx(real, rel=0.1)


def test_experts_are_simulated_and_their_router_is_named():
    model = architecture("mixtral", num_key_value_heads=2, num_local_experts=4)
    hints = {"*.mlp.gate.weight": "router:fp32", "*.experts.*": "ffn:fp32"}
    ids = trained("llama").batch(2)
    names = trace(model, ids, "bf16", hints=hints).names
    p = price(model, ids, formats=("bf16",), sites=names, margins=False, hints=hints)
    real = measure_target(model, ids, "bf16", p.reference)
    simulated = measure(model, ids, uniform(names, "bf16"), p.reference, hints=hints)
    assert simulated.kl == pytest.approx(real.kl, rel=0.02)
    assert p.total("bf16") > 0.2 * real.kl
    findings = guard(model, survey(model, ids, hints=hints))
    assert "router" in {f.kind for f in findings}
    assert "router" not in {
        f.kind for f in guard(untrained("llama"), survey(untrained("llama"), ids))
    }


def test_rope_cast_by_a_plain_to_is_traced_and_priced():
    toy = trained("llama")
    ids = toy.batch(4)
    kept, cast = (trace(toy.model, ids, "bf16", buffers=b).names for b in (False, True))
    assert {n for n in cast - kept if n.startswith("buffer:")} == {
        "buffer:model.rotary_emb.inv_freq",
        "buffer:model.rotary_emb.original_inv_freq",
    }
    p = price(toy.model, ids, formats=("bf16",), sites=cast, probes=4, margins=False)
    real = [measure_target(toy.model, ids, "bf16", p.reference, buffers=b) for b in (False, True)]
    assert real[1].kl != real[0].kl
    assert 0.75 <= p.total("bf16") / real[1].kl <= 1.35
    assert p.kl[p.index("buffer:model.rotary_emb.inv_freq"), 0] > 0


def test_a_wrong_list_of_sites_shows():
    toy = trained("gpt2")
    ids = toy.batch(4)
    every = price(toy.model, ids, formats=("bf16",), probes=4, margins=False)
    _, real, traced, _ = predicted_and_real(toy.model, ids, "autocast-bf16")
    # All operations cost more than those that the program rounds; many stay in fp32.
    assert every.total("bf16") > traced.total("bf16")
    some = {s.name for s in traced.sites if s.kind not in ("scores", "residual", "logits")}
    assert traced.total("bf16", some) / real < 0.75


# A9: flips.


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_flips_of_six_thousand_tokens(family):
    toy = trained(family)
    ids = toy.batch(48)
    names = trace(toy.model, ids, "bf16").names
    prices = price(toy.model, ids, formats=("bf16", "e4m3"), sites=names)
    assert prices.reference.tokens >= 6000
    for word in prices.formats:
        variance = prices.total_margin_variance(word)
        found = measure(toy.model, ids, uniform(names, word), prices.reference)
        assert 0.6 <= predicted_flips(prices.reference, variance) / found.flips <= 1.7
        sigma = (variance / found.distance.margin_variance) ** 0.5
        assert 0.85 <= sigma <= 1.25
        many = predicted_flips(prices.reference, variance, alternatives=16)
        assert many >= predicted_flips(prices.reference, variance) * 0.8


# What a policy really runs.


def test_operand_sites_are_what_a_policy_rounds(tmp_path):
    toy = trained("llama")
    ids = toy.batch(4)
    path = tmp_path / "policy.toml"
    path.write_text(
        '[recipes.here]\nextends = "te_current"\nhead = "linear"\n'
        'attn_qk = "linear"\nattn_pv = "linear"\nembed = "fp32"\nnorm = "fp32"\n'
        '[recipes.here.linear]\nfprop_x = "e4m3@1x32:e8m0_up"\nfprop_w = "e4m3@1x32:e8m0_up"\n'
        'fprop_out = "fp32"\naccumulate = "fp32"\n[[rule]]\nmatch = "*"\nrecipe = "here"\n'
    )
    prices = price(toy.model, ids, formats=("mxfp8",), families=("operand",), probes=4)
    plan = uniform([s.name for s in prices.sites], "mxfp8")
    simulated = measure(toy.model, ids, plan, prices.reference)
    quantized = measure_policy(toy.model, ids, path, prices.reference)
    assert simulated.kl == pytest.approx(quantized.kl, rel=0.02)
    assert prices.total("mxfp8") == pytest.approx(quantized.kl, rel=0.35)
    assert simulated.kl > 1e-4
