"""Block maps: every parameter once, the right GEMMs per layer, and errors that name and cure."""

import logging

import pytest
import torch
from torch import nn

from halfulp.block_names import block_type, globbed, layer_of
from halfulp.block_survey import is_gemm_module
from halfulp.blocks import BlockMap, block_map
from halfulp.errors import PolicyError

BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
HEADS = BASE | {"head_dim": 8}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32}
OPT = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OPT |= {"vocab_size": 64, "max_position_embeddings": 32}
MOE = BASE | {"num_local_experts": 4}

SPLIT = {"qk": ["q_proj", "k_proj"], "vo": ["v_proj", "o_proj"]}
GATED = {"ffn": ["gate_proj", "up_proj", "down_proj"]}
NEOX = {
    "qk": ["query_key_value"],
    "vo": ["dense"],
    "ffn": ["dense_h_to_4h", "dense_4h_to_h"],
}
# architecture: config, GEMMs of a layer by block type, parameters of a layer by block type,
# number of parameters in (emb, norm, head)
ARCHITECTURES = {
    "gpt2": (
        GPT2,
        {"qk": ["c_attn"], "vo": ["c_proj"], "ffn": ["c_fc", "c_proj"]},
        {"qk": 2, "vo": 2, "ffn": 4, "norm": 4},
        (2, 2, 0),
    ),
    "llama": (BASE, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 2}, (1, 1, 1)),
    "qwen2": (BASE, SPLIT | GATED, {"qk": 4, "vo": 3, "ffn": 3, "norm": 2}, (1, 1, 1)),
    "qwen3": (HEADS, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 4}, (1, 1, 1)),
    "mistral": (BASE, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 2}, (1, 1, 1)),
    "gemma": (HEADS, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 2}, (1, 1, 0)),
    "gemma2": (HEADS, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 4}, (1, 1, 0)),
    "gemma3_text": (HEADS, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 6}, (1, 1, 0)),
    "olmo2": (BASE, SPLIT | GATED, {"qk": 2, "vo": 2, "ffn": 3, "norm": 4}, (1, 1, 1)),
    "gpt_neox": (BASE, NEOX, {"qk": 2, "vo": 2, "ffn": 4, "norm": 4}, (1, 2, 1)),
    "falcon": (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64},
        NEOX,
        {"qk": 1, "vo": 1, "ffn": 2, "norm": 2},
        (1, 2, 0),
    ),
    "opt": (
        OPT,
        {"qk": ["k_proj", "q_proj"], "vo": ["v_proj", "out_proj"], "ffn": ["fc1", "fc2"]},
        {"qk": 4, "vo": 4, "ffn": 4, "norm": 4},
        (2, 2, 0),
    ),
    "phi": (
        BASE,
        {"qk": ["q_proj", "k_proj"], "vo": ["v_proj", "dense"], "ffn": ["fc1", "fc2"]},
        {"qk": 4, "vo": 4, "ffn": 4, "norm": 2},
        (1, 2, 2),
    ),
    "phi3": (
        BASE | {"pad_token_id": 0},
        {"qk": ["qkv_proj"], "vo": ["o_proj"], "ffn": ["gate_up_proj", "down_proj"]},
        {"qk": 1, "vo": 1, "ffn": 2, "norm": 2},
        (1, 1, 1),
    ),
    "mpt": (
        {"d_model": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_seq_len": 32},
        {"qk": ["Wqkv"], "vo": ["out_proj"], "ffn": ["up_proj", "down_proj"]},
        {"qk": 1, "vo": 1, "ffn": 2, "norm": 2},
        (1, 1, 0),
    ),
}


def tiny(architecture: str, config: dict) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)  # special tokens beyond a tiny vocab
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **config))


def names_of(blocks: BlockMap, block: str) -> list[str]:
    return [g.name.removeprefix(f"{block}.") for g in blocks.gemms if g.block == block]


