"""Concrete values that other libraries get wrong, each named after the fault found there."""

import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.inputs import NAN_PATTERNS, data, from_bits
from oracles.scaling import nvfp4

from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to

pytestmark = pytest.mark.usefixtures("kernel_name")
KEY = Key.of(0, "peers")


def quantized(x: list[list[float]] | np.ndarray, text: str) -> torch.Tensor:
    return apply_quantizer(torch.tensor(np.array(x, np.float32)), parse_quantizer(text), key=KEY)


def rounded(value: float, name: str, **options) -> float:
    return round_to(torch.tensor([value]), name, **options).item()


def drawn(value: float, name: str, n: int = 1 << 16) -> torch.Tensor:
    return round_to(torch.full((n,), value), name, rounding="stochastic", key=KEY)


def within(share: float, p: float, n: int) -> bool:
    """5 standard errors: failure probability 6e-7."""
    return abs(share - p) < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_torchao_bf16_sr_turns_cuda_nan_into_zero(rounding):
    x = torch.from_numpy(from_bits(*NAN_PATTERNS))
    assert round_to(x, "bf16", rounding=rounding, key=KEY).isnan().all()


def test_torchao_fpx_gives_nan_a_finite_value():
    assert np.isnan(rounded(np.nan, "e2m1"))


def test_torchao_mx_halves_blocks_of_the_smallest_scale():
    """Scale 2^-127; −1.75·2^-137 is 0.875 steps of 2^-136 there and becomes −1 step, not half."""
    x = np.full((1, 32), -1.75 * 2.0**-137)
    y = quantized(x, "e4m3@1x32:e8m0_floor")
    assert (y == -(2.0**-136)).all()


def test_torchao_mx_zeroes_the_neighbors_of_inf():
    x = np.ones((1, 32))
    x[0, 3] = np.inf
    assert quantized(x, "e4m3@1x32:e8m0_floor").isnan().all()


def test_torchao_nvfp4_clamps_subnormal_block_scales():
    """A block 2^-16 below the tensor's largest needs an E4M3 scale below 2^-6."""
    x = np.ones((1, 32), np.float32)
    x[0, 16:] *= np.float32(2.0**-16)
    y = quantized(x, "e2m1@1x16:nvfp4")
    _, inverse = scales(torch.from_numpy(x), parse_quantizer("e2m1@1x16:nvfp4"))
    assert float(inverse[0, 16] / inverse[0, 0]) < 2.0**-6 / 448
    assert_same(y, nvfp4(x, (1, 16)))
    assert 0.5 < float(y[0, 16] / 2.0**-16) < 2


def test_torchao_int8_sr_moves_representable_values():
    codes = torch.arange(-127.0, 128.0).repeat(4000)
    assert torch.equal(round_to(codes, "int8", rounding="stochastic", key=KEY), codes)


def test_int8_never_leaves_the_symmetric_range():
    x = torch.tensor([-128.0, -127.5, -1e9, -torch.inf, 127.9]).repeat(1000)
    assert round_to(x, "int8", rounding="stochastic", key=KEY).abs().max() == 127


@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1", "e2m3", "e3m2"])
def test_microxcaling_rounds_just_below_half_the_smallest_up(name):
    smallest = {"e4m3": 2.0**-9, "e5m2": 2.0**-16, "e2m1": 0.5, "e2m3": 0.125, "e3m2": 2.0**-4}
    half = np.float32(smallest[name] / 2)
    assert rounded(float(np.nextafter(half, np.float32(0))), name) == 0
    assert rounded(float(half), name) == 0
    assert rounded(float(np.nextafter(half, np.float32(1))), name) == smallest[name]


def test_microxcaling_floor_of_log2_errs_below_a_power_of_two():
    x = np.full((1, 32), from_bits(0x477FFFFF))  # 2^16 (1 − 2^-24)
    assert (quantized(x, "e4m3@1x32:e8m0_floor") == 57344).all()


def test_microxcaling_loses_the_sign_of_zero_and_lets_inf_through():
    y = round_to(torch.tensor([-0.0, torch.inf, -torch.inf]), "e4m3")
    assert_same(y, np.array([-0.0, 448.0, -448.0]))


@pytest.mark.parametrize("p", [0.015625, 0.8125])
def test_microxcaling_dithers_bf16_tensors_coarsely(p):
    """A bf16 tensor is rounded with all bits of p, which is a bf16 number here."""
    n = 1 << 17
    x = torch.full((n,), 1.5 + 0.5 * p, dtype=torch.bfloat16)
    y = round_to(x, "e2m1", rounding="stochastic", key=KEY)
    assert x[0].item() == 1.5 + 0.5 * p
    assert within((y == 2).float().mean().item(), p, n)


