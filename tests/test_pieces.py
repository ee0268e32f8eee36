"""Every element of every parameter in exactly one piece, of the block type that it is."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import halfulp
from halfulp.pieces import PIECE_TYPES, pieces
from tests.sharpness.oracles import TINY, causal_lm, tiny
from tests.test_fused import MODELS

_SMALL = {
    "hidden_size": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "head_dim": 4,
}
PLAIN = {
    "llama": _SMALL,
    "mistral": _SMALL,
    "qwen2": _SMALL,
    "qwen3": _SMALL,
    "gemma2": _SMALL,
    "olmo2": _SMALL,
    "mixtral": _SMALL | {"num_local_experts": 3},
    "opt": {
        "hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 2, "ffn_dim": 32,
        "max_position_embeddings": 32, "word_embed_proj_dim": 16, "pad_token_id": 1,
    },
}  # fmt: skip
HINTS = {"mixtral": {"*.experts.*": "ffn:fp32", "*.mlp.gate.weight": "router:fp32"}}
TIED = {"gpt2", "gemma2", "opt"}


def small(name: str) -> torch.nn.Module:
    if name in MODELS:
        return causal_lm(MODELS[name][0], attention="eager", **MODELS[name][1])
    return causal_lm(name, attention="eager", **PLAIN[name])


@pytest.mark.parametrize("name", [*PLAIN, *MODELS])
def test_every_element_is_in_exactly_one_piece(name):
    model = small(name)
    parts = pieces(model, HINTS.get(name))
    counts = {n: torch.zeros(p.shape, dtype=torch.int64) for n, p in model.named_parameters()}
    for part in parts:
        view = part.of(counts[part.parameter])
        assert view.numel() == part.numel
        view += 1
    assert all(bool((c == 1).all()) for c in counts.values())
    assert {p.kind for p in parts} <= set(PIECE_TYPES) - {"qkvo"}
    assert {"emb", "qk", "vo", "ffn", "norm"} <= {p.kind for p in parts}
    assert len({p.name for p in parts}) == len(parts)
    tied = sum(p.numel() for p in model.parameters())
    assert sum(p.numel for p in parts) == tied
    if name in TIED:
        assert "head" not in {p.kind for p in parts}


def test_what_the_paper_has_no_type_for():
    kinds = {p.parameter: p.kind for p in pieces(small("gpt2"))}
    assert kinds["transformer.wte.weight"] == "emb"
    assert kinds["transformer.wpe.weight"] == "pos"
    assert kinds["transformer.h.0.mlp.c_fc.bias"] == "bias"
    assert kinds["transformer.h.0.ln_1.bias"] == "bias"
    assert kinds["transformer.h.0.ln_1.weight"] == "norm"
    kinds = {p.parameter: p.kind for p in pieces(small("qwen3"))}
    assert kinds["model.layers.1.self_attn.q_norm.weight"] == "qk_norm"
    assert kinds["model.layers.1.input_layernorm.weight"] == "norm"
    assert kinds["model.norm.weight"] == "norm"
    kinds = {p.parameter: p.kind for p in pieces(small("mixtral"), HINTS["mixtral"])}
    assert "router" in kinds.values()


def test_tied_weights_are_measured_once():
    """The gradient of a tied table holds both of its uses, and so does the exact curvature."""
    model = tiny("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    report = halfulp.sharpness(model, torch.arange(8).view(1, 8), draws=2)
    assert report.by_type["emb"].parameters == model.lm_head.weight.numel()
    assert "head" not in report.by_type


def test_a_tied_and_an_untied_model_of_the_same_numbers():
    """Curvature in a tied table: its uses as a table, as a head, and both together."""
    config = AutoConfig.for_model(
        "llama", vocab_size=20, bos_token_id=None, eos_token_id=None, **TINY["llama"]
    )
    untied = AutoModelForCausalLM.from_config(config).double().eval()
    config.tie_word_embeddings = True
    tied = AutoModelForCausalLM.from_config(config).double().eval()
    with torch.no_grad():
        untied.lm_head.weight.copy_(untied.model.embed_tokens.weight)
    state = {k: v for k, v in untied.state_dict().items() if k != "lm_head.weight"}
    tied.load_state_dict(state, strict=False)
    batch = torch.arange(16).view(2, 8)
    one = halfulp.sharpness(tied, batch, draws=4).by_type
    two = halfulp.sharpness(untied, batch, draws=4).by_type
    assert one["ffn"].trace == pytest.approx(two["ffn"].trace, rel=1e-9)  # the same labels
    assert one["emb"].trace > two["head"].trace
    assert one["emb"].trace != pytest.approx(two["emb"].trace, rel=1e-3)
