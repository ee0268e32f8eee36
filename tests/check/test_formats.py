"""Words for formats, and the error model of rounding that prices rest on (A1)."""

import pytest
import torch

from halfulp.check.prices import price
from halfulp.check.sums import Rounding
from halfulp.check.trace import policy_sites
from halfulp.errors import FormatError
from halfulp.formats import NAMED, format_bits, format_quantizer
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.format import get_format
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from tests.check.toys import untrained


@pytest.mark.parametrize(
    ("word", "quantizer", "bits"),
    [
        ("bf16", "bf16", 16),
        ("fp16", "fp16", 16),
        ("e4m3", "e4m3@tensor:current:p2", 8),
        ("int8", "int8@tensor:current:p2", 8),
        ("mxfp8", "e4m3@1x32:e8m0_up", 8.25),
        ("nvfp4", "e2m1@1x16:nvfp4", 4.5),
        ("e5m2@16x16:current", "e5m2@16x16:current", 8.125),
    ],
)
def test_words(word, quantizer, bits):
    assert format_quantizer(word) == parse_quantizer(quantizer)
    assert format_bits(word) == bits


def test_unknown_words_get_the_nearest_ones():
    with pytest.raises(FormatError, match="mxfp8"):
        format_quantizer("mxfp9")
    with pytest.raises(FormatError, match="not priced"):
        Rounding.of("e4m3@tensor:delayed(4)")
    assert all(format_quantizer(word) for word in NAMED)


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3", "e5m2"])
def test_relative_errors_follow_the_random_model(name):
    """E δ² = 0.180 u² for log-uniform mantissas, |δ| ≤ u/(1+u), stochastic rounding twice that."""
    u = get_format(name).unit_roundoff
    generator = torch.Generator().manual_seed(0)
    x = torch.exp2(torch.rand(1_000_000, generator=generator) * 8 - 4)
    nearest, stochastic = (
        (apply_quantizer(x, parse_quantizer(f"{name}{how}"), key=key) - x).double() / x.double()
        for how, key in (("", None), (":stochastic", Key.of(0, "model")))
    )
    assert nearest.abs().max() <= u / (1 + u) * (1 + 1e-12)
    assert (nearest.square().mean() / u**2).item() == pytest.approx(0.180, abs=0.005)
    ratio = stochastic.square().mean() / nearest.square().mean()
    assert ratio.item() == pytest.approx(2.0, abs=0.05)


def test_a_policy_is_a_plan_over_sites():
    model = untrained("llama")
    ids = torch.randint(0, 257, (1, 16))
    p = price(model, ids, formats=("bf16",), families=("stored", "operand"), margins=False)
    plan = policy_sites(model, "te_current", p.sites)
    assert plan["layers.0.qk.q_proj/fprop.x"] == "e4m3@tensor:current"
    operands = {s.name for s in p.sites if s.family == "operand" and ".attn." not in s.name}
    assert {n for n, w in plan.items() if w.startswith("e4m3")} == operands - {
        "head.lm_head/fprop.x",
        "head.lm_head/fprop.w",
    }
    assert policy_sites(model, "fp32", p.sites) == {}