def check_complete(model: nn.Module, blocks: BlockMap) -> None:
    """Each parameter and each GEMM module exactly once; names unique; blocks well-formed."""
    assert list(blocks.parameters) == [name for name, _ in model.named_parameters()]
    linears = [g.module for g in blocks.gemms if not g.role.startswith("attn")]
    assert linears == [n for n, m in model.named_modules() if is_gemm_module(m)]
    assert len({g.name for g in blocks.gemms}) == len(blocks.gemms)
    for gemm in blocks.gemms:
        assert gemm.name.startswith(f"{gemm.block}.")
        assert gemm.parts[0] == gemm.block
    tables = {n for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert set(blocks.embeddings) == tables


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_architecture(architecture: str):
    config, gemms, parameters, (emb, norm, head) = ARCHITECTURES[architecture]
    model = tiny(architecture, config)
    blocks = block_map(model)
    check_complete(model, blocks)
    assert blocks.layers == 2
    for layer in range(2):
        for kind, names in gemms.items():
            assert names_of(blocks, f"layers.{layer}.{kind}") == names
        assert names_of(blocks, f"layers.{layer}.attn") == ["qk", "pv"]
    # Nothing else: two attention GEMMs and the linears of each layer, and the head.
    assert len(blocks.gemms) == 2 * (2 + sum(map(len, gemms.values()))) + 1
    count = {row[0]: row[1] for row in blocks.rows()}
    for layer in range(2):
        for kind, expected in parameters.items():
            assert count.pop(f"layers.{layer}.{kind}") == expected
        assert count.pop(f"layers.{layer}.attn") == 0
    assert count == {"emb": emb, "norm": norm, "head": head}
    per_norm = 2 if norm == 2 else 1
    norms = [n for n, b in blocks.norms.items() if b == "norm"]
    assert len(norms) == norm / per_norm


def test_gpt2_fused_and_tied():
    blocks = block_map(tiny("gpt2", GPT2))
    fused = next(g for g in blocks.gemms if g.name == "layers.1.qk.c_attn")
    assert fused.parts == ("layers.1.qk", "layers.1.vo")
    assert fused.module == "transformer.h.1.attn.c_attn"
    assert fused.role == "linear"
    head = blocks.gemms[-1]
    assert (head.name, head.role, head.block) == ("head.lm_head", "head", "head")
    assert blocks.parameters["transformer.wte.weight"] == "emb"
    assert blocks.parameters["transformer.wpe.weight"] == "emb"
    assert blocks.parameters["transformer.h.1.attn.c_attn.bias"] == "layers.1.qk"
    attention = next(g for g in blocks.gemms if g.role == "attn_pv")
    assert attention.name == "layers.0.attn.pv"
    assert attention.module == "transformer.h.0.attn"
    # QK and PV come after the projections of their attention, before the MLP.
    order = [g.name for g in blocks.gemms if layer_of(g.name) == 0]
    assert [n.partition("0.")[2] for n in order] == [
        "qk.c_attn", "vo.c_proj", "attn.qk", "attn.pv", "ffn.c_fc", "ffn.c_proj",
    ]  # fmt: skip


def test_opt_projections_around_the_layers():
    blocks = block_map(tiny("opt", OPT | {"word_embed_proj_dim": 16}))
    assert names_of(blocks, "emb") == ["project_in"]
    assert names_of(blocks, "head") == ["project_out", "lm_head"]
    # The final norm shares its name with a norm of each layer.
    assert blocks.norms["model.decoder.final_layer_norm"] == "norm"
    assert blocks.norms["model.decoder.layers.1.final_layer_norm"] == "layers.1.norm"


def test_the_output_of_the_feed_forward_of_t5_is_no_output_projection():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=64)
    with torch.device("meta"):
        model = T5ForConditionalGeneration(config)
    blocks = block_map(model)
    check_complete(model, blocks)
    assert blocks.layers == 4
    for layer in range(4):
        assert names_of(blocks, f"layers.{layer}.ffn") == ["wi", "wo"]
    assert names_of(blocks, "layers.0.vo") == ["v", "o"]


def test_qk_norm_gains_are_norms():
    blocks = block_map(tiny("qwen3", HEADS))
    assert blocks.norms["model.layers.1.self_attn.q_norm"] == "layers.1.norm"
    assert blocks.parameters["model.layers.1.self_attn.k_norm.weight"] == "layers.1.norm"


def test_experts_as_3d_parameters_are_an_error_that_shows_the_hint():
    model = tiny("mixtral", MOE)
    with pytest.raises(PolicyError) as error:
        block_map(model)
    text = str(error.value)
    assert "'model.layers.*.mlp.experts.gate_up_proj': 'ffn:fp32'" in text
    assert "'model.layers.*.mlp.gate.weight': 'router:fp32'" in text
    assert "(4, 128, 32)" in text
    hints = {
        "model.layers.*.mlp.experts.gate_up_proj": "ffn:fp32",
        "model.layers.*.mlp.experts.down_proj": "ffn:fp32",
        "model.layers.*.mlp.gate.weight": "router:fp32",
    }
    blocks = block_map(model, hints)
    check_complete(model, blocks)
    assert blocks.parameters["model.layers.1.mlp.experts.down_proj"] == "layers.1.ffn"
    assert blocks.parameters["model.layers.1.mlp.gate.weight"] == "layers.1.router"
    assert names_of(blocks, "layers.0.ffn") == []
    assert len(blocks.unquantized) == 6
    last = str(blocks).splitlines()[-1]
    assert last.startswith("unquantized: model.layers.*.mlp.gate.weight, model.layers.*.mlp.expe")
    # Claiming that they can be quantized does not help.
    with pytest.raises(PolicyError, match=r"experts\.down_proj': 'ffn:fp32'"):
        block_map(model, hints | {"model.layers.*.mlp.experts.down_proj": "ffn"})


