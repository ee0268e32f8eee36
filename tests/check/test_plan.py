"""Plans: near the exact optimum, within the budget, pinned, possible, and obeyed by a policy."""

import itertools
import math
import tomllib
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import halfulp
from halfulp.blocks import block_map
from halfulp.check.groups import Group, gemm_groups, stored_groups, table_groups
from halfulp.check.plan import average_bits, lowest_safe, plan, predicted_kl, what_if
from halfulp.check.sites import SiteInfo
from halfulp.errors import CheckError, ConfigError
from halfulp.formats import format_bits, format_quantizer
from halfulp.knapsack import allocate
from halfulp.policy import Policy

WORDS = ("bf16", "fp16", "e4m3", "e5m2", "mxfp8", "nvfp4")
BITS = np.array([32, 16, 8, 4.5])


def instance(rng: np.random.Generator, groups: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Prices that spread over 10^4 as sites do (spec R10), sizes over 10^2."""
    sizes = np.exp(rng.normal(0, 1.5, groups))
    noise = np.exp(rng.normal(0, 0.4, (groups, 4)))
    base = np.exp(rng.normal(-8, 2, groups))[:, None]
    prices = base * noise * np.array([0, 1e-3, 1, 20])
    low, high = np.log(prices[:, 1].sum() * 0.3), np.log(prices[:, 3].sum())
    return sizes[:, None] * BITS, prices, float(np.exp(rng.uniform(low, high)))


def total(table: np.ndarray, options) -> float:
    return float(table[np.arange(len(table)), list(options)].sum())


def test_allocation_is_nearly_that_of_exhaustive_search():
    rng, gaps = np.random.default_rng(0), []
    every = np.array(list(itertools.product(range(4), repeat=6)))
    for _ in range(150):
        bits, prices, budget = instance(rng, 6)
        chosen = allocate(bits, prices, budget)
        assert total(prices, chosen) <= budget * (1 + 1e-12)
        spent, paid = (table[np.arange(6), every].sum(1) for table in (bits, prices))
        best = spent[paid <= budget].min()
        gaps.append(total(bits, chosen) / best - 1)
    assert np.mean(np.array(gaps) < 1e-9) > 0.93
    assert np.mean(gaps) < 0.002
    assert max(gaps) < 0.1


def exact(bits: np.ndarray, prices: np.ndarray, budget: float) -> float:
    """Fewest bits by dynamic programming over partial sums, dominated ones dropped."""
    front = [(0.0, 0.0)]
    for b, p in zip(bits, prices, strict=True):
        sums = sorted((x + c, y + d) for x, y in front for c, d in zip(b, p, strict=True))
        front, cheapest = [], math.inf
        for x, y in sums:
            if y < cheapest and y <= budget:
                front.append((x, y))
                cheapest = y
    return front[0][0]


def test_allocation_is_nearly_that_of_dynamic_programming():
    rng, gaps, greedy = np.random.default_rng(1), [], []
    for _ in range(15):
        bits, prices, budget = instance(rng, 16)
        best = exact(bits, prices, budget)
        gaps.append(total(bits, allocate(bits, prices, budget)) / best - 1)
        uniform = max(f for f in range(4) if prices[:, f].sum() <= budget)
        greedy.append(bits[:, uniform].sum() / best - 1)
    assert max(gaps) < 0.01
    assert np.mean(gaps) < 0.002
    assert np.mean(greedy) > 0.15  # one format for all is far from it


def test_allocation_at_the_edges():
    bits, prices = np.array([[32.0, 8.0], [32.0, 8.0]]), np.array([[0.0, 1.0], [0.5, np.nan]])
    assert allocate(bits, prices, 0.6).tolist() == [0, 0]
    assert allocate(bits, prices, 1.5).tolist() == [1, 0]
    assert allocate(bits, prices, 0.1).tolist() == [0, 0]  # over budget: the cheapest prices
    assert allocate(bits[:0], prices[:0], 1.0).tolist() == []


# Plans


def group(name: str, prices: dict[str, float], **fields) -> Group:
    defaults = {"block": name.rpartition(".")[0], "kind": name, "role": "linear", "size": 1.0}
    return Group(**(defaults | {"name": name, "prices": prices} | fields))


FFN = group("layers.0.ffn.up", {"bf16": 1e-6, "e4m3": 1e-4, "e5m2": 4e-4, "nvfp4": 2e-3})
QK = group("layers.0.attn.qk", {"bf16": 5e-5, "e4m3": 5e-3, "e5m2": 2e-2, "nvfp4": 1e-1})
HEAD = group("head.lm_head", {"bf16": 1e-6, "e4m3": 1e-5, "e5m2": 4e-5, "nvfp4": 2e-4}, size=2.0)
GROUPS = (FFN, QK, HEAD)


def test_a_plan_spends_the_budget_where_it_buys_most():
    found = plan(GROUPS, 1e-3)
    assert found.formats == {
        "layers.0.ffn.up": "e4m3",
        "layers.0.attn.qk": "bf16",
        "head.lm_head": "bf16",
    }
    assert found.fits
    assert found.predicted_kl == pytest.approx(1.51e-4)
    assert found.average_bits == pytest.approx((8 + 16 + 2 * 16) / 4)
    assert plan(GROUPS, 1e-2, formats=["bf16", "e4m3"]).formats["layers.0.attn.qk"] == "e4m3"
    smallest = plan(GROUPS, 1e-12)
    assert set(smallest.formats.values()) == {"fp32"}
    assert (smallest.predicted_kl, smallest.average_bits) == (0, 32)


def test_more_budget_never_costs_bits():
    rng = np.random.default_rng(3)
    groups = [
        group(f"layers.{i}.ffn.up", {"bf16": p, "e4m3": 300 * p, "nvfp4": 8000 * p})
        for i, p in enumerate(np.exp(rng.normal(-14, 2, 40)))
    ]
    bits = [plan(groups, budget).average_bits for budget in np.logspace(-8, 0, 30)]
    assert bits[0] > 20
    assert bits[-1] < 6
    assert all(a >= b * 0.999 for a, b in itertools.pairwise(bits))
    assert all(plan(groups, b).predicted_kl > 0.8 * b for b in (1e-5, 1e-4, 1e-3, 1e-2))


def test_pins():
    pinned = plan(GROUPS, 1.0, pins={"layers.*": "exactly bf16"})
    assert pinned.formats["layers.0.ffn.up"] == pinned.formats["layers.0.attn.qk"] == "bf16"
    assert pinned.formats["head.lm_head"] == "bf16"  # the default pin
    assert plan(GROUPS, 1.0).formats["head.lm_head"] == "bf16"
    assert plan(GROUPS, 1.0, pins={"head": "free"}).formats["head.lm_head"] == "nvfp4"
    whys = {e.why for e in pinned.excluded if e.group == "layers.0.attn.qk"}
    assert whys == {"pinned: layers.* exactly bf16"}
    tight = plan(GROUPS, 1e-6, pins={"layers.0.attn.qk": "exactly e4m3"})
    assert not tight.fits
    for pins, said in (
        ({"layer.0*": "free"}, "matches no group"),
        ({"*": "at least bf16"}, "never below bf16"),
        ({"*": "exactly fp8"}, "fp8"),
        ({"*": "exactly int8"}, "no format is left"),
    ):
        with pytest.raises(halfulp.errors.HalfulpError, match=said):
            plan(GROUPS, 1e-3, pins=pins)


def test_hardware_excludes_what_it_does_not_multiply():
    on_hopper = plan(GROUPS, 1.0, hardware="h100")
    assert on_hopper.hardware == "hopper"
    assert on_hopper.formats["layers.0.ffn.up"] == "e4m3"
    told = {e.format: e.why for e in on_hopper.excluded if e.group == "*"}
    assert set(told) == {"e5m2", "nvfp4"}
    assert "only with e4m3" in told["e5m2"]
    assert plan(GROUPS, 1.0, hardware="b200").formats["layers.0.ffn.up"] == "nvfp4"
    assert plan(GROUPS, 1.0, hardware="tpu_v6").formats["layers.0.ffn.up"] == "bf16"


def test_unknown_is_never_free():
    detached = group("layers.1.ffn.up", {"bf16": math.nan, "e4m3": math.nan, "nvfp4": math.inf})
    found = plan([*GROUPS, detached], 1.0)
    assert found.formats["layers.1.ffn.up"] == "fp32"
    whys = {e.format: e.why for e in found.excluded if e.group == "layers.1.ffn.up"}
    assert whys["e4m3"] == "its price is unknown"
    assert whys["nvfp4"] == "it overflows"
    assert math.isnan(predicted_kl([detached], {"layers.1.ffn.up": "bf16"}))
    for budget in (0, -1, math.nan, math.inf):
        with pytest.raises(ConfigError, match="budget"):
            plan(GROUPS, budget)
    with pytest.raises(ConfigError, match="int8"):
        plan(GROUPS, 1e-3, formats=["bf16", "int8"])


def test_what_if_names_the_changes_that_buy_most():
    uniform = {g.name: "e4m3" for g in GROUPS}
    first, second = what_if(GROUPS, uniform, formats=["bf16", "e4m3"])  # the head buys nothing
    assert (first.kind, first.format, first.before) == ("layers.0.attn.qk", "bf16", ("e4m3",))
    assert first.kl_before == pytest.approx(5.11e-3)
    assert first.kl_after == pytest.approx(1.6e-4)
    assert first.bits_after == pytest.approx(first.bits_before + 8 / 4)
    assert (second.kind, second.format) == ("layers.0.ffn.up", "bf16")
    assert first.kl_after < second.kl_after < second.kl_before
    assert "KL 5.1e-3 → 1.6e-4 nats/token, 8.00 → 10.00 bits" in str(first)
    assert what_if(GROUPS, {g.name: "fp32" for g in GROUPS}) == ()
    assert len(what_if(GROUPS, uniform, by="block", top=2)) == 2


def test_lowest_safe_formats():
    found = {s.block: s for s in lowest_safe(GROUPS, 6e-3)}
    assert found["layers.0.ffn"].alone == "nvfp4"
    assert found["layers.0.attn"].alone == "e4m3"
    assert found["layers.0.attn"].together == "bf16"
    assert found["head"].alone == "bf16"
    together = {g.name: found[g.block].together for g in GROUPS}
    assert predicted_kl(GROUPS, together) <= 6e-3
    assert {s.alone for s in lowest_safe(GROUPS, 1e-9)} == {"fp32"}


# Policies


@cache
def model_of(kind: str, layers: int = 3):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict = {"vocab_size": 64, "num_hidden_layers": layers, "hidden_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    sizes |= {"head_dim": 8} if kind == "qwen3" else {}
    if kind == "gpt2":
        sizes = {"vocab_size": 64, "n_layer": layers, "n_embd": 32, "n_head": 4, "n_positions": 64}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


def synthetic(kind: str, seed: int = 0) -> tuple:
    """(prices, block map): random prices of a model's operand sites and tables."""
    blocks = block_map(model_of(kind))
    rng, sites = np.random.default_rng(seed), []
    for gemm in blocks.gemms:
        for operand, shape in (("x", (2, 16, 32)), ("w", (48, 32))):
            sites.append(
                SiteInfo(
                    name=f"{gemm.name}/fprop.{operand}", family="operand", module=gemm.module,
                    op="linear", kind="x", block=gemm.block, gemm=gemm.name, operand=operand,
                    shape=shape,
                )
            )  # fmt: skip
    for name, block in blocks.parameters.items():
        fields = {"module": "", "op": "parameter", "kind": "weight", "block": block}
        sites.append(SiteInfo(name=f"weight:{name}", family="stored", shape=(64, 32), **fields))
    base = np.exp(rng.normal(-13, 2, (len(sites), 1)))
    kl = torch.from_numpy(base * np.array([1, 0.02, 250, 1000, 200, 4000.0]))
    return SimpleNamespace(sites=tuple(sites), formats=WORDS, kl=kl), blocks


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
@pytest.mark.parametrize("budget", [1e-5, 1e-3, 1e-1])
def test_policy_gives_every_gemm_its_format(kind, budget, tmp_path):
    """Written, loaded, resolved and applied: each operand is what the plan says."""
    prices, blocks = synthetic(kind)
    found = plan([*gemm_groups(prices, blocks), *table_groups(prices)], budget)
    path = tmp_path / "policy.toml"
    path.write_text(found.to_toml(blocks))
    policy = Policy.load(path)
    assert policy == found.to_policy(blocks)
    assert policy.rules[-1].match == "*"
    assert tomllib.loads(policy.to_toml())
    resolution = policy.resolve(blocks)
    assert len(resolution.gemms) == len(blocks.gemms)
    for gemm, _, spec, _ in resolution.gemms:
        q = format_quantizer(found.formats[gemm.name])
        assert (spec.fprop_x, spec.fprop_w) == (q, q)
        assert str(spec.fprop_out) == "fp32"
    for module, q in {**resolution.embeds, **resolution.norms}.items():
        block = {**blocks.embeddings, **blocks.norms}[module]
        assert q == format_quantizer(found.formats[block])
    if budget == 1e-1:
        assert len({found.formats[g.name] for g in blocks.gemms}) >= 3
        assert len(policy.rules) < len(blocks.gemms)
    model = model_of(kind)
    tokens = torch.arange(32)[None] % 64
    with torch.no_grad():
        before = model(tokens).logits
        handle = halfulp.quantize(model, path)
        assert {n: str(s.spec.fprop_x) for n, s in handle.sites.items()} == {
            g.name: str(format_quantizer(found.formats[g.name]))
            for g in blocks.gemms
            if found.formats[g.name] != "fp32"
        }
        after = model(tokens).logits
        halfulp.unquantize(model)
        assert torch.equal(model(tokens).logits, before)
    assert 0 < (after - before).norm() / before.norm() < 1


@pytest.mark.parametrize(
    ("backward", "expected"),
    [
        ("bf16", {"e4m3": ("bf16", "bf16"), "bf16": ("bf16", "bf16"), "tf32": ("tf32", "tf32")}),
        ("hybrid", {"e4m3": ("e5m2@tensor:current:p2", "e4m3@tensor:current:p2"),
                    "mxfp8": ("e4m3@1x32:e8m0_up", "e4m3@1x32:e8m0_up"),
                    "nvfp4": ("bf16", "bf16"), "fp16": ("bf16", "bf16")}),
        ("same", {"nvfp4": ("e2m1@1x16:nvfp4", "e2m1@1x16:nvfp4")}),
        ("fp32", {"e4m3": ("fp32", "fp32")}),
    ],
)  # fmt: skip
def test_backward_operands(backward, expected):
    _, blocks = synthetic("llama")
    for word, (g, x) in expected.items():
        one = group("layers.1.ffn.up_proj", {word: 1e-9}, role="linear")
        found = plan([one], 1.0).to_policy(blocks, backward=backward)
        (spec,) = [d.spec for d in found.resolve(blocks).gemms if d.gemm.name == one.name]
        assert (str(spec.dgrad_g), str(spec.wgrad_g)) == (g, g)
        assert (str(spec.dgrad_w), str(spec.wgrad_x)) == (x, x)
        others = [d for d in found.resolve(blocks).gemms if d.gemm.name != one.name]
        assert {d.recipe.name for d in others} == {"fp32"}


def test_policy_refuses_what_cannot_be():
    prices, blocks = synthetic("llama")
    found = plan(gemm_groups(prices, blocks), 1e-1)
    with pytest.raises(CheckError, match="no GEMM of this model"):
        found.to_toml(block_map(model_of("gpt2")))
    with pytest.raises(CheckError, match="backward"):
        found.to_toml(blocks, backward="fp8")
    with pytest.raises(CheckError, match="stored"):
        plan(stored_groups(prices), 1e-1).to_toml(blocks)
    only = group("layers.1.ffn.up_proj", {"e4m3": 1e-9}, role="linear")
    on_hopper = plan([only], 1.0, hardware="hopper")
    assert "e5m2" in on_hopper.to_toml(blocks, backward="hybrid")
    with pytest.raises(CheckError, match="operand sites"):
        gemm_groups(prices, block_map(torch.nn.ModuleDict({"fc1": torch.nn.Linear(2, 2)})))


def test_groups_add_up_and_weigh():
    prices, blocks = synthetic("llama")
    groups = gemm_groups(prices, blocks)
    assert len(groups) == len(blocks.gemms)
    assert {g.size for g in groups} == {2 * 16 * 32 + 48 * 32}
    assert {g.size for g in gemm_groups(prices, blocks, weigh="macs")} == {2 * 16 * 32 * 48}
    summed = {w: math.fsum(g.prices[w] for g in groups) for w in WORDS}
    rows = [i for i, s in enumerate(prices.sites) if s.family == "operand"]
    assert summed == pytest.approx(dict(zip(WORDS, prices.kl[rows].sum(0).tolist(), strict=True)))
    assert {g.kind for g in groups} > {"layers.*.attn.qk", "layers.*.ffn.up_proj"}
    half = {g.name: "e4m3" if i % 2 else "bf16" for i, g in enumerate(groups)}
    assert average_bits(groups, half) == pytest.approx(12, abs=0.5)
    assert format_bits("nvfp4") == 4.5
