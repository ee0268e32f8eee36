"""Counters of a quantizer against brute force in float64."""

import numpy as np
import pytest
import torch
from oracles.grids import double
from oracles.inputs import data

from halfulp.numerics import statistics
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.statistics import merge, quantizer_statistics, shares

TEXTS = [
    "e4m3", "e5m2@tensor:static(65536)", "e4m3@tensor:static(64)", "e4m3@tensor:current",
    "e4m3@1x32:e8m0_floor", "e4m3@1x32:e8m0_up", "e2m1@1x16:nvfp4", "int4@row",
    "e2m1@1x32:e8m0_floor:stochastic", "fp16", "bf16", "e4m3:hadamard(16)",
]  # fmt: skip


def counted(x: torch.Tensor, text: str, scale: torch.Tensor | None = None) -> dict[str, float]:
    q = parse_quantizer(text)
    y = apply_quantizer(x, q, key=Key(5, 6), scale=scale)
    return shares(quantizer_statistics(x, y, q, scale))


def brute_force(x: torch.Tensor, text: str) -> dict[str, float]:
    q = parse_quantizer(text)
    y = apply_quantizer(x, q, key=Key(5, 6)).numpy().ravel()
    x = hadamard(x, q.hadamard) if q.hadamard else x
    s = scales(x, q)[0] if q.scale != "none" else torch.tensor(1.0)
    s, v = (double(t.numpy()).ravel() for t in (s.expand_as(x), x))
    dropped = (v != 0) & (y == 0)
    return {
        "n": v.size,
        "saturated": float(np.mean(np.abs(v) * s > q.format.largest * (1 + 2.0**-20))),
        "underflow": dropped.sum() / (v != 0).sum(),
        "energy": (v**2).sum(),
        "underflow_energy": (v[dropped] ** 2).sum() / (v**2).sum(),
        "amax": np.abs(v).max(),
    }


@pytest.mark.parametrize("kind", ["normal", "lognormal"])
@pytest.mark.parametrize("text", TEXTS)
def test_equals_brute_force(text, kind, kernel_name):
    x = torch.from_numpy(data(kind, 37, 96))
    expected = brute_force(x, text)
    assert counted(x, text) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_the_counters_see_something():
    """Two-sided: the data above saturates and underflows where it should, and only there."""
    x = torch.from_numpy(data("lognormal", 37, 96))
    assert counted(x, "e4m3@tensor:current")["saturated"] == 0
    assert counted(x, "e4m3@tensor:current")["underflow"] > 0.05
    assert counted(x, "e4m3@tensor:static(64)")["saturated"] > 0.05
    assert counted(x, "e4m3@1x32:e8m0_floor")["saturated"] > 0.001
    assert counted(x, "e4m3@1x32:e8m0_up")["saturated"] == 0


def test_rounding_of_the_scale_is_not_saturation():
    """amax · s exceeds the largest value by rounding for some amax; that is no saturation."""
    for amax in np.linspace(1, 2, 500, dtype=np.float32):
        assert counted(torch.tensor([[amax]]), "e4m3@tensor:current")["saturated"] == 0


def test_stale_scale_is_seen():
    x = torch.tensor([1.0, 2.0, 4.0, 8.0])
    row = counted(x, "e4m3@tensor:delayed(2)", torch.tensor(112.0))
    assert row["saturated"] == 0.25
    assert row["amax"] == 8


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_non_finite_operands_show_in_amax(bad):
    x = torch.ones(2, 32)
    x[0, 0] = bad
    amax = counted(x, "e4m3@tensor:current")["amax"]
    assert amax == bad or (np.isnan(bad) and np.isnan(amax))


def test_zeros_are_no_underflow():
    row = counted(torch.zeros(4, 32), "e4m3@1x32:e8m0_up")
    zeros = dict.fromkeys(("saturated", "underflow", "energy", "underflow_energy", "amax"), 0)
    assert row == {"n": 128} | zeros


def test_merge_equals_one_call():
    """Sums add and maxima combine; the scale is static, so that halves see the same one."""
    x, q = torch.from_numpy(data("lognormal", 32, 64)), parse_quantizer("e4m3@tensor:static(8)")
    y = apply_quantizer(x, q)
    whole = quantizer_statistics(x, y, q)
    halves = [quantizer_statistics(a, b, q) for a, b in zip(x.split(10), y.split(10), strict=True)]
    together = halves[0]
    for half in halves[1:]:
        together = merge(together, half)
    assert together.tolist() == pytest.approx(whole.tolist(), rel=1e-6)


@pytest.mark.parametrize("value", [1e-24, 1e-30])
def test_energy_of_tiny_operands(value):
    assert counted(torch.full((4, 32), value), "fp16")["underflow_energy"] == 1


def test_empty_operands_count_nothing():
    """An expert that no token was sent to."""
    assert counted(torch.empty(0, 32), "e4m3@1x32:e8m0_up")["n"] == 0


@pytest.mark.parametrize("special", [None, "nan", "inf", "0"])
@pytest.mark.parametrize("shape", [(64, 64), (3, 50), (1, 7), (5, 40000)])
@pytest.mark.parametrize(
    "text",
    [
        "bf16",
        "e4m3",
        "e4m3@tensor:current",
        "e4m3@row:current",
        "e4m3@1x32:e8m0_floor",
        "e2m1@1x16:nvfp4",
        "e4m3@128x128:current",
    ],
)
def test_the_kernel_counts_what_the_definition_counts(monkeypatch, text, shape, special):
    q = parse_quantizer(text)
    x = torch.randn(shape) * torch.randn(shape).exp() * torch.randint(0, 2, shape) * 600
    if special:
        x.view(-1)[3] = float(special)
    y = apply_quantizer(x, q)
    found = quantizer_statistics(x, y, q)
    monkeypatch.setattr(statistics, "use_c", lambda *_: False)
    assert torch.allclose(found, quantizer_statistics(x, y, q), rtol=1e-12, equal_nan=True)