class Experts(nn.Module):
    """A mixture of experts as most plain code writes it."""

    def __init__(self, experts: int = 3):
        super().__init__()
        self.gate = nn.Linear(8, experts, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(8, 16)}) for _ in range(experts)
        )


class Attention(nn.Module):
    def __init__(self, names: tuple[str, ...] = ("wq", "wk", "wv", "wo")):
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(8, 8, bias=False))


class Plain(nn.Module):
    """A transformer without transformers, e.g. nanoGPT or torchtitan."""

    def __init__(self, layers: nn.Module, **others: nn.Module):
        super().__init__()
        self.tok_embeddings = nn.Embedding(16, 8)
        self.layers = layers
        self.norm = nn.RMSNorm(8)
        self.output = nn.Linear(8, 16, bias=False)
        for name, module in others.items():
            self.add_module(name, module)


def layer(attention: nn.Module | None = None, ffn: nn.Module | None = None) -> nn.Module:
    parts = {"attention": attention or Attention(), "attention_norm": nn.RMSNorm(8)}
    return nn.ModuleDict(parts | {"feed_forward": ffn or nn.ModuleDict({"w1": nn.Linear(8, 8)})})


def test_experts_of_linears():
    model = Plain(nn.ModuleList([layer(ffn=Experts()) for _ in range(2)]))
    blocks = block_map(model)
    check_complete(model, blocks)
    router = next(g for g in blocks.gemms if g.role == "router")
    assert (router.name, router.block) == ("layers.0.router.gate", "layers.0.router")
    assert names_of(blocks, "layers.1.ffn") == ["experts.0.w1", "experts.1.w1", "experts.2.w1"]


def test_gate_without_experts_is_no_router():
    gated = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate", "up", "down")})
    blocks = block_map(Plain(nn.ModuleList([layer(ffn=gated)])))
    assert names_of(blocks, "layers.0.ffn") == ["gate", "up", "down"]


@pytest.mark.parametrize("container", ["ModuleList", "Sequential", "ModuleDict"])
def test_stacks(container: str):
    entries = [layer() for _ in range(3)]
    stack = {
        "ModuleList": lambda: nn.ModuleList(entries),
        "Sequential": lambda: nn.Sequential(*entries),
        "ModuleDict": lambda: nn.ModuleDict({str(i): e for i, e in enumerate(entries)}),
    }[container]()
    model = Plain(stack)
    blocks = block_map(model)
    check_complete(model, blocks)
    assert blocks.layers == 3
    assert blocks.parameters["layers.2.attention.wv.weight"] == "layers.2.vo"
    assert blocks.parameters["output.weight"] == "head"
    assert blocks.parameters["norm.weight"] == "norm"
    assert sum(g.role == "attn_qk" for g in blocks.gemms) == 3


def test_two_stacks_are_numbered_one_after_the_other():
    model = Plain(nn.ModuleList([layer(), layer()]), decoder=nn.ModuleList([layer()]))
    blocks = block_map(model)
    check_complete(model, blocks)
    assert blocks.layers == 3
    assert blocks.parameters["decoder.0.attention.wq.weight"] == "layers.2.qk"


def test_list_of_heads_is_no_stack_of_layers():
    heads = nn.ModuleList([nn.Linear(8, 16) for _ in range(2)])
    model = Plain(nn.ModuleList([layer()]), lm_heads=heads)
    blocks = block_map(model)
    check_complete(model, blocks)
    assert blocks.layers == 1
    assert names_of(blocks, "head") == ["output", "lm_heads.0", "lm_heads.1"]


def test_two_attentions_in_a_layer_have_different_names():
    both = layer()
    both.add_module("cross_attention", Attention())
    model = Plain(nn.ModuleList([both]))
    blocks = block_map(model)
    check_complete(model, blocks)
    assert names_of(blocks, "layers.0.attn") == [
        "attention.qk", "attention.pv", "cross_attention.qk", "cross_attention.pv",
    ]  # fmt: skip
    assert "cross_attention.wq" in names_of(blocks, "layers.0.qk")


