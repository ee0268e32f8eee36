"""The optimizer sheet against the known case, the optimizer's own counters and next neighbors."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from halfulp.check.updates import ALL, Moments, Thresholds, neighbors, update_sheet
from halfulp.errors import ConfigError, NonFiniteError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.optim import AdamW
from halfulp.policy import Policy

LR = 1e-4


class OneMatrix(nn.Module):
    """Weights N(0, 0.02²) and a loss whose gradient is ±1e-3: Adam's first update is lr·sign."""

    def __init__(self, n: int = 1 << 16):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.down_proj = nn.Linear(256, n // 256, bias=False)
        signs = torch.rand(n // 256, 256, generator=generator) < 0.5
        self.signs = torch.where(signs, -1e-3, 1e-3)
        with torch.no_grad():
            self.down_proj.weight.normal_(0, 0.02, generator=generator)

    def loss(self) -> torch.Tensor:
        return (self.down_proj.weight * self.signs).sum()


def sheet_of(lr: float, **options):
    model = OneMatrix()
    return update_sheet(model, model.loss, lr=lr, **options)


def tiny(kind: str = "llama"):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes: dict = {"vocab_size": 64, "num_hidden_layers": 2, "hidden_size": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64}
    sizes |= {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    tokens = torch.randint(64, (2, 33), generator=torch.Generator().manual_seed(1))

    def loss():
        logits = model(tokens[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss


@pytest.mark.parametrize(
    ("lr", "low", "high"), [(1e-4, 0.10, 0.14), (2e-5, 0.67, 0.73), (6e-7, 0.98, 1.0)]
)
def test_known_share_of_lost_updates_in_bf16(lr, low, high):
    row = sheet_of(lr, weight_decay=0.0).weight("layers.0.ffn", "bf16")
    assert low < row.lost_updates < high
    assert row.asked == 1
    assert math.isnan(row.lost_decay)


@pytest.mark.parametrize(("lr", "low", "high"), [(1e-4, 1, 1), (3e-3, 1, 1), (3e-2, 0.3, 0.9)])
def test_known_lost_decay(lr, low, high):
    row = sheet_of(lr, weight_decay=0.1).weight("layers.0.ffn", "bf16")
    assert low <= row.lost_decay <= high


def test_learning_rates_at_which_updates_are_lost():
    """The quantiles say at one learning rate what sheets just beside it find.

    With equal |Δ| a whole binade of weights stops at once: the share jumps there.
    """
    row = sheet_of(LR, weight_decay=0.0).weight(ALL, "bf16")
    for share, rate in ((0.5, row.lr_half), (0.9, row.updates.lr_at(0.9)), (0.99, row.lr_stop)):
        below, above = (
            sheet_of(rate * f, weight_decay=0.0).weight(ALL, "bf16").lost_updates
            for f in (0.997, 1.003)
        )
        assert above < share < below < above + 0.3
        for factor, found in ((0.997, below), (1.003, above)):
            assert row.updates.lost_share(rate * factor) == pytest.approx(found, abs=1e-3)
    assert 1e-7 < row.lr_stop < 1e-6 < row.lr_half < 1e-4
    finer = sheet_of(LR, weight_decay=0.0, formats=["e8m8"]).weight(ALL, "e8m8")
    assert finer.lr_half == pytest.approx(row.lr_half / 2, rel=0.01)


def test_every_weight_format_has_its_own_threshold():
    sheet = sheet_of(2e-6, weight_decay=0.0, formats=["fp32", "fp16", "bf16", "e4m3"])
    lost = [sheet.weight(ALL, f).lost_updates for f in ("fp32", "fp16", "bf16", "e4m3")]
    assert lost[0] < 1e-3 < 0.6 < lost[1] < 0.8 < 0.95 < lost[2] < lost[3]
    assert sheet.weight(ALL, "fp32").lr_stop < 1e-10


@pytest.mark.parametrize("policy", ["bf16_weights", "fp32"])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_agrees_exactly_with_the_counters_of_the_optimizer(policy, decay):
    """Same step, same counts, parameter by parameter summed over blocks; two steps deep."""
    from halfulp.blocks import block_map
    from halfulp.optim import param_groups

    model, loss = tiny()
    resolution = Policy.from_recipe(policy).resolve(block_map(model))
    opt = AdamW(param_groups(model, resolution, decay), lr=LR, moment_v="bf16")
    opt.count(True)
    loss().backward()
    opt.step()
    opt.zero_grad()
    opt.counters()
    moments = {
        n: Moments(opt.state[p]["m"].clone(), opt.state[p]["v"].clone(), 1)
        for n, p in model.named_parameters()
    }
    fmt = str(resolution.recipes[0].weight)
    sheet = update_sheet(model, loss, lr=LR, weight_decay=decay, formats=[fmt], moments=moments)
    loss().backward()
    opt.step()
    rows = opt.counters()
    for block in {row["block"] for row in rows}:
        mine = [r for r in rows if r["block"] == block]
        asked = sum(r["asked"] * r["n"] for r in mine)
        lost = sum(r["unchanged"] * r["asked"] * r["n"] for r in mine)
        there = sheet.weight(block, fmt)
        assert there.elements == sum(r["n"] for r in mine)
        assert there.asked * there.elements == pytest.approx(asked, abs=1e-6)
        assert there.lost_updates * asked == pytest.approx(lost, abs=1e-6)
    total = sheet.weight(ALL, fmt)
    assert (total.lost_updates > 0.05) == (policy == "bf16_weights")
    assert total.updates.lost_share(LR) == pytest.approx(total.lost_updates, abs=2e-3)


def test_lost_decay_and_v_underflow_agree_with_the_counters():
    model = OneMatrix()
    p = model.down_proj.weight
    with torch.no_grad():
        model.signs.mul_(torch.logspace(-3, 0, 256))
    names = ["bf16", "fp16", "e4m3@tensor:current"]
    before = p.detach().clone()
    for name in names:
        with torch.no_grad():
            p.copy_(before)
        opt = AdamW([("w", p)], lr=1e-2, weight="bf16", moment_v=name)
        opt.count(True)
        sheet = update_sheet(model, model.loss, lr=1e-2, moment_formats=names)
        model.loss().backward()
        opt.step()
        p.grad = None
        (row,) = opt.counters()
        moment = next(r for r in sheet.moments if r.format == name and r.block == ALL)
        assert moment.underflow == row["v_underflow"]
        assert (moment.underflow == 0) == (name == "bf16")
        assert sheet.weight(ALL, "bf16").lost_decay == row["lost_decay"]
        assert sheet.weight(ALL, "bf16").lost_updates == row["lost_updates"]


def test_eps_floor():
    """Gradients of 1e-3 and below 1e-8, with clipping that moves them all below eps."""
    model = OneMatrix()
    with torch.no_grad():
        model.signs[:64].mul_(1e-6)
        model.signs[64:128] = 0
    sheet = update_sheet(model, model.loss, lr=LR)
    floor = next(f for f in sheet.floors if f.block == ALL)
    assert (floor.floor, floor.silent) == (pytest.approx(1 / 3), pytest.approx(0.25))
    clipped = update_sheet(model, model.loss, lr=LR, clip=sheet.grad_norm * 1e-6)
    assert next(f for f in clipped.floors if f.block == ALL).floor == 1
    assert clipped.weight(ALL, "bf16").lost_updates > sheet.weight(ALL, "bf16").lost_updates


@pytest.mark.parametrize(
    "name",
    ["bf16", "fp16", "e4m3", "e5m2", "e2m1", "e4m3@tensor:current:p2", "int8@tensor:current"],
)
def test_neighbors_are_the_nearest_other_values(name):
    """A step just over the gap's half lands on the next value; just under it stays."""
    q = parse_quantizer(name)
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 3
    x[:64] = 2.0 ** torch.arange(-32, 32).clamp(-14, 2)
    x[64] = 0
    x = apply_quantizer(x, q)
    largest = x.abs() == x.abs().max()
    for side, gap in zip((1, -1), neighbors(x, q), strict=True):
        assert (gap > 0).all()
        for factor, moves in ((0.51, True), (0.49, False)):
            stepped = x.double() + side * gap.double() * factor
            free = ~largest & gap.isfinite()
            y = apply_quantizer(torch.where(free, stepped, x.double()).float(), q)
            assert ((y != x)[free] == moves).all()


def test_thresholds_add_up():
    values = torch.rand(10_000, generator=torch.Generator().manual_seed(3)) * 1e-4
    values[:100] = math.inf
    parts = [Thresholds.of(v) for v in values.split(999)]
    total = sum(parts[1:], parts[0])
    assert total.entries == 10_000
    assert total.never == 100
    for share in (0.02, 0.5, 0.9, 0.99):
        rate = total.lr_at(share)
        assert rate == pytest.approx(np.quantile(values.numpy(), 1 - share), rel=3e-3)
        assert total.lost_share(rate) == pytest.approx(share, abs=1e-3)
    assert total.lr_at(0.005) == math.inf
    assert math.isnan(Thresholds.of(values[:0]).lost_share(1.0))


def test_the_model_is_unchanged_and_errors_answer():
    model, loss = tiny()
    before = [p.detach().clone() for p in model.parameters()]
    sheet = update_sheet(model, loss, lr=LR)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert {r.block for r in sheet.weights} > {"emb", "head", "layers.1.ffn", "norm", ALL}
    with pytest.raises(ConfigError, match="lr"):
        update_sheet(model, loss, lr=0)
    with pytest.raises(NonFiniteError, match="embed_tokens"):
        update_sheet(model, lambda: loss() * math.nan, lr=LR)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="requires_grad"):
        update_sheet(model, loss, lr=LR)
