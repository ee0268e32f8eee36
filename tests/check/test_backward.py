"""Errors of the GEMMs of a training step: prediction against products, hand-made and real ones."""

import math
import statistics

import pytest
import torch
from torch import nn

import halfulp
from halfulp.check.backward import BIAS, GemmErrors, gemm_errors
from halfulp.errors import CheckError, PolicyError
from halfulp.formats import format_quantizer
from halfulp.numerics.apply import apply_quantizer
from halfulp.policy import Policy

PRODUCTS = ("fprop", "dgrad", "wgrad")
SR = "e4m3@tensor:current:p2:stochastic"
# sqrt(2 · 0.18) u for two operands with log-uniform mantissas (spec 1.2), twice the variance for SR
EXPECTED = {"bf16": 0.6 * 2**-8, "e4m3": 0.6 * 2**-4, "e5m2": 0.6 * 2**-3, SR: 0.85 * 2**-4}


def tiny(kind: str):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": 64}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
        for p in model.parameters():  # as if trained: heavier tails than at the start
            with torch.no_grad():
                p.mul_(torch.randn_like(p).mul(0.7).exp())
    tokens = torch.randint(64, (4, 33), generator=torch.Generator().manual_seed(1))

    def loss():
        logits = model(tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def errors(request) -> GemmErrors:
    model, loss = tiny(request.param)
    return gemm_errors(model, loss, formats=[*EXPECTED, "fp32", "e4m3:overflow"])


def rows(errors: GemmErrors, word: str, which: str) -> list:
    return [r for r in errors.rows if (r.format, r.which) == (word, which)]


@pytest.mark.parametrize("which", PRODUCTS)
@pytest.mark.parametrize("word", list(EXPECTED))
def test_prediction_meets_measurement(errors, word, which):
    found = rows(errors, word, which)
    assert len(found) >= 13
    assert {r.role for r in found} == {"linear", "head", "attn_qk", "attn_pv"}
    assert 0.9 < statistics.median(r.ratio for r in found) < 1.1
    assert all(0.7 < r.ratio < 1.4 for r in found)
    middle = statistics.median(r.measured_rel for r in found)
    assert 0.6 * EXPECTED[word] < middle < 1.2 * EXPECTED[word]


def test_nothing_is_wrong_in_fp32(errors):
    for which in PRODUCTS:
        assert all(r.measured_rel < 1e-6 for r in rows(errors, "fp32", which))
        assert all(r.predicted_rel == 0 for r in rows(errors, "fp32", which))


def test_flushing_is_bias_and_not_variance(errors):
    """Unscaled e4m3 flushes gradients below 2^-10: the products shrink, some to nothing."""
    for which in ("dgrad", "wgrad"):
        found = [r for r in rows(errors, "e4m3:overflow", which) if r.flushed_energy > 0.2]
        assert len(found) > 3
        for r in found:
            assert r.biased
            assert r.measured_bias < -BIAS
            assert r.predicted_bias == pytest.approx(r.measured_bias, abs=0.15)
            assert r.flushed >= r.flushed_energy
    for word in ("bf16", SR):
        assert not any(r.biased for which in PRODUCTS for r in rows(errors, word, which))


def test_products_of_one_linear_by_hand():
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(48, n, generator=generator) for n in (64, 32))
    model = nn.ModuleDict({"down_proj": nn.Linear(64, 32, bias=False)})
    w = model["down_proj"].weight.detach()
    x.requires_grad_()
    found = gemm_errors(
        model, lambda: (model["down_proj"](x) * g).sum(), formats=["e5m2/e4m3", "mxfp8"]
    )
    operands = {"fprop": (x, w), "dgrad": (g, w.t()), "wgrad": (g.t(), x.detach().t())}
    for r in found.rows:
        a, b = (t.detach().contiguous() for t in operands[r.which])
        first = "e5m2" if r.format == "e5m2/e4m3" and r.which != "fprop" else None
        words = (first or r.format.split("/")[-1], r.format.split("/")[-1])
        qa, qb = (
            apply_quantizer(t, format_quantizer(v)).double()
            for t, v in zip((a, b), words, strict=True)
        )
        y = a.double() @ b.double().t()
        error = qa @ qb.t() - y
        assert r.measured_rel == pytest.approx(float(error.norm() / y.norm()), rel=1e-9)
        assert r.measured_bias == pytest.approx(float((error * y).sum() / y.norm() ** 2), abs=1e-9)
    assert len(found.rows) == 6


def test_measured_error_is_that_of_a_quantized_run():
    """Rounding only the wgrad operands of one GEMM changes its gradient by exactly that much."""
    model, loss = tiny("llama")
    name, p = "layers.1.ffn.up_proj", model.model.layers[1].mlp.up_proj.weight
    row = next(
        r
        for r in gemm_errors(model, loss, formats=["e4m3"]).rows
        if (r.gemm, r.which) == (name, "wgrad")
    )
    loss().backward()
    exact, p.grad = p.grad, None
    wgrad = {"wgrad": "e4m3@tensor:current:p2"}
    table = {
        "recipes": {"one": {"extends": "fp32", "linear": wgrad}},
        "rule": [{"match": name, "recipe": "one"}, {"match": "*", "recipe": "fp32"}],
    }
    halfulp.quantize(model, Policy.from_table(table))
    loss().backward()
    assert float((p.grad - exact).norm() / exact.norm()) == pytest.approx(
        row.measured_rel, rel=1e-4
    )


def test_prediction_alone_and_the_model_unchanged():
    model, loss = tiny("llama")
    classes, before = [type(m) for m in model.modules()], loss().item()
    implementation = model.config._attn_implementation
    found = gemm_errors(
        model, loss, formats=["e4m3"], which=["wgrad"], attention=False, measure=False
    )
    assert {r.which for r in found.rows} == {"wgrad"}
    assert not any(r.role.startswith("attn") for r in found.rows)
    assert all(math.isnan(r.measured_rel) and r.predicted_rel > 0.01 for r in found.rows)
    assert [type(m) for m in model.modules()] == classes
    assert model.config._attn_implementation == implementation
    assert loss().item() == before
    assert all(p.grad is None for p in model.parameters())


def test_seeds_differ_and_repeat():
    model, loss = tiny("llama")

    def measured(seed):
        found = gemm_errors(model, loss, formats=[SR], which=["dgrad"], seed=seed)
        return [r.measured_rel for r in found.rows]

    assert measured(0) == measured(0) != measured(1)


def test_errors_answer():
    model, loss = tiny("llama")
    with pytest.raises(CheckError, match="no GEMM ran"):
        gemm_errors(model, lambda: torch.zeros(()), formats=["bf16"])
    halfulp.quantize(model, "bf16_amp")
    with pytest.raises(PolicyError, match="quantized already"):
        gemm_errors(model, loss)


def test_attention_outside_the_interface_is_skipped_by_name():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                self.add_module(name, nn.Linear(8, 8))

        def forward(self, x):
            p = (self.q_proj(x) @ self.k_proj(x).mT).softmax(-1)
            return self.o_proj(p @ self.v_proj(x))

    model = nn.ModuleDict({"attn": Block()})
    found = gemm_errors(model, lambda: model["attn"](torch.ones(2, 3, 8)).sum(), formats=["bf16"])
    assert set(found.skipped) == {"layers.0.attn.qk", "layers.0.attn.pv"}
    assert len({r.gemm for r in found.rows}) == 4