def test_sequential_mlp_and_nanogpt_names():
    mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
    block = nn.ModuleDict({"ln_1": nn.LayerNorm(8), "attn": Attention(("c_attn", "c_proj"))})
    block.update({"ln_2": nn.LayerNorm(8), "mlp": mlp})
    body = {"wte": nn.Embedding(16, 8), "wpe": nn.Embedding(4, 8)}
    body |= {"h": nn.ModuleList([block]), "ln_f": nn.LayerNorm(8)}
    model = nn.Module()
    model.transformer = nn.ModuleDict(body)
    model.lm_head = nn.Linear(8, 16, bias=False)
    model.transformer["wte"].weight = model.lm_head.weight
    blocks = block_map(model)
    check_complete(model, blocks)
    assert names_of(blocks, "layers.0.ffn") == ["mlp.0", "mlp.2"]
    assert names_of(blocks, "layers.0.qk") == ["c_attn"]
    assert names_of(blocks, "layers.0.vo") == ["c_proj"]
    assert blocks.parameters["transformer.ln_f.weight"] == "norm"


def test_head_named_before_the_table_it_is_tied_to():
    model = nn.Module()
    model.lm_head = nn.Linear(8, 16, bias=False)
    model.wte = nn.Embedding(16, 8)
    model.wte.weight = model.lm_head.weight
    blocks = block_map(model)
    check_complete(model, blocks)
    assert blocks.parameters == {"lm_head.weight": "emb"}
    assert blocks.embeddings == {"wte": "emb"}


def test_module_without_stack_is_layer_0():
    model = nn.Module()
    model.attn = Attention()
    blocks = block_map(model)
    assert [g.name for g in blocks.gemms][-2:] == ["layers.0.attn.qk", "layers.0.attn.pv"]
    assert blocks.layers == 1


def test_adapters_inside_a_projection():
    attention = Attention(("k_proj", "v_proj", "o_proj"))
    attention.q_proj = nn.ModuleDict({"base": nn.Linear(8, 8), "lora_A": nn.Linear(8, 2)})
    blocks = block_map(Plain(nn.ModuleList([layer(attention)])))
    assert {g.module for g in blocks.gemms if g.role == "attn_qk"} == {"layers.0.attention"}
    assert names_of(blocks, "layers.0.qk") == ["k_proj", "base", "lora_A"]


def test_multihead_attention_hides_its_projections():
    attention = nn.ModuleDict({"mha": nn.MultiheadAttention(8, 2)})
    model = Plain(nn.ModuleList([layer(attention)]))
    with pytest.raises(PolicyError, match=r"layers\.\*\.attention\.mha\.out_proj\.weight") as error:
        block_map(model)
    assert "mha.in_proj_weight': 'qk+vo:fp32'" in str(error.value)
    blocks = block_map(model, {"*.mha.in_proj_*": "qk:fp32", "*.mha.out_proj*": "vo:fp32"})
    assert not any(g.module.startswith("layers.0.attention") for g in blocks.gemms)
    assert blocks.parameters["layers.0.attention.mha.in_proj_bias"] == "layers.0.qk"


