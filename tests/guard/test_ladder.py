"""The ladder: where each unit stands, what is above, and the policy that comes out."""

import json
import logging
import tomllib
from functools import cache

import pytest
import torch

from halfulp.blocks import BlockMap, block_map
from halfulp.errors import PolicyError
from halfulp.guard.ladder import (
    LOCK,
    RUNGS,
    STRIKES,
    Ladder,
    forward_of,
    quality,
    storage_quality,
)
from halfulp.policy import Policy, Resolution, Rule, load_recipe, recipe_names

LAYERS = 9  # some recipes keep up to 8 in another one


@cache
def blocks_of(architecture: str = "llama") -> BlockMap:
    from transformers import AutoConfig, AutoModelForCausalLM

    logging.getLogger("transformers").setLevel(logging.ERROR)
    sizes: dict = {"vocab_size": 64, "num_hidden_layers": LAYERS, "hidden_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    if architecture == "gpt2":
        sizes = {"vocab_size": 64, "n_layer": LAYERS, "n_embd": 32, "n_head": 4, "n_positions": 32}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes))
    return block_map(model)


def ladder(recipe: str, architecture: str = "llama") -> Ladder:
    return Ladder(Policy.from_recipe(recipe), blocks_of(architecture))


def decided(ladder: Ladder) -> Resolution:
    return ladder.policy().resolve(ladder.blocks)


def climbed(ladder: Ladder, unit: str, **how: bool) -> list[str]:
    """Every rung that `unit` climbs to, up to the top."""
    names = []
    while name := ladder.climb(unit, 0, **how):
        names.append(name)
        assert len(names) < 20
    return names


@pytest.mark.parametrize(
    ("recipe", "rungs"),
    [
        ("nvfp4_all", ["mxfp8", "te_current", "bf16_amp", "fp32"]),
        ("mxfp8", ["te_current", "bf16_amp", "fp32"]),
        ("te_current", ["bf16_amp", "fp32"]),
        # A scale that is old or absent is cured by a current one of the same granularity.
        ("te_delayed", ["te_current", "bf16_amp", "fp32"]),
        ("fp8_unscaled", ["te_current", "bf16_amp", "fp32"]),
        ("bf16_amp", ["fp32"]),
        ("fp32", []),
    ],
)
def test_a_block_climbs_rung_by_rung(recipe, rungs):
    assert climbed(ladder(recipe), "layers.3.ffn") == rungs


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_every_recipe_climbs_to_the_top_and_each_rung_is_better(recipe, architecture):
    found = ladder(recipe, architecture)
    unit = next(u for u in found.units.names if "layers.4." in u and "qk" in u)
    roles = tuple({g.role for g in found.blocks.gemms if g.block in found.units.blocks[unit]})
    before = qualities(found, unit, roles)
    others = {g.name: d for g, d, *_ in decided(found).gemms if g.block not in found.units.of}
    while found.next(unit):
        name = found.climb(unit, 0)
        after = qualities(found, unit, roles)
        assert after > before, name
        assert {found.map()[block] for block in found.units.blocks[unit]} == {name}
        before = after
        assert all(others.get(g.name, d) == d for g, d, *_ in decided(found).gemms)
    assert (
        before == quality(load_recipe("fp32"), roles)
        or quality(load_recipe("fp32"), roles) <= before
    )
    assert found.climb(unit, 0) == ""


def qualities(found: Ladder, unit: str, roles: tuple[str, ...]) -> tuple[int, int]:
    """Of the weakest GEMM of the unit as the policy in force decides."""
    recipes = [d for g, d, *_ in decided(found).gemms if g.block in found.units.blocks[unit]]
    return min(quality(recipe, roles) for recipe in recipes)


def test_only_the_raised_block_changes():
    found = ladder("nvfp4_all")
    before = {g.name: d.name for g, d, *_ in decided(found).gemms}
    found.climb("layers.2.vo", 10)
    after = {g.name: d.name for g, d, *_ in decided(found).gemms}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {g.name for g in found.blocks.gemms if g.block == "layers.2.vo"} != set()
    assert {after[name] for name in changed} == {"mxfp8"}
    assert found.above() == ["layers.2.vo"]


