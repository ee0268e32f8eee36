"""Round to nearest even and truncation, bit by bit against ml_dtypes, gfloat, torch, Fractions."""

import gfloat
import gfloat.formats
import ml_dtypes
import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.grids import double, grid, round_array, round_exact, values
from oracles.inputs import NAN_PATTERNS, adversarial, from_bits, mixture

from halfulp.numerics.format import FORMATS
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to

ML_DTYPES = {
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m4": ml_dtypes.float8_e3m4,
    "e4m3ieee": ml_dtypes.float8_e4m3,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
GFLOAT = {
    "bf16": "bfloat16", "fp16": "binary16", "e4m3": "ocp_e4m3", "e5m2": "ocp_e5m2",
    "e2m3": "ocp_e2m3", "e3m2": "ocp_e3m2", "e2m1": "ocp_e2m1",
}  # fmt: skip
SHORT = [n for n in FORMATS if FORMATS[n].bits <= 16]
GENERAL = [
    "tf32", "e8m1", "e8m3", "e8m22", "e7m1", "e7m22", "e6m9", "e5m3", "e5m2fn", "e4m4fn", "e4m2",
    "e3m1fn", "e3m3finite", "e2m1ieee", "e2m22", "int2", "int3", "int8", "int12", "int16",
]  # fmt: skip


def ml_dtypes_nearest(name: str, x: np.ndarray, saturate: bool) -> np.ndarray:
    largest = np.float32(grid(name).largest)
    clipped = x.clip(-largest, largest) if saturate else x
    with np.errstate(all="ignore"):
        y = clipped.astype(ML_DTYPES[name]).astype(np.float32)
    # Formats without a NaN code cannot say NaN; our carrier can.
    return np.where(np.isnan(x), np.float32(np.nan), y)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("name", ML_DTYPES)
def test_nearest_equals_ml_dtypes(name, saturate, kernel_name):
    x = adversarial(name)
    y = round_to(torch.from_numpy(x), name, saturate=saturate)
    assert_same(y, ml_dtypes_nearest(name, x, saturate), x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2"])
def test_nearest_equals_ml_dtypes_on_every_fp32_number(name):
    chunk = 1 << 24
    y = torch.empty(chunk)
    for start in range(0, 1 << 32, chunk):
        x = np.arange(start, start + chunk, dtype=np.uint32).view(np.float32)
        round_to(torch.from_numpy(x), name, saturate=False, out=y)
        assert_same(y, ml_dtypes_nearest(name, x, False), x)


@pytest.mark.parametrize("rounding", ["TiesToEven", "TowardZero"])
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("name", GFLOAT)
def test_nearest_and_truncate_equal_gfloat(name, saturate, rounding, kernel_name):
    info = getattr(gfloat.formats, f"format_info_{GFLOAT[name]}")
    x = adversarial(name)[::7]
    saturates = saturate or grid(name).overflow == "saturate"  # gfloat refuses what has no code
    expected = gfloat.round_ndarray(info, double(x), getattr(gfloat.RoundMode, rounding), saturates)
    ours = {"TiesToEven": "nearest", "TowardZero": "truncate"}[rounding]
    assert_same(round_to(torch.from_numpy(x), name, rounding=ours, saturate=saturate), expected, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nearest_equals_torch_casts(dtype, kernel_name):
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float8_e5m2: "e5m2"}
    x = torch.from_numpy(adversarial(names[dtype]))
    assert_same(round_to(x, names[dtype], saturate=False), x.to(dtype).float(), x)


def test_nearest_equals_torch_e4m3_cast_in_range(kernel_name):
    x = torch.from_numpy(adversarial("e4m3"))
    x = x[x.abs() <= 448]
    assert_same(round_to(x, "e4m3"), x.to(torch.float8_e4m3fn).float(), x)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", GENERAL)
def test_general_formats_equal_fractions(name, rounding, kernel_name):
    around = values(name)[:: max(1, len(values(name)) // 60)] if grid(name).m <= 9 else []
    ties = [v * (1 + share * 2.0**-9) for v in around for share in (-1, 0, 1)]
    x = np.array([*mixture(250).tolist(), *ties]).astype(np.float32)
    for saturate in (False, True):
        expected = [round_exact(v, grid(name), rounding, saturate) for v in x.tolist()]
        y = round_to(torch.from_numpy(x), name, rounding=rounding, saturate=saturate)
        assert_same(y, np.array(expected), x)


@pytest.mark.parametrize("rounding", ["nearest", "truncate"])
@pytest.mark.parametrize("name", GENERAL)
def test_general_formats_equal_float64(name, rounding, kernel_name):
    x = mixture(20_000, seed=3)
    y = round_to(torch.from_numpy(x), name, rounding=rounding)
    saturate = FORMATS[name].saturates if name in FORMATS else "int" in name or _bits(name) <= 8
    assert_same(y, round_array(x, grid(name), rounding, saturate), x)


def _bits(name: str) -> int:
    exponent, mantissa = (
        name.removesuffix("ieee").removesuffix("fn").removesuffix("finite")[1:].split("m")
    )
    return 1 + int(exponent) + int(mantissa)


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("name", [*SHORT, "e4m3ieee", "e5m3", "e4m4fn", "e3m3finite", "int12"])
def test_every_code_is_a_fixed_point(name, rounding, kernel_name):
    x = values(name).astype(np.float32)
    x = np.concatenate([x, -x])
    for saturate in (False, True):
        y = round_to(torch.from_numpy(x), name, rounding=rounding, key=Key(1, 2), saturate=saturate)
        assert_same(y, x, x)


@pytest.mark.parametrize("rounding", ["nearest", "truncate", "stochastic"])
@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("name", [*SHORT, "tf32"])
def test_nan_inf_and_signed_zero(name, saturate, rounding, kernel_name):
    x = torch.from_numpy(np.concatenate([from_bits(*NAN_PATTERNS), from_bits(*NAN_PATTERNS)]))
    x[len(NAN_PATTERNS) :].neg_()
    y = round_to(x, name, rounding=rounding, key=Key(3, 4), saturate=saturate)
    assert y.isnan().all()
    infinite = torch.tensor([np.inf, -np.inf, 0.0, -0.0])
    y = round_to(infinite, name, rounding=rounding, key=Key(3, 4), saturate=saturate)
    beyond = grid(name).largest if saturate else grid(name).beyond
    assert_same(y, np.array([beyond, -beyond, 0.0, -0.0]))


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3", "e5m2", "e4m3ieee"])
def test_truncation_of_finite_values_never_overflows(name, kernel_name):
    x = torch.tensor([1.0, -1.0]) * torch.finfo(torch.float32).max
    largest = grid(name).largest
    y = round_to(x, name, rounding="truncate", saturate=False)
    assert y.tolist() == [largest, -largest]


def test_fp32_is_the_identity(kernel_name):
    x = torch.from_numpy(mixture(5000))
    assert_same(round_to(x, "fp32"), x)
