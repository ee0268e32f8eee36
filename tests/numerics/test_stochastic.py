"""Stochastic rounding: the right neighbor with exactly the right probability."""

import gfloat
import gfloat.formats
import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.grids import double, grid, round_array, round_exact, values
from oracles.hashing import key_of, words_at
from oracles.inputs import around_grid, mixture

from halfulp.numerics.format import FORMATS, get_format
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_definition, round_to

NAMES = [n for n in FORMATS if n != "fp32"]
GENERAL = ["e8m3", "e8m22", "e7m22", "e5m3", "e4m3ieee", "e4m4fn", "e3m3finite", "e2m22", "int12"]
KEY = Key.of(0, "test")


def stochastic(x: torch.Tensor, name: str, key: Key = KEY, **options) -> torch.Tensor:
    return round_to(x, name, rounding="stochastic", key=key, **options)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("name", NAMES + GENERAL)
def test_equals_the_oracle_with_the_same_words(name, saturate, kernel_name):
    x = mixture(30_000)
    if grid(name).m <= 10 and name != "tf32":
        x = np.concatenate([x, around_grid(name)[::11]])
    words = words_at(key_of(0, "test"), 0, len(x))
    y = stochastic(torch.from_numpy(x), name, saturate=saturate)
    assert_same(y, round_array(x, grid(name), "stochastic", saturate, words), x)


@pytest.mark.parametrize("name", ["bf16", "e4m3", "e2m1", "e4m3ieee", "int8"])
def test_equals_fractions_with_the_same_words(name, kernel_name):
    x = mixture(1000, seed=5)
    words = words_at(key_of(0, "test"), 0, len(x)).tolist()
    expected = [
        round_exact(v, grid(name), "stochastic", False, w)
        for v, w in zip(x.tolist(), words, strict=True)
    ]
    assert_same(stochastic(torch.from_numpy(x), name, saturate=False), np.array(expected), x)


def test_bf16_equals_gfloat_with_the_same_words(kernel_name):
    x = mixture(50_000, seed=6)
    words = words_at(key_of(0, "test"), 0, len(x)).astype(np.int64)
    expected = gfloat.round_ndarray(
        gfloat.formats.format_info_bfloat16,
        double(x),
        gfloat.RoundMode.StochasticFastest,
        srbits=words & 0xFFFF,
        srnumbits=16,
    )
    assert_same(stochastic(torch.from_numpy(x), "bf16"), expected, x)


@pytest.mark.parametrize("name", ["e4m3", "e2m1", "fp16"])
def test_subnormals_at_the_threshold_of_their_own_word(name, kernel_name):
    """|error| / step against (k + 1/2) 2^-22, k the word's top 22 bits: one fp32 ulp decides."""
    words = words_at(key_of(0, "test"), 0, 4000)
    share = (2 * (words >> 10).astype(np.int64) + 1) * 2.0**-23
    x = (np.minimum(share, 1 - share) * 2.0 ** (grid(name).e_min - grid(name).m)).astype(np.float32)
    moved = []
    for target in (0.0, None, 1.0):
        near = x if target is None else np.nextafter(x, np.float32(target))
        y = stochastic(torch.from_numpy(near), name)
        assert_same(y, round_array(near, grid(name), "stochastic", True, words), near)
        moved.append(float((y > 0).float().mean()))
    assert moved[0] <= moved[1] < 0.1 < 0.4 < moved[2]


@pytest.mark.parametrize("name", ["bf16", "e8m1", "tf32"])
def test_carries_at_the_threshold_of_their_own_word(name, kernel_name):
    """Up iff discarded bits + word mod 2^b ≥ 2^b: one unit in the last place decides."""
    bits = 23 - grid(name).m
    low = words_at(key_of(0, "test"), 0, 4000).astype(np.int64) % 2**bits
    discarded = 2**bits - np.maximum(low, 2)
    for less in (0, 1):
        x = (0x3F800000 + discarded - less).astype(np.uint32).view(np.float32)
        up = stochastic(torch.from_numpy(x), name).numpy() > 1
        assert (up == (discarded - less + low >= 2**bits)).all()
        assert abs(up.mean() - (1 - less)) < 0.01


@pytest.mark.parametrize("name", [*NAMES, "e4m3ieee", "e5m3"])
def test_result_is_one_of_the_two_neighbors(name, kernel_name):
    g, x = grid(name), mixture(20_000, seed=7)
    x = x[np.abs(x) <= g.largest]
    y = stochastic(torch.from_numpy(x), name).numpy()
    low = round_array(x, g, "truncate").astype(np.float32)
    assert (np.abs(y) >= np.abs(low)).all()
    up = y != low
    # The other neighbor: truncating it must not pass x, and nothing of the grid lies between.
    assert (np.abs(y[up]) > np.abs(x[up])).all()
    between = (low[up].astype(np.float64) + y[up]) / 2
    assert_same(round_array(between, g, "truncate"), low[up])
    assert up.any()


