"""Scaled quantizers against plain loops: tensor, row, block and tile; current, delayed, static."""

import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.grids import F32, grid
from oracles.hashing import key_of, words_at
from oracles.inputs import DATA_KINDS, data
from oracles.scaling import exponent_up, given, quantize, scale_pair

from halfulp.numerics.apply import apply_quantizer, delayed_scale, scales
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key

TILES = {"tensor": (0, 0), "row": (1, 0), "1x32": (1, 32), "1x128": (1, 128), "8x8": (8, 8)}
RULES = {"current": ("current", 0), "current:p2": ("p2", 0), "current:margin(1)": ("current", 1),
         "current:p2:margin(2)": ("p2", 2)}  # fmt: skip


@pytest.mark.parametrize("kind", DATA_KINDS)
@pytest.mark.parametrize("granularity", TILES)
@pytest.mark.parametrize("words", RULES)
def test_current_scaling_equals_the_oracle(words, granularity, kind, kernel_name):
    """37 x 200: neither the 1x32, the 1x128 nor the 8x8 tiles fill it."""
    x, (rule, margin) = data(kind, 37, 200), RULES[words]
    for name in ("e4m3", "int8"):
        q = parse_quantizer(f"{name}@{granularity}:{words}")
        expected = quantize(x, name, rule, TILES[granularity], margin=margin)
        assert_same(apply_quantizer(torch.from_numpy(x), q), expected, x)


@pytest.mark.parametrize("rounding", ["stochastic", "truncate"])
@pytest.mark.parametrize("granularity", TILES)
@pytest.mark.parametrize("name", ["e5m2", "fp16", "int4", "e2m1"])
def test_other_roundings_equal_the_oracle(name, granularity, rounding, kernel_name):
    x = data("normal", 37, 200)
    words = words_at(key_of(0, "x"), 0, x.size).reshape(x.shape)
    q = parse_quantizer(f"{name}@{granularity}:{rounding}")
    expected = quantize(x, name, "current", TILES[granularity], rounding=rounding, words=words)
    assert_same(apply_quantizer(torch.from_numpy(x), q, key=Key.of(0, "x")), expected, x)


def test_leading_dimensions_are_rows(kernel_name):
    x = torch.from_numpy(data("wide", 24, 64))
    for text in ("e4m3@row", "e4m3@1x32:e8m0_up", "e4m3@8x8", "e2m1@16x16:nvfp4"):
        q = parse_quantizer(text)
        assert_same(apply_quantizer(x.view(2, 3, 4, 64), q), apply_quantizer(x, q))


def test_scale_uses_the_whole_range(kernel_name):
    """Two-sided: the largest element lands on the format's largest value, and comes back."""
    x = torch.from_numpy(data("normal", 16, 64))
    s, inverse = scales(x, parse_quantizer("e4m3@tensor"))
    assert (x.abs().amax() * s - 448).abs() < 448 * 2.0**-22
    assert (s * inverse - 1).abs() < 2.0**-22
    error = (apply_quantizer(x, parse_quantizer("e4m3@tensor")) - x).norm() / x.norm()
    assert 0.02 < error < 0.03


@pytest.mark.parametrize("amax", [1.0, 448.0, 448.00003, 1e-30, 3e38, 2.0**-140, 0.4375])
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "int8"])
def test_power_of_two_scale_is_the_largest_that_fits(name, amax, kernel_name):
    x = torch.tensor([[F32(amax), -F32(amax) / 3]])
    q = parse_quantizer(f"{name}@tensor:p2")
    s, inverse = (float(t) for t in scales(x, q))
    assert s == 2.0 ** -exponent_up(float(F32(amax)), grid(name).largest)
    assert s * inverse == 1
    assert s * F32(amax) <= grid(name).largest
    assert s == 2.0**127 or 2 * s * F32(amax) > grid(name).largest


@pytest.mark.parametrize("k", [-20, 0, 30])
@pytest.mark.parametrize("words", ["row:p2", "tensor:p2", "1x32:e8m0_up", "2x32:e8m0_up"])
def test_a_group_that_just_fits_is_not_scaled_down(words, k, kernel_name):
    """amax = 448 · 2^k keeps 2^(k − 9); one ulp more needs the next scale, which loses it."""
    x = torch.tensor([[448.0, 2.0**-9]]).ldexp(torch.tensor(k))
    q = parse_quantizer(f"e4m3@{words}")
    assert torch.equal(apply_quantizer(x, q), x)
    x[0, 0] = torch.nextafter(x[0, 0], torch.tensor(torch.inf))
    assert apply_quantizer(x, q)[0, 1] == 0


