"""Policies: first match wins, everything decided, nothing unused, and TOML both ways."""

import dataclasses
import logging
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from halfulp.blocks import BlockMap, block_map
from halfulp.errors import PolicyError
from halfulp.policy import Policy, Resolution, Rule, load_recipe, recipe_names, refuse_partial


@cache
def blocks_of(architecture: str, layers: int = 2) -> BlockMap:
    from transformers import AutoConfig, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes: dict = {"vocab_size": 64, "num_hidden_layers": layers, "hidden_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    if architecture == "gpt2":
        sizes = {"vocab_size": 64, "n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    return block_map(model)


def policy(*rules: tuple[str, str]) -> Policy:
    return Policy(tuple(Rule(match, load_recipe(recipe)) for match, recipe in rules))


def by_gemm(resolution: Resolution) -> dict[str, str]:
    return {d.gemm.name: d.recipe.name for d in resolution.gemms}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("name", [*recipe_names(), "mask_e5m7_nearest"])
def test_every_recipe_resolves(architecture: str, name: str):
    blocks = blocks_of(architecture, 9)
    recipe = load_recipe(name)
    resolution = Policy.from_recipe(name).resolve(blocks)
    assert [d.gemm for d in resolution.gemms] == list(blocks.gemms)
    assert list(resolution.parameters) == list(blocks.parameters)
    assert resolution.blocks == blocks.parameters
    assert set(resolution.embeds) == set(blocks.embeddings)
    assert set(resolution.norms) == set(blocks.norms)
    for gemm, decided, spec, rule in resolution.gemms:
        assert spec is decided.gemms[gemm.role]
        assert resolution.rules[rule].recipe is decided
    kept = {f"layers.{i}." for k in recipe.keep for i in (*range(k.first), *range(9 - k.last, 9))}
    for gemm, decided, _, _ in resolution.gemms:
        expected = "bf16_amp" if gemm.name.startswith(tuple(kept)) else name
        assert decided.name == expected
    assert sum(count for _, _, count in resolution.rows()) == len(blocks.gemms)
    if recipe.not_simulated:
        with pytest.raises(PolicyError, match=name):
            refuse_partial(resolution, allow_partial=False)
    else:
        refuse_partial(resolution, allow_partial=False)
    refuse_partial(resolution, allow_partial=True)


def test_first_match_wins():
    rules = [
        ("layers.0.ffn.down_proj", "bf16_amp"),
        ("layers.*.ffn", "mxfp8"),
        ("layers.*.attn.pv", "fp8_unscaled"),
        ("head", "tf32"),
        ("*", "te_current"),
    ]
    resolution = policy(*rules).resolve(blocks_of("llama"))
    gemms = by_gemm(resolution)
    assert gemms["layers.0.ffn.down_proj"] == "bf16_amp"
    assert gemms["layers.1.ffn.down_proj"] == "mxfp8"
    assert gemms["layers.0.ffn.up_proj"] == "mxfp8"
    assert gemms["layers.1.attn.pv"] == "fp8_unscaled"
    assert gemms["layers.1.attn.qk"] == "te_current"
    assert gemms["head.lm_head"] == "tf32"
    assert resolution.rows() == [
        ("layers.0.ffn.down_proj", "bf16_amp", 1),
        ("layers.*.ffn", "mxfp8", 5),
        ("layers.*.attn.pv", "fp8_unscaled", 2),
        ("head", "tf32", 1),
        ("*", "te_current", 10),
    ]
    assert [r.name for r in resolution.recipes] == [name for _, name in rules]
    decision = next(d for d in resolution.gemms if d.gemm.role == "head")
    assert str(decision.spec.fprop_x) == "tf32"
    # A parameter follows its block, not a rule for one GEMM of it.
    assert resolution.parameters["model.layers.0.mlp.down_proj.weight"].name == "mxfp8"
    assert resolution.parameters["lm_head.weight"].name == "tf32"


def test_tied_head_is_stored_as_emb_and_multiplied_as_head():
    rules = [("head", "tf32"), ("emb", "bf16_pure"), ("*", "fp32")]
    resolution = policy(*rules).resolve(blocks_of("gpt2"))
    assert resolution.parameters["transformer.wte.weight"].name == "bf16_pure"
    assert by_gemm(resolution)["head.lm_head"] == "tf32"
    assert {str(q) for q in resolution.embeds.values()} == {"bf16"}
    assert set(resolution.embeds) == {"transformer.wte", "transformer.wpe"}
    assert {str(q) for q in resolution.norms.values()} == {"fp32"}


def test_norms_follow_their_block():
    rules = [("layers.0.norm", "mx_ocp"), ("norm", "bf16_pure"), ("*", "fp32")]
    norms = policy(*rules).resolve(blocks_of("llama")).norms
    assert str(norms["model.layers.0.input_layernorm"]) == "e4m3@1x32:e8m0_floor"
    assert str(norms["model.layers.1.input_layernorm"]) == "fp32"
    assert str(norms["model.norm"]) == "bf16"


def test_fused_gemm_whose_parts_disagree():
    blocks = blocks_of("gpt2")
    with pytest.raises(PolicyError) as error:
        policy(("layers.*.qk", "mxfp8"), ("*", "bf16_amp")).resolve(blocks)
    text = str(error.value)
    for part in ("layers.0.qk.c_attn", "layers.0.qk to mxfp8", "layers.0.vo to bf16_amp"):
        assert part in text
    assert 'match = "layers.*.qk.c_attn"' in text
    # Its own name decides, if it comes first; or the parts agree.
    rules = [("layers.*.qk.c_attn", "te_current"), ("layers.*.qk", "mxfp8"), ("*", "bf16_amp")]
    resolution = policy(*rules).resolve(blocks)
    assert by_gemm(resolution)["layers.1.qk.c_attn"] == "te_current"
    assert resolution.parameters["transformer.h.1.attn.c_attn.weight"].name == "mxfp8"
    with pytest.raises(PolicyError, match="in an earlier rule"):
        policy(rules[1], rules[0], rules[2]).resolve(blocks)
    rules = [("layers.*.qk", "mxfp8"), ("layers.*.vo", "mxfp8"), ("*", "bf16_amp")]
    assert by_gemm(policy(*rules).resolve(blocks))["layers.0.qk.c_attn"] == "mxfp8"
    # One part undecided: the GEMM is.
    with pytest.raises(PolicyError, match=r"no rule decides GEMM layers\.\*\.qk\.c_attn"):
        policy(("layers.*.qk", "mxfp8"), ("[!l]*", "fp32")).resolve(blocks)


@pytest.mark.parametrize(
    ("rules", "found"),
    [
        ([("layers.*.fnn", "mxfp8"), ("*", "fp32")], r"rule 1 .*Nearest names: layers\.\*\.ffn"),
        (
            [("layers.2.ffn", "mxfp8"), ("*", "fp32")],
            r"matches no GEMM and no block.*layers\.1\.ffn",
        ),
        ([("*", "fp32"), ("layers.*.ffn", "mxfp8")], r"rule 2 .* decides nothing: earlier rules"),
        ([("layers.*.ffn.*", "fp32")], "no rule decides .*GEMM head.lm_head.*parameters of emb"),
        ([("layers.*", "fp32"), ("head", "fp32")], "no rule decides parameters of emb, .* norm"),
        ([("Layers.*", "fp32"), ("*", "fp32")], "matches no GEMM"),
        (
            [("", "fp32"), ("*", "fp32")],
            r"names: emb, head, head.lm_head, layers\.\*\.attn, [^1]*$",
        ),
    ],
)
def test_unused_and_undecided(rules: list, found: str):
    with pytest.raises(PolicyError, match=found):
        policy(*rules).resolve(blocks_of("llama"))


def test_keep():
    resolution = Policy.from_recipe("nemotron_h_fp8").resolve(blocks_of("llama", 10))
    gemms = by_gemm(resolution)
    low = {int(name.split(".")[1]) for name, r in gemms.items() if r == "nemotron_h_fp8" and
           name.startswith("layers")}  # fmt: skip
    assert low == {4, 5}
    assert gemms["head.lm_head"] == "nemotron_h_fp8"
    assert resolution.parameters["model.layers.3.mlp.up_proj.weight"].name == "bf16_amp"
    assert resolution.parameters["model.layers.4.mlp.up_proj.weight"].name == "nemotron_h_fp8"
    assert resolution.rows() == [
        ("* in layers 0, 1, 2, 3, 6, 7, 8, 9", "bf16_amp", 72),
        ("*", "nemotron_h_fp8", 19),
    ]


def test_keep_applies_only_to_what_its_rule_matches():
    rules = [("layers.*.ffn", "nvfp4"), ("*", "te_current")]
    gemms = by_gemm(policy(*rules).resolve(blocks_of("llama", 6)))
    assert gemms["layers.1.ffn.up_proj"] == "nvfp4"
    assert gemms["layers.2.ffn.up_proj"] == "bf16_amp"
    assert gemms["layers.2.qk.q_proj"] == "te_current"
    # Where the rule reaches no layer, its keep has nothing to do.
    gemms = by_gemm(policy(("head", "nvfp4"), ("*", "fp32")).resolve(blocks_of("llama", 6)))
    assert set(gemms.values()) == {"nvfp4", "fp32"}


@pytest.mark.parametrize("layers", [2, 4])
def test_keep_that_leaves_no_layer(layers: int):
    with pytest.raises(PolicyError, match=f"keeps 4 layers .* model has {layers}.*keep = "):
        Policy.from_recipe("nvfp4").resolve(blocks_of("llama", layers))
    Policy.from_recipe("nvfp4").resolve(blocks_of("llama", 5))


FILE = """
[recipes.my_fp8]
extends = "te_current"
head = "linear"
embed = "e4m3@row:current"
attn_qk = "linear"

[recipes.my_fp8.linear]
wgrad = "bf16"

[recipes.mine]
extends = "my_fp8"
summary = "Spares the ends."
keep = [{first = 0, last = 1, recipe = "calm"}]

[recipes.calm]
extends = "bf16_amp"
norm = "bf16"

[[rule]]
match = "layers.*.ffn"
recipe = "mxfp8"

[[rule]]
match = "*"
recipe = "mine"
"""


def test_policy_file(tmp_path: Path):
    path = tmp_path / "first.toml"
    path.write_text(FILE)
    loaded = Policy.load(path)
    assert loaded.name == "first"
    resolution = loaded.resolve(blocks_of("llama", 3))
    gemms = {d.gemm.name: d for d in resolution.gemms}
    assert str(gemms["head.lm_head"].spec.fprop_x) == "e4m3@tensor:current"
    assert str(gemms["head.lm_head"].spec.wgrad_x) == "bf16"
    assert str(gemms["layers.0.attn.qk"].spec.fprop_x) == "e4m3@tensor:current"
    assert str(gemms["layers.0.attn.pv"].spec.fprop_x) == "bf16"
    assert str(resolution.embeds["model.embed_tokens"]) == "e4m3@row:current"
    assert gemms["layers.2.qk.q_proj"].recipe.name == "calm"
    assert gemms["layers.2.ffn.up_proj"].recipe.name == "mxfp8"
    assert resolution.parameters["model.layers.2.input_layernorm.weight"].name == "calm"


def test_policy_round_trip(tmp_path: Path):
    path = tmp_path / "first.toml"
    path.write_text(FILE)
    loaded = Policy.load(path)
    again = tmp_path / "again.toml"
    again.write_text(loaded.to_toml())
    assert Policy.load(again) == loaded
    assert "extends" not in loaded.to_toml()
    for name in ("te_current", "mask_e5m7_nearest"):
        again.write_text(Policy.from_recipe(name).to_toml())
        assert Policy.load(again) == Policy.from_recipe(name)
        assert "[recipes" not in again.read_text()


def test_recipes_made_in_code_are_written_out(tmp_path: Path):
    changed = dataclasses.replace(load_recipe("mxfp8"), weight=load_recipe("bf16_pure").weight)
    with pytest.raises(PolicyError, match=r"has the name of a shipped recipe.*my_mxfp8"):
        Policy((Rule("*", changed),)).to_toml()
    changed = dataclasses.replace(changed, name="mine")
    path = tmp_path / "p.toml"
    path.write_text(Policy((Rule("*", changed),)).to_toml())
    assert Policy.load(path).rules == (Rule("*", changed),)
    with pytest.raises(PolicyError, match="two different recipes called 'mine'"):
        Policy((Rule("a", changed), Rule("*", dataclasses.replace(changed, summary="other"))))


RULE = '[[rule]]\nmatch = "*"\nrecipe = "{}"\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "has no rule"),
        ("rules = 1", "no key 'rules'. Nearest valid keys: rule"),
        ('[[rule]]\nmatch = "*"\nrecipes = "fp32"', "rule 1 has no key 'recipes'.*recipe"),
        ('[[rule]]\nmatch = "*"', "rule 1 lacks recipe"),
        ('[rule]\nmatch = "*"', r"rule \(write \[\[rule\]\]\) = .* is dict"),
        (RULE.format("mxpf8"), r"rule 1 \('\*'\): no recipe is called 'mxpf8'. Nearest .* mxfp8"),
        ('[recipes.fp]\nextends = "fp32"\n' + RULE.format("fq"), "policy itself defines fp"),
        ('[recipes.fp32]\nextends = "tf32"\n' + RULE.format("fp32"), "my_fp32"),
        ('[recipes.mask_e5m7]\nextends = "tf32"\n' + RULE.format("fp32"), "shipped recipe"),
        ('[recipes.a]\nextends = "b"\n' + RULE.format("a"), "extends: no recipe is called 'b'"),
        ('[recipes.a]\nextends = "fp32"\nhaed = "linear"\n' + RULE.format("a"), "keys: head"),
        ("recipes.a = 1\n" + RULE.format("a"), r"recipes\.a = 1 is int"),
        ("a = ", "cannot be read"),
    ],
)
def test_bad_policy_files(tmp_path: Path, text: str, found: str):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(PolicyError, match=found) as error:
        Policy.load(path)
    assert str(path) in str(error.value)