@pytest.mark.parametrize("name", ["bf16", "fp16", "e4m3", "e2m1", "int8"])
def test_values_on_the_grid_never_move(name, kernel_name):
    grid_values = values(name).astype(np.float32)
    repeats = 2_000_000 // len(grid_values) + 1
    x = torch.from_numpy(np.resize(np.concatenate([grid_values, -grid_values]), 2_000_000))
    assert repeats > 30
    assert torch.equal(stochastic(x, name), x)


# (value, format): normals, subnormals down to 2^-9 of the smallest, and fp32 subnormals.
PROBABILITIES = [
    ("e4m3", 1 + 2.0**-13), ("e4m3", 1.03125), ("e4m3", 17.3), ("e4m3", -300.7),
    ("e4m3", 2.0**-9 / 512), ("e4m3", 2.0**-9 * 0.7), ("e4m3", 2.0**-9 * 5.01),
    ("e5m2", 1.1), ("e5m2", 2.0**-16 * 0.01), ("e5m2", -2.0**-16 * 2.5),
    ("e2m1", 0.01), ("e2m1", 0.4), ("e2m1", 4.5), ("e2m1", -5.999),
    ("fp16", 1 + 2.0**-20), ("fp16", 2.0**-24 * 0.3), ("fp16", 1000.1),
    ("bf16", 1 + 2.0**-14), ("bf16", -1.7001), ("bf16", 1e-40), ("bf16", 3e38),
    ("int8", 0.001), ("int8", 126.5), ("int4", -3.3), ("e8m3", 0.71), ("e3m4", 1.01),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), PROBABILITIES)
def test_mean_is_the_value(name, value):
    """|z| < 5: a correct generator fails one of these 26 points with probability 1.5e-5."""
    n, g = 1 << 18, grid(name)
    x = torch.full((n,), value)
    exact = float(x[0])
    low = float(round_array(np.array(exact), g, "truncate"))
    y = stochastic(x, name).double()
    step = float((y - low).abs().max())
    p = (exact - low) / np.copysign(step, exact)
    z = (float(y.mean()) - exact) / (step * np.sqrt(p * (1 - p) / n))
    assert 0 < p < 1
    assert abs(z) < 5


def test_sums_over_rows_and_columns_vary_as_independent_draws_do():
    """Var(sum of N) = N p (1 − p) step², within 5 standard errors (failure: 1.2e-6)."""
    n, p = 1024, 0.3
    up = (stochastic(torch.full((n, n), 1 + p / 8), "e4m3") > 1).double()
    for dim in (0, 1):
        ratio = up.sum(dim).var() / (n * p * (1 - p))
        assert abs(ratio - 1) < 5 * np.sqrt(2 / (n - 1))


def chances_up(x: float, name: str) -> tuple[int, int]:
    """(draws that end above |x|, draws), over every value of the random bits that decide."""
    fmt = get_format(name)
    bits, shift = (23 - fmt.mantissa_bits, 0) if fmt.exponent_bits == 8 else (22, 10)
    words = torch.arange(1 << bits, dtype=torch.int32) << shift
    y = round_definition(torch.full((1 << bits,), x), fmt, "stochastic", True, words)
    return int((y.abs() > abs(x)).sum()), 1 << bits


@pytest.mark.parametrize(
    ("name", "x", "p"),
    [("e4m3", 1.0 + 2.0**-22, 2.0**-19), ("e4m3", -1.0703125, 0.5625), ("e2m1", 5.75, 0.875),
     ("fp16", 1.0 + 3 * 2.0**-23, 3 * 2.0**-13), ("bf16", 1.0 + 2.0**-23, 2.0**-16),
     ("bf16", -1.005859375, 0.75), ("bf16", 2.0**-149, 2.0**-16), ("e8m3", 1.0703125, 0.5625)],
)  # fmt: skip
def test_probability_is_exact_over_all_words(name, x, p):
    up, n = chances_up(x, name)
    assert up == p * n


@pytest.mark.parametrize("share", [2.0**-22, 2.0**-10 / 3, 0.3, 0.5, 0.9, 1 - 2.0**-24])
@pytest.mark.parametrize("name", ["e4m3", "e2m1"])
def test_probability_among_subnormals_is_within_the_stated_bias(name, share):
    step = get_format(name).smallest_subnormal
    x = float(np.float32(share * step))
    up, n = chances_up(x, name)
    assert abs(up / n - x / step) <= 2.0**-23


def test_keys_select_the_draw():
    x = torch.full((4096,), 1.03)
    assert torch.equal(stochastic(x, "e4m3", KEY), stochastic(x, "e4m3", KEY))
    others = [Key.of(1, "test"), Key.of(0, "test2"), KEY.fold(0), KEY.fold(1)]
    draws = {tuple(stochastic(x, "e4m3", key).tolist()) for key in [KEY, *others]}
    assert len(draws) == 5


def test_probability_of_overflow_beyond_the_largest(kernel_name):
    """e4m3: 448 has 480 (NaN) as its neighbor; at 456 a quarter leaves (5 standard errors)."""
    x = torch.full((1 << 16,), 456.0)
    share = stochastic(x, "e4m3", saturate=False).isnan().float().mean()
    assert abs(float(share) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / len(x))
    assert (stochastic(x, "e4m3", saturate=True) == 448).all()