@pytest.mark.parametrize(
    ("bits", "name", "expected"),
    [(0x37808000, "bf16", 0x37800000), (0xC3C80000, "e4m3", 0xC3C00000),
     (0x477FE000, "fp16", 0x477FE000), (0x7FC00000, "e5m2", 0x7FC00000)],
)  # fmt: skip
def test_qtorch_ties_away_and_nan_as_numbers(bits, name, expected):
    assert_same(round_to(torch.from_numpy(from_bits(bits)), name), from_bits(expected))


def test_qtorch_uses_the_exponent_of_inf_for_numbers():
    assert rounded(114688.0, "e5m2", saturate=False) == np.inf
    assert rounded(96256.0, "fp16") == np.inf


def test_qtorch_results_depend_on_a_hidden_generator():
    torch.manual_seed(0)
    first = drawn(1.03, "e4m3")
    torch.manual_seed(1)
    assert torch.equal(drawn(1.03, "e4m3"), first)


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [(65536.0, "fp16", np.inf), (131071.0, "fp16", np.inf), (256.0, "e4m3", 256.0),
     (61440.0, "e5m2", np.inf), (61439.0, "e5m2", 57344.0), (2.5 * 2.0**-24, "fp16", 2.0**-23),
     (1.4999999 * 2.0**-24, "fp16", 2.0**-24), (-1e-30, "fp16", -0.0)],
)  # fmt: skip
def test_pychop_light_loses_the_top_binade_and_subnormal_ties(value, name, expected):
    assert_same(round_to(torch.tensor([value]), name, saturate=False), np.array([expected]))


@pytest.mark.parametrize(
    ("value", "name", "expected"),
    [(1.26e-38, "fp16", 0.0), (9.18e-41, "bf16", 2.0**-133), (274.0, "e4m3", 288.0)],
)
def test_pychop_gives_nan_or_inf_for_ordinary_values(value, name, expected):
    assert rounded(value, name) == expected


@pytest.mark.parametrize(
    ("value", "name", "neighbors"),
    [(447.0, "e4m3", {416, 448}), (300.0, "e4m3", {288, 320}), (4.5, "e2m1", {4, 6})],
)
def test_pychop_sr_gives_inf_inside_the_range(value, name, neighbors):
    assert set(drawn(value, name).tolist()) == neighbors


@pytest.mark.parametrize("name", ["e4m3", "fp16", "e2m1"])
def test_pychop_sr_stagnates_below_the_smallest(name):
    n = 1 << 16
    smallest = {"e4m3": 2.0**-9, "fp16": 2.0**-24, "e2m1": 0.5}[name]
    assert within((drawn(0.1 * smallest, name) > 0).float().mean().item(), 0.1, n)


@pytest.mark.parametrize(("bits", "name"), [(0x7F802000, "bf16"), (0x7F810000, "e5m2")])
def test_cpfloat_turns_nan_with_a_low_payload_into_inf(bits, name):
    assert round_to(torch.from_numpy(from_bits(bits)), name, saturate=False).isnan().all()


def test_cpfloat_saturates_e4m3_at_480():
    assert rounded(480.0, "e4m3") == 448


@pytest.mark.parametrize("value", [464.0001, 1e9, torch.inf])
def test_torch_casts_changed_what_e4m3_overflow_means(value):
    assert np.isnan(rounded(value, "e4m3", saturate=False))
    assert rounded(value, "e4m3", saturate=True) == 448


@pytest.mark.parametrize("text", ["e4m3", "e4m3@row:current", "int8@row:current"])
def test_qwix_shares_one_random_number_per_row(text):
    """The std of row sums of errors grows with √N (the peer: with N, 32 times more here)."""
    n = 1024
    x = torch.from_numpy(data("normal", 257, n)[:256])
    q = parse_quantizer(f"{text}:stochastic")
    error = apply_quantizer(x, q, key=KEY) - x
    ratio = error.sum(-1).square().mean().sqrt() / (n**0.5 * error.square().mean().sqrt())
    assert 0.75 < ratio < 1.25


def test_qwix_low_bit_noise_never_moves_small_updates():
    """P(up) = 1/1024: 64 of 2^16 draws are expected."""
    n = 1 << 16
    assert within((drawn(1 + 2.0**-13, "e4m3") > 1).float().mean().item(), 2.0**-10, n)


@pytest.mark.parametrize(
    "text", ["e4m3", "e4m3@1x32:e8m0_up", "e2m1@1x32:e8m0_up", "e2m1@1x16:nvfp4", "int4@row"]
)
def test_qwix_ignores_stochastic_rounding(text):
    x = np.full((1, 32), 1.2)
    x[0, ::16] = 6.0  # the scale is that of 6
    draws = quantized(np.repeat(x, 64, 0), f"{text}:stochastic")[:, 1]
    assert len(set(draws.tolist())) == 2
    assert len(set(quantized(np.repeat(x, 64, 0), text)[:, 1].tolist())) == 1
