"""Recipes: every shipped one against the literature's table, inheritance, and the strict schema."""

import tomllib
from typing import Any

import pytest

from halfulp.errors import PolicyError
from halfulp.recipe import OPERANDS, ROLES, recipe_table, recipe_to_table
from halfulp.recipe_reader import (
    FAMILY,
    build_recipe,
    is_shipped,
    load_recipe,
    recipe_names,
    shipped_table,
)
from halfulp.toml import dumps

D16, D1024 = "@tensor:delayed(16):p2", "@tensor:delayed(1024)"
ROW, BLOCK, TILE = "e4m3@row:current", "e4m3@1x128:current", "e4m3@128x128:current"
UP, FLOOR = "e4m3@1x32:e8m0_up", "e4m3@1x32:e8m0_floor"
FP4, FP4_TILE = "e2m1@1x16:nvfp4", "e2m1@16x16:nvfp4"
SR = f"{FP4}:stochastic"
Q32, Q32_SR = "e2m1@1x32:e8m0_up:hadamard(32)", "e2m1@1x32:e8m0_up:stochastic:hadamard(32)"
STATIC = "@tensor:static(1)"
FAST = "fast split split"
PLAIN = "fp32 fp32 fp32"


def hybrid(scaling: str) -> tuple[str, ...]:
    """E4M3 forward operands, E5M2 gradients: x w · g w · g x."""
    x, g = f"e4m3{scaling}", f"e5m2{scaling}"
    return (x, x, g, x, g, x)