def test_missing_policy_file(tmp_path: Path):
    with pytest.raises(PolicyError, match=r"none\.toml cannot be read"):
        Policy.load(tmp_path / "none.toml")


def test_keep_in_an_unknown_or_keeping_recipe():
    base = load_recipe("nvfp4")
    for target, found in (("bf16", "keep of recipe 'mine'.*no recipe"), ("nvfp4", "itself")):
        keep = (dataclasses.replace(base.keep[0], recipe=target),)
        mine = dataclasses.replace(base, name="mine", keep=keep)
        with pytest.raises(PolicyError, match=found):
            Policy((Rule("*", mine),)).resolve(blocks_of("llama", 6))


def test_partial_recipes_are_refused_only_where_they_decide_something():
    rules = [("layers.*.ffn", "coat"), ("*", "te_current")]
    resolution = policy(*rules).resolve(blocks_of("llama"))
    with pytest.raises(PolicyError) as error:
        refuse_partial(resolution, allow_partial=False)
    text = str(error.value)
    assert "coat: Range expansion" in text
    assert "te_current" not in text
    assert "allow_partial=True" in text
    refuse_partial(policy(("*", "te_current")).resolve(blocks_of("llama")), allow_partial=False)


def test_bare_positions_cannot_be_rounded():
    model = nn.Module()
    model.wte = nn.Embedding(8, 4)
    model.pos_emb = nn.Parameter(torch.zeros(4, 4))
    blocks = block_map(model)
    Policy.from_recipe("bf16_amp").resolve(blocks)
    with pytest.raises(PolicyError, match=r"pos_emb of block emb.*hints=.*'emb:fp32'"):
        Policy.from_recipe("te_current").resolve(blocks)
    resolution = Policy.from_recipe("te_current").resolve(block_map(model, {"pos*": "emb:fp32"}))
    assert set(resolution.embeds) == {"wte"}


def test_resolving_100_layers():
    blocks = blocks_of("llama", 100)
    rules = [("layers.7.ffn.*", "bf16_amp"), ("layers.*.ffn", "mxfp8"), ("*", "nvfp4")]
    resolution = policy(*rules).resolve(blocks)
    assert len(resolution.gemms) == 901