class Scaled(nn.Linear):
    """A linear layer that does more than multiply, as routers, adapters and 8-bit layers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(x)


def test_linears_with_a_forward_of_their_own_are_no_gemm_that_can_be_replaced():
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x
    for linear, name in ((Scaled(8, 8), "Scaled"), (patched, "Linear")):
        model = Plain(nn.ModuleList([layer(ffn=nn.ModuleDict({"w1": linear}))]))
        with pytest.raises(PolicyError, match=f"in a {name}, which has a forward .* of its own"):
            block_map(model)
        blocks = block_map(model, {"layers.*.feed_forward.w1.weight": "ffn:fp32"})
        assert names_of(blocks, "layers.0.ffn") == []
        assert blocks.parameters["layers.0.feed_forward.w1.bias"] == "layers.0.ffn"


def strange() -> nn.Module:
    entry = nn.ModuleDict({"mixer": nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})})
    entry["mixer"].decay = nn.Parameter(torch.zeros(8))
    return Plain(nn.ModuleList([entry, entry, nn.ModuleDict({"mlp": nn.Linear(8, 8)})]))


def test_unknown_names_are_errors_with_hints():
    with pytest.raises(PolicyError) as error:
        block_map(strange())
    text = str(error.value)
    for part in (
        "'layers.*.mixer.a': 'ffn'",
        "'layers.*.mixer.decay': 'ffn'",
        "3 of the parameters",
    ):
        assert part in text
    assert "mlp" not in text


def test_hints():
    model = strange()
    blocks = block_map(model, {"*.mixer.a": "qk+vo", "*.decay": "norm", "*.mixer.b": "layers.7.vo"})
    check_complete(model, blocks)
    fused = next(g for g in blocks.gemms if g.module == "layers.0.mixer.a")
    assert fused.parts == ("layers.0.qk", "layers.0.vo")
    assert names_of(blocks, "layers.7.vo") == ["b"]
    assert blocks.layers == 8
    assert blocks.parameters["layers.0.mixer.decay"] == "layers.0.norm"
    # Queries and values under one module make an attention.
    assert [g.module for g in blocks.gemms if g.role == "attn_pv"] == ["layers.0.mixer"]


def test_hint_fp32_leaves_a_linear_alone():
    model = Plain(nn.ModuleList([layer()]))
    blocks = block_map(model, {"layers.0.feed_forward.w1": "ffn:fp32", "tok*": "emb:fp32"})
    assert "layers.0.feed_forward.w1" not in {g.module for g in blocks.gemms}
    assert blocks.parameters["layers.0.feed_forward.w1.weight"] == "layers.0.ffn"
    assert blocks.unquantized == ("tok_embeddings", "layers.0.feed_forward.w1")
    assert blocks.embeddings == {}


def test_first_hint_wins_over_tables_and_later_hints():
    model = Plain(nn.ModuleList([layer()]))
    blocks = block_map(model, {"*.wq": "ffn", "*.w?": "vo"})
    assert names_of(blocks, "layers.0.ffn") == ["wq"]
    assert names_of(blocks, "layers.0.vo") == ["wk", "wv", "wo", "w1"]


@pytest.mark.parametrize(
    ("hints", "found"),
    [
        ({"layers.*.attention.wx": "qk"}, r"layers\.\*\.attention\.w"),
        ({"*": "ffn", "*.wq": "qk"}, "earlier hint"),
        ({"*.wq": "qkv"}, "'qkv' is no block.*qk"),
        ({"*.wq": "layers.0.attn"}, "no block"),
        ({"*.wq": "qk:bf16"}, "'qk:bf16' is no block"),
        ({"*.wq": 3}, "hints = .*Give a mapping"),
        (["*.wq"], "hints = .*Give a mapping"),
    ],
)
def test_bad_hints(hints: dict, found: str):
    with pytest.raises(PolicyError, match=found):
        block_map(Plain(nn.ModuleList([layer()])), hints)


def test_layer_block_outside_the_stacks_needs_a_block_name():
    model = Plain(nn.ModuleList([layer()]), shared_mlp=nn.ModuleDict({"fc1": nn.Linear(8, 8)}))
    with pytest.raises(PolicyError, match=r"shared_mlp\.fc1.*'layers\.0\.ffn'"):
        block_map(model)
    blocks = block_map(model, {"shared_mlp.fc1": "layers.0.ffn"})
    assert names_of(blocks, "layers.0.ffn") == ["w1", "fc1"]


def test_the_hint_shown_for_a_linear_outside_the_layers_works():
    model = Plain(nn.ModuleList([layer()]), vocab_transform=nn.Linear(8, 8))
    with pytest.raises(PolicyError, match=r"hints=\{'vocab_transform': 'head'\}"):
        block_map(model)
    assert names_of(block_map(model, {"vocab_transform": "head"}), "head")[-1] == "vocab_transform"
    # A wrong hint is corrected by one that takes its place.
    with pytest.raises(PolicyError, match=r"hints=\{'vocab_transform': 'layers\.0\.ffn'\}"):
        block_map(model, {"vocab_transform": "ffn"})


def test_table_for_people():
    blocks = block_map(tiny("gpt2", GPT2))
    lines = str(blocks).splitlines()
    assert lines[0].split() == ["block", "parameters", "GEMMs"]
    assert "layers.0-1.qk             4  c_attn (+vo)" in lines
    assert "layers.0-1.attn           0  qk, pv" in lines
    assert ("layers.1.ffn", 4, "c_fc, c_proj") in blocks.rows()


def test_helpers():
    assert block_type("layers.3.vo") == "vo"
    assert block_type("head") == "head"
    assert layer_of("layers.12.qk.q_proj") == 12
    assert layer_of("head.lm_head") is None
    assert globbed("model.layers.3.mlp.0") == "model.layers.*.mlp.*"