# recipe: operands of linear (x w · g w · g x), accumulation, weight storage, moments m v
EXPECTED: dict[str, tuple[tuple[str, ...], str, str, str]] = {
    "fp32": (("fp32",) * 6, PLAIN, "fp32", "fp32 fp32"),
    "tf32": (("tf32",) * 6, PLAIN, "fp32", "fp32 fp32"),
    "bf16_amp": (("bf16",) * 6, PLAIN, "fp32", "fp32 fp32"),
    "bf16_pure": (("bf16",) * 6, PLAIN, "bf16", "bf16 bf16"),
    "bf16_pure_sr": (("bf16",) * 6, PLAIN, "bf16", "bf16 bf16"),
    "bf16_weights": (("fp32",) * 6, PLAIN, "bf16", "fp32 fp32"),
    "bf16_weights_sr": (("fp32",) * 6, PLAIN, "bf16", "fp32 fp32"),
    "fp16_amp": (("fp16",) * 6, PLAIN, "fp32", "fp32 fp32"),
    "msamp_o1": (
        (f"e4m3{D16}", "e4m3@tensor:current:p2", f"e5m2{D16}", "e4m3@tensor:current:p2",
         f"e5m2{D16}", f"e4m3{D16}"),
        FAST, "fp16@tensor:current:p2", "fp32 fp32",
    ),
    "te_delayed": (hybrid(D1024), FAST, "fp32", "fp32 fp32"),
    "te_current": (hybrid("@tensor:current"), FAST, "fp32", "fp32 fp32"),
    "nemotron_h_fp8": (hybrid("@tensor:current"), FAST, "fp32", "fp32 fp32"),
    "ao_rowwise": ((f"{ROW}:p2",) * 6, FAST, "fp32", "fp32 fp32"),
    "ao_rowwise_gw_hp": (
        (ROW, ROW, ROW, "e4m3@tensor:current", "bf16", "bf16"),
        "fast split fp32", "fp32", "fp32 fp32",
    ),
    "deepseek_v3": (
        (BLOCK, TILE, BLOCK, TILE, f"{BLOCK}:p2", f"{BLOCK}:p2"),
        "promote(128) promote(128) promote(128)", "fp32", "bf16 bf16",
    ),
    "te_blockwise": (
        tuple(f"{q}:p2" for q in (BLOCK, TILE, BLOCK, TILE, BLOCK, BLOCK)),
        "split split split", "fp32", "fp32 fp32",
    ),
    "mxfp8": ((UP,) * 6, PLAIN, "fp32", "fp32 fp32"),
    "mx_ocp": ((FLOOR,) * 6, PLAIN, "fp32", "fp32 fp32"),
    "mxfp8_fwd_only": ((UP, UP, *("bf16",) * 4), PLAIN, "fp32", "fp32 fp32"),
    "mxfp8_w_bf16_a": (("bf16", UP, *("bf16",) * 4), PLAIN, "fp32", "fp32 fp32"),
    "nvfp4": (
        (FP4, FP4_TILE, SR, FP4_TILE, f"{SR}:hadamard(16)", f"{FP4}:hadamard(16)"),
        PLAIN, "fp32", "fp32 fp32",
    ),
    "fp4_all": ((FP4, FP4, SR, FP4, SR, SR), PLAIN, "fp32", "fp32 fp32"),
    "quartet_mxfp4": ((Q32, Q32, *(Q32_SR,) * 4), PLAIN, "fp32", "fp32 fp32"),
    "intel_fp8_2t": (
        hybrid(D1024), PLAIN, "fp16", "e4m3@tensor:current e5m2@tensor:current",
    ),
    "coat": (hybrid("@tensor:current"), PLAIN, "fp32", f"{BLOCK} {BLOCK}"),
    "moss": (
        (UP, "e4m3@tensor:current", "e5m2@1x32:e8m0_up", "e4m3@tensor:current",
         "e5m2@1x32:e8m0_up", UP),
        PLAIN, "fp32", "fp32 fp32",
    ),
    "u_mup_fp8": (hybrid(STATIC), PLAIN, "fp32", "fp32 fp32"),
    "munit_fp8": (hybrid(STATIC), PLAIN, "fp32", "fp32 fp32"),
    "int8_switchback": (
        ("int8@row:current", "int8@tensor:current", "int8@row:current", "int8@tensor:current",
         "bf16", "bf16"),
        PLAIN, "fp32", "fp32 fp32",
    ),
    "int8_mixed": (("int8@row:current",) * 6, PLAIN, "fp32", "fp32 fp32"),
    "qat_int8": (("int8@row:current",) * 2 + ("bf16",) * 4, PLAIN, "fp32", "fp32 fp32"),
    "fp8_unscaled": (hybrid(""), PLAIN, "fp32", "fp32 fp32"),
}  # fmt: skip
EXPECTED["nvfp4_all"] = EXPECTED["nvfp4"]
EXPECTED["msamp_o2"] = (
    *EXPECTED["msamp_o1"][:3],
    "e4m3@tensor:current:p2 fp16@tensor:current:p2",
)
EXPECTED["msamp_o3"] = (
    *EXPECTED["msamp_o2"][:2],
    "e4m3@tensor:current:p2",
    EXPECTED["msamp_o2"][3],
)
# recipe: roles that are rounded like its linears rather than kept high
LOW_ROLES = {
    "tf32": {"head", "router", "attn_qk", "attn_pv"},
    "mx_ocp": {"head", "router", "attn_qk", "attn_pv"},
    "msamp_o1": {"head", "router"},
    "msamp_o2": {"head", "router"},
    "msamp_o3": {"head", "router"},
}
PARTIAL = {
    "msamp_o1": "all-reduce",
    "msamp_o2": "all-reduce",
    "msamp_o3": "all-gather",
    "deepseek_v3": "E5M6",
    "quartet_mxfp4": "trust mask",
    "intel_fp8_2t": "Smooth-SwiGLU",
    "coat": "Range expansion",
    "moss": "predicted",
    "u_mup_fp8": "down projections",
    "munit_fp8": "parametrization",
    "qat_int8": "straight-through",
}


def test_the_shipped_recipes_are_those_of_the_table():
    assert set(recipe_names()) == set(EXPECTED)
    assert recipe_names() == sorted(recipe_names())
    assert FAMILY not in recipe_names()


