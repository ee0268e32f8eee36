"""Every row of the table of fused projections, by what zeroing the rows does to attention."""

import pytest
import torch
from torch import nn

from halfulp.fused import layout
from halfulp.pieces import pieces
from tests.sharpness.oracles import causal_lm, ids

SMALL = {"hidden_size": 16, "num_attention_heads": 4, "num_hidden_layers": 1}
GPT2 = {"n_embd": 16, "n_head": 4, "n_layer": 1, "n_positions": 16}
FALCON = SMALL | {"bias": True, "alibi": False, "ffn_hidden_size": 32, "num_kv_heads": 4}
ONE = {"new_decoder_architecture": False}
MODELS = {
    "gpt2": ("gpt2", GPT2),
    "gpt_neox": ("gpt_neox", SMALL | {"intermediate_size": 32, "max_position_embeddings": 16}),
    "bloom": ("bloom", {"hidden_size": 16, "n_head": 4, "n_layer": 1}),
    "falcon, head by head": ("falcon", FALCON | ONE | {"multi_query": False}),
    "falcon, one key": ("falcon", FALCON | ONE | {"multi_query": True}),
    "falcon, groups": (
        "falcon", FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "mpt": ("mpt", {"d_model": 16, "n_heads": 4, "n_layers": 1, "max_seq_len": 16}),
    "phi3": (
        "phi3",
        SMALL | {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16},
    ),
    "gpt_bigcode, one key": ("gpt_bigcode", GPT2 | {"multi_query": True}),
    "gpt_bigcode, head by head": ("gpt_bigcode", GPT2 | {"multi_query": False}),
}  # fmt: skip
OUTPUTS = ("attn.c_proj", "attention.dense", "self_attn.o_proj", "attn.out_proj")
FUSED = ("c_attn", "query_key_value", "Wqkv", "qkv_proj")


class Attention:
    """A one-layer model whose attention probabilities and output can be seen."""

    def __init__(self, model_type: str, shape: dict):
        self.model = causal_lm(model_type, attention="eager", **shape)
        outputs = (*OUTPUTS, "self_attention.dense")
        (self.output,) = [n for n, _ in self.model.named_modules() if n.endswith(outputs)]
        (self.fused,) = [n for n, _ in self.model.named_modules() if n.endswith(FUSED)]
        # A bias is in no slice, and would go on after the weights are zero.
        bias = getattr(self.model.get_submodule(self.fused), "bias", None)
        if bias is not None:
            nn.init.zeros_(bias)

    def run(self, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(probabilities [rows, heads, T, T], what the output projection is given [rows, T, d])."""
        seen = []
        hook = self.model.get_submodule(self.output).register_forward_pre_hook(
            lambda _, args: seen.append(args[0])
        )
        with torch.no_grad():
            out = self.model(ids(seed=seed), output_attentions=True)
        hook.remove()
        return out.attentions[0], seen[0]

    def zero(self, kind: str) -> None:
        (piece,) = [
            p for p in pieces(self.model) if p.kind == kind and p.parameter.startswith(self.fused)
        ]
        with torch.no_grad():
            piece.of(self.model.get_parameter(piece.parameter)).zero_()


@pytest.mark.parametrize("name", MODELS)
def test_zeroed_values_leave_the_probabilities_and_nothing_to_attend_to(name):
    attention = Attention(*MODELS[name])
    before, output = attention.run(1)
    assert output.abs().amin((0, 1)).max() > 1e-3
    attention.zero("vo")
    after, output = attention.run(1)
    assert torch.equal(before, after)
    assert not output.any()


@pytest.mark.parametrize("name", MODELS)
def test_zeroed_queries_and_keys_leave_attention_blind(name):
    attention = Attention(*MODELS[name])
    (one, first), (other, _) = attention.run(1), attention.run(2)
    assert (one - other).abs().max() > 0.05
    attention.zero("qk")
    (one, after), (other, _) = attention.run(1), attention.run(2)
    assert torch.equal(one, other)
    if MODELS[name][0] not in ("bloom", "mpt"):  # whose ALiBi prefers the near
        length = one.shape[-1]
        uniform = torch.ones(length, length).tril() / torch.arange(1.0, length + 1).unsqueeze(1)
        assert torch.allclose(one, uniform.expand_as(one))
    # The first position sees itself alone: what it hands on is its value, still there.
    assert torch.allclose(after[:, 0], first[:, 0], atol=1e-6)


def test_what_no_table_knows_stays_one_piece():
    assert layout(None, "c_attn") is None
    model = Attention(*MODELS["gpt2"]).model
    assert layout(model.config, "W_pack") is None
    model.config.model_type = "gpt2_of_mine"
    assert [p.kind for p in pieces(model) if "c_attn.weight" in p.name] == ["qkvo"]
