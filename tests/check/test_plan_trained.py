"""A8: plans for trained models land on the budget that was asked, on the text and on other text."""

import math
import sysconfig
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from halfulp.blocks import block_map
from halfulp.check.groups import gemm_groups, stored_groups
from halfulp.check.measure import measure, measure_policy, reference
from halfulp.check.plan import Plan, average_bits, lowest_safe, plan, predicted_kl
from halfulp.check.prices import price

pytestmark = pytest.mark.slow
STORED, OPERANDS = ("e2m1", "e4m3", "bf16"), ("nvfp4", "e4m3", "bf16")
BUDGETS = (1e-5, 1e-4, 1e-3, 1e-2)


@cache
def library() -> Tensor:
    """Python's own source files as bytes."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return torch.frombuffer(bytearray(b"".join(f.read_bytes() for f in files)), dtype=torch.uint8)


def windows(count: int, generator: torch.Generator, held_out: bool) -> Tensor:
    data, border = library(), int(0.9 * len(library()))
    low, high = (border, len(data) - 128) if held_out else (0, border - 128)
    starts = torch.randint(low, high, (count,), generator=generator)
    return torch.stack([data[i : i + 128] for i in starts]).long()


def build(kind: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict = {"vocab_size": 256, "num_hidden_layers": 4, "hidden_size": 96}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    if kind == "gpt2":
        sizes = {"vocab_size": 256, "n_layer": 4, "n_embd": 96, "n_head": 4, "n_positions": 128}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))


@cache
def trained(kind: str, steps: int = 1000) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(kind)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.1)
    for step in range(steps):
        opt.param_groups[0]["lr"] = 2e-3 * min(1, step / 40) * (1 - step / steps)
        tokens = windows(8, generator, held_out=False)
        logits = model(tokens, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        opt.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
    assert loss.item() < 2.2
    return model.eval()


@cache
def texts() -> tuple[Tensor, Tensor]:
    """512 tokens that are priced and 2048 others, neither seen in training."""
    generator = torch.Generator().manual_seed(7)
    return windows(4, generator, held_out=True), windows(16, generator, held_out=True)


@cache
def priced(kind: str):
    words = tuple(dict.fromkeys((*STORED, *OPERANDS)))
    return price(trained(kind), texts()[0], formats=words, families=("stored", "operand"), probes=4)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_stored_plans_land_on_the_budget(kind):
    model, groups = trained(kind), stored_groups(priced(kind))
    refs = [reference(model, text) for text in texts()]
    bits = []
    for budget in BUDGETS:
        found = plan(groups, budget, formats=STORED)
        here, fresh = (
            measure(model, text, found.formats, ref).kl
            for text, ref in zip(texts(), refs, strict=True)
        )
        assert 0.95 * budget < found.predicted_kl <= budget
        assert 0.7 < here / budget < 1.3
        assert fresh / budget < 1.4
        bits.append(found.average_bits)
    assert bits == sorted(bits, reverse=True)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_plan_beats_one_format_for_all(kind):
    """Half the KL of e4m3 everywhere, with fewer bits."""
    model, groups, (text, _) = trained(kind), stored_groups(priced(kind)), texts()
    ref, uniform = reference(model, text), {g.name: "e4m3" for g in groups}
    kl = measure(model, text, uniform, ref).kl
    found = plan(groups, kl / 2, formats=STORED)
    assert found.average_bits < average_bits(groups, uniform) - 0.5
    assert measure(model, text, found.formats, ref).kl < 0.8 * kl


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_policies_land_on_the_budget(kind):
    """The same through halfulp.quantize: the policy that the plan writes."""
    model, (text, other) = trained(kind), texts()
    blocks = block_map(model)
    groups = gemm_groups(priced(kind), blocks)
    for budget in (1e-4, 1e-3):
        found = plan(groups, budget, formats=OPERANDS)
        policy = found.to_policy(blocks)
        here = measure_policy(model, text, policy, reference(model, text)).kl
        fresh = measure_policy(model, other, policy, reference(model, other)).kl
        assert len(set(found.formats.values())) >= 2
        assert 0.7 < here / budget < 1.3
        assert fresh / budget < 1.4


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_advice_comes_true(kind):
    """What-if lines say what a run with the change measures; safe formats are safe together."""
    model, groups, (text, _) = trained(kind), stored_groups(priced(kind)), texts()
    ref, found = reference(model, text), plan(groups, 1e-3, formats=STORED)
    for change in found.what_if[:2]:
        changed = changed_formats(found, change.kind, change.format)
        assert predicted_kl(groups, changed) == pytest.approx(change.kl_after)
        assert measure(model, text, changed, ref).kl == pytest.approx(change.kl_after, rel=0.4)
    safe = {s.block: s.together for s in lowest_safe(groups, 1e-3, formats=STORED)}
    together = measure(model, text, {g.name: safe[g.block] for g in groups}, ref).kl
    assert 1e-5 < together < 1.3e-3


def changed_formats(found: Plan, kind: str, word: str) -> dict[str, str]:
    """`found` with the groups of `kind` raised to `word` where that costs less."""
    rank = {"e2m1": 0, "e4m3": 1, "bf16": 2, "fp32": 3}
    changed = dict(found.formats)
    for g in found.groups:
        now = changed[g.name]
        cheaper = word == "fp32" or g.prices[word] < g.prices.get(now, math.nan)
        if g.kind == kind and rank[word] > rank[now] and cheaper:
            changed[g.name] = word
    return changed