@pytest.mark.parametrize("name", EXPECTED)
def test_recipe(name: str):
    operands, accumulate, weight, moments = EXPECTED[name]
    recipe = load_recipe(name)
    linear = recipe.gemms["linear"]
    assert tuple(str(getattr(linear, operand)) for operand in OPERANDS) == operands
    found = (linear.fprop_accumulate, linear.dgrad_accumulate, linear.wgrad_accumulate)
    assert " ".join(found) == accumulate
    assert str(recipe.weight) == weight
    assert f"{recipe.moment_m} {recipe.moment_v}" == moments
    for role in ROLES[1:]:
        low = role in LOW_ROLES.get(name, set())
        assert recipe.is_high(role) is not low, role
        assert not low or recipe.gemms[role] == linear
    missing = " ".join(recipe.not_simulated)
    assert PARTIAL.get(name, "") in missing
    assert bool(missing) == (name in PARTIAL)
    assert recipe.summary.endswith(".")
    assert len(recipe.summary) < 180
    assert any(
        word in recipe.source
        for word in ("verified in source", "secondary summary", "recollection", "not a published",
                     "standard practice", "nothing is rounded")
    )  # fmt: skip


def test_what_only_some_recipes_have():
    recipes = {name: load_recipe(name) for name in recipe_names()}
    kept = {n: [(k.first, k.last, k.recipe) for k in r.keep] for n, r in recipes.items() if r.keep}
    assert kept == {"nemotron_h_fp8": [(4, 4, "bf16_amp")], "nvfp4": [(0, 4, "bf16_amp")]}
    assert {n for n, r in recipes.items() if r.master} == {"msamp_o3"}
    assert {n for n, r in recipes.items() if r.expand_moments} == {"coat"}
    assert {n for n, r in recipes.items() if r.update_rounding == "stochastic"} == {
        "bf16_pure_sr",
        "bf16_weights_sr",
    }
    (scaled,) = (n for n, r in recipes.items() if r.loss_scale)
    scale = recipes[scaled].loss_scale
    assert scale is not None
    assert (scaled, scale.init, scale.growth, scale.interval, scale.backoff) == (
        "fp16_amp", 65536, 2, 2000, 0.5,
    )  # fmt: skip
    assert {n for n, r in recipes.items() if r.norm.scale != "none"} == {"mx_ocp"}


def test_high_means_unscaled_operands_and_results():
    spec = load_recipe("fp16_amp").gemms["head"]
    assert {str(getattr(spec, key)) for key in (*OPERANDS, "fprop_out", "wgrad_out")} == {"fp16"}
    assert spec.dgrad_accumulate == "fp32"
    # Scores stay in the fp32 sums of flash attention; what leaves the kernel is rounded.
    amp = load_recipe("bf16_amp").gemms
    assert str(amp["attn_qk"].fprop_out) == "fp32"
    assert str(amp["attn_qk"].dgrad_out) == "bf16"
    assert str(amp["attn_pv"].fprop_out) == "bf16"
    assert str(amp["attn_pv"].dgrad_out) == "fp32"


@pytest.mark.parametrize("name", [*EXPECTED, "mask_e5m7", "mask_e8m3_stochastic"])
def test_round_trip_through_toml(name: str):
    recipe = load_recipe(name)
    text = dumps(recipe_to_table(recipe))
    # Complete: nothing is left to inherit.
    assert build_recipe(name, tomllib.loads(text), shipped_table) == recipe
    assert "extends" not in text


@pytest.mark.parametrize(
    ("name", "quantizer"),
    [
        ("mask_e5m7", "e5m7:truncate:saturate"),
        ("mask_e5m7_truncate", "e5m7:truncate:saturate"),
        ("mask_e8m3_nearest", "e8m3:saturate"),
        ("mask_e8m3_stochastic", "e8m3:stochastic:saturate"),
        ("mask_e8m7", "bf16:truncate:saturate"),
    ],
)
def test_mask_family(name: str, quantizer: str):
    recipe = load_recipe(name)
    assert {str(getattr(recipe.gemms["linear"], operand)) for operand in OPERANDS} == {quantizer}
    assert all(recipe.is_high(role) for role in ROLES[1:])
    assert recipe.high == "fp32"
    assert recipe.name == name
    assert "eXmY" not in recipe.summary
    assert "ROUNDING" not in recipe.summary
    assert is_shipped(name)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("mxfp", "Nearest names: mxfp8"),
        ("MXFP8", "no recipe is called 'MXFP8'"),
        ("mask_eXmY", "is a family"),
        ("mask_e5m7_up", "mask_e8m3_nearest"),
        ("mask_e9m3", "2 <= X <= 8"),
        ("../errors", "no recipe is called"),
        ("", "no recipe is called"),
    ],
)
def test_unknown_names(name: str, found: str):
    with pytest.raises(PolicyError, match=found):
        load_recipe(name)