def test_zero_groups_stay_zero_with_their_signs(kernel_name):
    x = torch.zeros(2, 32)
    x[1] = -0.0
    for text in ("e4m3@tensor", "e4m3@row:p2", "e4m3@1x32:e8m0_up", "e4m3@1x32:e8m0_floor",
                 "e2m1@1x16:nvfp4", "int8@8x8"):  # fmt: skip
        q = parse_quantizer(text)
        assert_same(apply_quantizer(x, q), x)
        assert (scales(x, q)[0] == 1).all()


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_group_with_inf_or_nan_is_nan_and_no_other(bad, kernel_name):
    x = torch.ones(4, 64)
    x[1, 40] = bad
    broken = {"e4m3@tensor": 256, "e4m3@row": 64, "e4m3@1x32:e8m0_up": 32,
              "e4m3@1x32:e8m0_floor": 32, "int8@2x16": 32, "e2m1@1x16:nvfp4": 256}  # fmt: skip
    for text, n in broken.items():
        y = apply_quantizer(x, parse_quantizer(text))
        assert int(y.isnan().sum()) == n, text
        assert (y[~y.isnan()] == 1).all()


@pytest.mark.parametrize("s", [1.0, 0.3, 64.0])
@pytest.mark.parametrize("kind", ["normal", "wide", "nan_inf"])
def test_static_scale_equals_the_oracle(kind, s, kernel_name):
    x = data(kind, 20, 50)
    q = parse_quantizer(f"e4m3@tensor:static({s})")
    expected = given(x, grid("e4m3"), float(F32(s)), float(F32(1) / F32(s)))
    assert_same(apply_quantizer(torch.from_numpy(x), q), expected, x)


def test_delayed_scale_comes_from_outside(kernel_name):
    x = data("normal", 20, 50)
    q = parse_quantizer("e5m2@tensor:delayed(4):stochastic")
    words = words_at(key_of(0, "x"), 0, x.size).reshape(x.shape)
    expected = given(x, grid("e5m2"), 7.0, float(F32(1) / F32(7)), "stochastic", words)
    y = apply_quantizer(torch.from_numpy(x), q, key=Key.of(0, "x"), scale=torch.tensor(7.0))
    assert_same(y, expected)


def test_a_stale_delayed_scale_saturates():
    q = parse_quantizer("e4m3@tensor:delayed(2)")
    scale = delayed_scale(torch.tensor([1.0, 0.5]), q)
    y = apply_quantizer(torch.tensor([1.0, 2.0, -torch.inf]), q, scale=scale)
    assert y.tolist() == [1.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("words", "history", "expected"),
    [
        ("", [0.0, 0.0], 1.0),
        ("", [0.0, 2.0, 8.0, 4.0], 448 / 8),
        ("", [2.0, torch.inf, torch.nan], 448 / 2),
        ("", [torch.inf, torch.nan], 1.0),
        (":margin(2)", [2.0], 448 / 8),
        (":p2", [3.0], 128.0),
        (":p2", [3.5], 128.0),
        (":p2", [3.5000002], 64.0),
        (":p2:margin(1)", [3.0], 64.0),
    ],
)
def test_delayed_scale_of_a_history(words, history, expected):
    q = parse_quantizer(f"e4m3@tensor:delayed(4){words}")
    assert float(delayed_scale(torch.tensor(history), q)) == expected


def test_scale_of_tiny_groups_is_finite(kernel_name):
    """448 / 1e-45 overflows fp32; the scale is the largest fp32 number instead."""
    x = torch.tensor([[1e-45, -3e-45]])
    s, _ = scales(x, parse_quantizer("e4m3@row"))
    assert float(s) == scale_pair(3e-45, grid("e4m3"), "current")[0] == float(np.finfo(F32).max)
    assert apply_quantizer(x, parse_quantizer("e4m3@row")).isfinite().all()


def test_e8m0_scale_of_int2_stays_finite():
    x = torch.tensor([[3e38, 0.0]])
    assert apply_quantizer(x, parse_quantizer("int2@1x32:e8m0_up")).isfinite().all()


@pytest.mark.parametrize("text", ["int2@row", "e4m3@row:margin(64)", "e3m4@tensor:margin(48)"])
def test_inverse_scale_of_huge_groups_is_finite(text, kernel_name):
    x = torch.tensor([[np.finfo(F32).max, 1e38, 0.0]])
    s, inverse = scales(x, parse_quantizer(text))
    assert 2.0**-128 < float(s) < 2.0**-127
    assert 2.0**127 < float(inverse) < np.inf
    y = apply_quantizer(x, parse_quantizer(text))
    assert y.isfinite().all()
    assert y[0, 2] == 0
    assert 3.4e38 < float(y[0, 0]) < np.inf