def test_the_forward_pass_goes_first_where_it_alone_is_to_blame():
    found = ladder("te_delayed")
    unit = "layers.0.ffn"
    assert found.next(unit, backward=False) == "te_current, forward pass first"
    assert found.climb(unit, 0, backward=False) == "te_delayed_forward_te_current"
    half = next(d for g, d, *_ in decided(found).gemms if g.block == unit).gemms["linear"]
    upper, lower = (load_recipe(n).gemms["linear"] for n in ("te_current", "te_delayed"))
    assert (
        (half.fprop_x, half.fprop_w)
        == (upper.fprop_x, upper.fprop_w)
        != (
            lower.fprop_x,
            lower.fprop_w,
        )
    )
    assert (half.dgrad_g, half.wgrad_x, half.wgrad_g) == (
        lower.dgrad_g,
        lower.wgrad_x,
        lower.wgrad_g,
    )
    # The next climb is the other half of the same rung, and the one after it a rung.
    assert found.climb(unit, 0, backward=False) == "te_current"
    assert found.climb(unit, 0) == "bf16_amp"


def test_half_a_rung_keeps_the_storage_of_the_lower():
    half = forward_of(load_recipe("fp32"), load_recipe("bf16_weights"))
    assert storage_quality(half) == storage_quality(load_recipe("bf16_weights"))


@pytest.mark.parametrize("unit", ["emb", "layers.0.norm", "layers.5.vo"])
def test_trouble_of_storage_is_answered_by_better_storage(unit):
    found = ladder("bf16_weights")
    stored = storage_quality(load_recipe("bf16_weights"))
    roles = found._roles(unit)
    assert found.climb(unit, 0, storage=True)
    recipe = next(
        r for n, r in decided(found).parameters.items() if found.units.parameters[n] == unit
    )
    assert storage_quality(recipe) > stored
    assert quality(recipe, roles) >= quality(load_recipe("bf16_weights"), roles)
    assert found.next(unit, storage=True) == ""


def test_a_block_without_a_gemm_does_not_count_among_the_raised():
    found = ladder("bf16_pure")
    found.climb("layers.0.norm", 0, storage=True)
    assert found.share_high() == 0
    with_gemm = {g.block for g in found.blocks.gemms}
    found.climb("layers.0.qk", 0)
    assert found.share_high() == pytest.approx(1 / len(with_gemm))
    assert found.is_raised


def test_a_block_of_8_bits_is_not_of_high_precision_until_it_has_16():
    found, unit = ladder("fp8_unscaled"), "layers.0.ffn"
    assert found.climb(unit, 0) == "te_current"
    assert found.is_raised
    assert found.share_high() == 0
    found.climb(unit, 0)
    assert found.share_high() > 0


def test_locks_double_and_the_third_strike_is_for_good():
    found, unit = ladder("nvfp4_all"), "layers.0.qk"
    ends = []
    for step in (100, 200, 300):
        found.climb(unit, step)
        ends.append(found.stands[unit].lock_until - step)
    assert ends == [LOCK, 2 * LOCK, 4 * LOCK]
    assert found.stands[unit].strikes == STRIKES
    assert found.stands[unit].permanent


def test_a_block_raised_in_its_probation_stays_for_good():
    found, unit = ladder("nvfp4_all"), "layers.0.qk"
    found.climb(unit, 100)
    assert found.descend(unit) == ("mxfp8", False)
    assert found.recipe_of(unit) == "nvfp4_all"
    assert found.policy() == found.base
    found.stands[unit].probation_until = 900
    found.climb(unit, 899)
    assert found.stands[unit].permanent