def build(table: dict[str, Any], **others: dict[str, Any]) -> Any:
    return build_recipe("mine", table, lambda name: others.get(name) or shipped_table(name))


def test_extends_changes_only_what_it_says():
    base = load_recipe("te_current")
    mine = build({"extends": "te_current", "head": "linear", "linear": {"wgrad": "bf16"}})
    assert str(mine.gemms["linear"].wgrad_g) == "bf16"
    assert mine.gemms["linear"].fprop_x == base.gemms["linear"].fprop_x
    assert mine.gemms["linear"].fprop_accumulate == "fast"
    assert mine.gemms["head"] == mine.gemms["linear"]
    assert mine.gemms["router"] == base.gemms["router"]
    assert mine.summary == "te_current with other head, linear"
    assert mine.source == base.source


def test_switches_of_what_is_kept_high():
    switches = {"attn_qk": "linear", "attn_pv": {"like": "linear", "dgrad": "bf16"}}
    mine = build({"extends": "mxfp8", **switches, "embed": "e4m3", "norm": "fp32", "high": "fp16"})
    assert mine.gemms["attn_qk"] == mine.gemms["linear"]
    assert str(mine.gemms["attn_pv"].dgrad_g) == "bf16"
    assert str(mine.gemms["attn_pv"].fprop_x) == UP
    assert (str(mine.embed), str(mine.norm), str(mine.gemms["head"].fprop_x)) == (
        "e4m3", "fp32", "fp16",
    )  # fmt: skip


def test_specific_keys_beat_shorthands_and_parents():
    table = {"out": "bf16", "wgrad_out": "fp32", "operands": "bf16", "fprop": "e4m3"}
    mine = build(
        {"extends": "mid", "linear": {"fprop_w": "fp16"}},
        mid={"extends": "fp32", "linear": table | {"accumulate": "split"}},
    )
    linear = mine.gemms["linear"]
    assert [str(getattr(linear, operand)) for operand in OPERANDS] == [
        "e4m3", "fp16", "bf16", "bf16", "bf16", "bf16",
    ]  # fmt: skip
    assert (str(linear.fprop_out), str(linear.wgrad_out)) == ("bf16", "fp32")
    # A table over "high" changes only its keys.
    over = build({"extends": "bf16_amp", "head": {"fprop_out": "fp32"}})
    assert over.is_high("head")
    assert str(over.gemms["head"].fprop_out) == "fp32"


def test_none_undoes_what_is_inherited():
    assert build({"extends": "fp16_amp", "loss_scale": "none"}).loss_scale is None
    assert build({"extends": "msamp_o3", "master": "none"}).master is None
    assert build({"extends": "nvfp4", "keep": []}).keep == ()
    assert build({"extends": "coat", "not_simulated": []}).not_simulated == ()


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"hed": "linear"}, "no key 'hed'. Nearest valid keys: head"),
        ({"linear": {"fpropx": "bf16"}}, "linear has no key 'fpropx'.*fprop_x"),
        ({"linear": {"fprop": "e4m9q"}}, r"linear.fprop_x: format 'e4m9q'"),
        ({"linear": {"fprop": 8}}, "linear.fprop_x = 8 is int; give str"),
        ({"linear": "head"}, "linear = 'head'. Give one of: high"),
        ({"head": "low"}, "head = 'low'. Give one of: high, linear"),
        ({"head": {"like": "router"}}, "like = 'router'"),
        ({"linear": {"accumulate": "promote"}}, "'promote' is no way to accumulate"),
        ({"linear": {"accumulate": "promote(0)"}}, "no way to accumulate"),
        ({"high": "e4m3"}, "high = 'e4m3'"),
        ({"update_rounding": "truncate"}, "update_rounding = 'truncate'"),
        ({"expand_moments": "yes"}, "expand_moments = 'yes' is str; give bool"),
        ({"weight": "bf16:floor"}, "weight: quantizer 'bf16:floor'"),
        ({"keep": [{"first": 1, "last": 1}]}, "keep lacks recipe"),
        ({"keep": [{"first": 0, "last": 0, "recipe": "fp32"}]}, "names no layer"),
        ({"keep": [{"first": -1, "last": 2, "recipe": "fp32"}]}, ">= 0"),
        ({"keep": [{"first": True, "last": 2, "recipe": "fp32"}]}, "first = True is bool"),
        ({"keep": {"first": 1}}, "is dict; give list"),
        ({"loss_scale": {"init": 2.0, "growth": 2.0, "backoff": 0.5}}, "lacks interval"),
        (
            {"loss_scale": {"init": 2.0, "growth": 0.5, "backoff": 0.5, "interval": 1}},
            "growth > 1",
        ),
        ({"not_simulated": "a"}, "is str; give list"),
        (
            {"linear": {"fprop_x": "e4m3@row:hadamard(4)"}},
            "linear: fprop_x = .*give both the word",
        ),
        ({"linear": {"out": "bf16:hadamard(4)"}}, "fprop_out: .* of the result: only operands"),
        ({"linear": {"dgrad_out": "bf16:stochastic"}}, "dgrad_out: .* rounded to nearest or trunc"),
        ({"embed": "e4m3@tensor:delayed(4)"}, "embed: .* only operands of GEMMs have delayed"),
        ({"moment_v": "e4m3@1x32:hadamard(4)"}, "moment_v: .* only operands of GEMMs are transf"),
        ({"weight": "bf16:stochastic"}, "'bf16:stochastic' of the weight: .* Give update_rounding"),
        ({"extends": "te_curent"}, "Nearest names: te_current"),
        ({"extends": "mine"}, "extends itself: mine → mine"),
    ],
)
def test_bad_tables(table: dict[str, Any], found: str):
    with pytest.raises(PolicyError, match=found):
        build({"extends": "te_current", **table})


def test_circles_and_missing_keys():
    with pytest.raises(PolicyError, match="mine → a → b → a"):
        build({"extends": "a"}, a={"extends": "b"}, b={"extends": "a"})
    with pytest.raises(
        PolicyError, match=r"does not decide summary, source, high, linear.*extends"
    ):
        build({"weight": "bf16"})
    full = {**shipped_table("fp32"), "linear": {"fprop": "bf16"}}
    with pytest.raises(PolicyError, match=r'linear does not decide dgrad_g.*like = "high"'):
        build(full)


def test_recipe_table():
    rows = recipe_table(load_recipe("te_current"))
    assert all(len(row) == 6 for row in rows)
    assert ("linear", "fprop", "x", "e4m3@tensor:current", "fast", "bf16") in rows
    assert ("linear", "wgrad", "g", "e5m2@tensor:current", "split", "fp32") in rows
    assert [row[0] for row in rows].count("linear") == 6
    high = {row[1] for row in rows if row[0] == "kept high"}
    assert high == {"head", "router", "attn_qk", "attn_pv", "embed", "norm"}
    rows = recipe_table(load_recipe("msamp_o1"))
    assert (
        "storage",
        "weight",
        "",
        "fp16@tensor:current:p2, update rounded to nearest",
        "",
        "",
    ) in rows
    assert [row[0] for row in rows].count("head") == 6
    assert [row[3] for row in rows if row[0] == "not simulated"] == list(
        load_recipe("msamp_o1").not_simulated
    )
    rows = recipe_table(load_recipe("nemotron_h_fp8"))
    assert ("kept high", "first 4 and last 4 layers", "", "bf16_amp", "", "") in rows
    text = str(recipe_table(load_recipe("fp16_amp")))
    assert "65536, ×2 every 2000 good steps, ×0.5 on overflow" in text