def test_gpt2_raises_qk_and_vo_together_where_one_gemm_computes_both():
    found = ladder("nvfp4_all", "gpt2")
    unit = "layers.1.qk+vo"
    assert found.units.blocks[unit] == ("layers.1.qk", "layers.1.vo")
    assert found.units.of["layers.1.vo"] == unit
    assert found.climb(unit, 0) == "mxfp8"
    assert found.map()["layers.1.qk"] == found.map()["layers.1.vo"] == "mxfp8"
    assert found.map()["layers.0.qk"] == "nvfp4_all"
    fused = [d.name for g, d, *_ in decided(found).gemms if "layers.1.qk" in (g.block, *g.parts)]
    assert set(fused) == {"mxfp8"}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rules_that_decide_nothing_any_more_are_left_out(architecture):
    """A policy that names a block which is then raised would else hold an idle rule."""
    blocks = blocks_of(architecture)
    rules = [Rule("layers.0.ffn", load_recipe("nvfp4_all")), Rule("*", load_recipe("mxfp8"))]
    found = Ladder(Policy(tuple(rules)), blocks)
    assert found.climb("layers.0.ffn", 0) == "mxfp8"
    assert [rule.match for rule in found.policy().rules] == ["layers.0.ffn", "*"]
    decided(found)  # raises PolicyError for a rule that matches nothing
    for unit in found.units.names:
        climbed(found, unit)
    decided(found)


@pytest.mark.parametrize("recipe", ["te_delayed", "nvfp4_all", "deepseek_v3"])
def test_the_policy_of_a_raised_run_survives_toml(recipe):
    found = ladder(recipe)
    found.climb("layers.0.ffn", 0, backward=False)
    found.climb("layers.3.qk", 0)
    text = found.policy().to_toml()
    again = Policy.from_table(tomllib.loads(text))
    assert again.resolve(found.blocks).gemms == decided(found).gemms
    assert again.to_toml() == text


def test_the_state_survives_json():
    found = ladder("te_delayed")
    found.climb("layers.0.ffn", 7, backward=False)
    found.climb("layers.3.qk", 9)
    again = ladder("te_delayed")
    again.load(json.loads(json.dumps(found.state())))
    assert again.stands == found.stands
    assert again.policy() == found.policy()
    found.climb("layers.3.qk", 11)  # the state was a copy
    assert again.recipe_of("layers.3.qk") == "te_current"
    assert again.next("layers.0.ffn", backward=False) == "te_current"


def test_another_stage_voids_what_it_reaches_by_itself():
    found = ladder("nvfp4_all")
    found.climb("layers.0.ffn", 0)  # mxfp8
    climbed(found, "layers.1.ffn")  # fp32
    found.rebase(Policy.from_recipe("te_current"))
    assert found.recipe_of("layers.0.ffn") == "te_current"
    assert found.recipe_of("layers.1.ffn") == "fp32"
    assert found.above() == ["layers.1.ffn"]
    found.rebase(Policy.from_recipe("fp32"))
    assert not found.is_raised
    assert found.policy() == found.base


def test_the_fallback_is_the_whole_model():
    found = ladder("nvfp4_all")
    assert found.would_gain("bf16_amp")
    assert not ladder("bf16_amp").would_gain("bf16_amp")
    assert not ladder("fp32").would_gain("bf16_amp")
    found.fallback = "bf16_amp"
    assert {d.name for _, d, *_ in decided(found).gemms} == {"bf16_amp"}
    assert set(found.map().values()) == {"bf16_amp"}
    assert found.share_high() == 1
    assert found.next("layers.0.ffn") == found.climb("layers.0.ffn", 0) == ""
    assert not found.would_gain("bf16_amp")


@pytest.mark.parametrize(
    ("rungs", "message"),
    [
        (("fp32", "bf16_amp"), "each rung must be better than the one before"),
        (("te_current", "te_current"), "each rung must be better"),
        ((), "ladder is none"),
        (("te_curent",), "te_current"),
        (("nvfp4", "bf16_amp"), "'nvfp4' cannot be a rung.*keeps layers"),
    ],
)
def test_a_ladder_that_is_none_is_refused(rungs, message):
    with pytest.raises(PolicyError, match=message):
        Ladder(Policy.from_recipe("te_current"), blocks_of(), rungs)


def test_a_shorter_ladder_is_climbed_as_it_is():
    found = Ladder(Policy.from_recipe("nvfp4_all"), blocks_of(), ("te_current", "fp32"))
    assert climbed(found, "layers.0.qk") == ["te_current", "fp32"]
    assert set(RUNGS) >= {"te_current", "fp32"}
