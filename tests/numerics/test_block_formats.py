"""MX, NVFP4 and the Hadamard transform, bit by bit against their published formulas."""

import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.grids import grid, round_array, values
from oracles.hashing import key_of, words_at
from oracles.inputs import DATA_KINDS, data
from oracles.scaling import nvfp4, quantize

from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.hadamard import hadamard, hadamard_matrix
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key

ELEMENTS = ["e4m3", "e5m2", "e2m3", "e3m2", "e2m1"]
KEY = Key.of(0, "x")


def words_of(x: np.ndarray) -> np.ndarray:
    return words_at(key_of(0, "x"), 0, x.size).reshape(x.shape)


@pytest.mark.parametrize("kind", DATA_KINDS)
@pytest.mark.parametrize("name", ELEMENTS)
@pytest.mark.parametrize("rule", ["e8m0_up", "e8m0_floor"])
def test_mx_equals_the_oracle(rule, name, kind, kernel_name):
    """100 columns: the last block of a row has 4 elements."""
    x = data(kind, 60, 100)
    q = parse_quantizer(f"{name}@1x32:{rule}")
    assert_same(apply_quantizer(torch.from_numpy(x), q), quantize(x, name, rule, (1, 32)), x)


@pytest.mark.parametrize("rounding", ["stochastic", "truncate"])
@pytest.mark.parametrize("name", ELEMENTS)
def test_mx_roundings_equal_the_oracle(name, rounding, kernel_name):
    x = data("normal", 30, 96)
    q = parse_quantizer(f"{name}@1x32:e8m0_up:{rounding}")
    expected = quantize(x, name, "e8m0_up", (1, 32), rounding=rounding, words=words_of(x))
    assert_same(apply_quantizer(torch.from_numpy(x), q, key=KEY), expected, x)


@pytest.mark.parametrize("kind", DATA_KINDS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("block", ["1x16", "16x16"])
def test_nvfp4_equals_the_reference_formula(block, rounding, kind, kernel_name):
    """40 x 104: partial tiles on both sides."""
    x = data(kind, 40, 104)
    tile = tuple(map(int, block.split("x")))
    q = parse_quantizer(f"e2m1@{block}:nvfp4:{rounding}")
    if kind == "nan_inf":  # C and torch differ in zero blocks: test_invariance.py
        x = x[:-1]
    y = apply_quantizer(torch.from_numpy(x), q, key=KEY)
    assert_same(y, nvfp4(x, tile, rounding, words_of(x)), x)


@pytest.mark.parametrize("amax", [3.7, 1.0, 0.0123, 77.7])
def test_nvfp4_keeps_the_order_of_operations(amax, kernel_name):
    """Block maxima within 3 ulp of a tie between two E4M3 scales, where any other order shows."""
    codes = values("e4m3")[1:-1]
    ties = (codes + np.diff(values("e4m3"))[1:] / 2) * 6 * (amax / 2688)
    near = ties.astype(np.float32).view(np.int32)[:, None] + np.arange(-3, 4)
    blocks = near.astype(np.int32).view(np.float32).reshape(-1, 1)
    x = np.repeat(np.append(blocks, np.float32([[amax]]), 0), 16, 1)
    x[:, 1:] *= np.linspace(-1, 1, 15, dtype=np.float32)
    y = apply_quantizer(torch.from_numpy(x), parse_quantizer("e2m1@1x16:nvfp4"))
    assert_same(y, nvfp4(x, (1, 16)), x)


def test_nvfp4_scales_are_e4m3_times_one_tensor_scale():
    x = torch.from_numpy(data("normal", 33, 128)[:32])
    x *= torch.logspace(0, -14, 32, base=2.0)[:, None]
    s, inverse = scales(x, parse_quantizer("e2m1@1x16:nvfp4"))
    codes = (inverse.double() * (2688 / x.abs().amax().double())).numpy()
    error = np.abs(codes / round_array(codes, grid("e4m3")) - 1)
    assert error.max() < 2.0**-22
    assert codes.max() == pytest.approx(448, rel=1e-6)
    assert (codes < 2.0**-6).any()  # subnormal E4M3 scales are in use
    assert (s * inverse).sub(1).abs().max() < 2.0**-22


def test_square_tiles_serve_the_transpose_and_blocks_do_not(kernel_name):
    w = torch.from_numpy(data("normal", 64, 96))
    for text, same in (
        ("e2m1@16x16:nvfp4", True),
        ("e4m3@32x32:e8m0_up", True),
        ("e4m3@tensor", True),
        ("e2m1@1x16:nvfp4", False),
        ("e2m1@1x32:e8m0_up", False),
        ("e4m3@row", False),
    ):
        q = parse_quantizer(text)
        assert q.one_copy is same
        transposed = apply_quantizer(w.t().contiguous(), q)
        assert torch.equal(apply_quantizer(w, q).t(), transposed) is same


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [
        ("e4m3@1x32:e8m0_up", 0.02, 0.03),
        ("e5m2@1x32:e8m0_up", 0.04, 0.06),
        ("e2m1@1x32:e8m0_up", 0.10, 0.15),
        ("e2m1@1x16:nvfp4", 0.08, 0.11),
        ("e2m1@16x16:nvfp4", 0.09, 0.13),
        ("int8@row", 0.005, 0.012),
    ],
)
def test_error_is_that_of_the_format(text, low, high):
    x = torch.randn(128, 256, generator=torch.manual_seed(0))
    error = float((apply_quantizer(x, parse_quantizer(text)) - x).norm() / x.norm())
    assert low < error < high


@pytest.mark.parametrize("d", [2, 4, 8, 16, 32, 64, 128])
def test_hadamard_is_orthonormal_with_random_signs(d):
    h = hadamard_matrix(d).double()
    assert (h @ h.T - torch.eye(d)).abs().max() < 1e-6
    assert (h.abs() - d**-0.5).abs().max() < 1e-7
    column = h[:, 0] > 0  # of the plain matrix this column is constant: these are the signs
    assert d < 8 or 0.2 < column.double().mean() < 0.8


@pytest.mark.parametrize("d", [16, 32, 128])
def test_hadamard_pair_cancels_in_the_product(d):
    generator = torch.manual_seed(0)
    a, b = torch.randn(3, 20, 256, generator=generator), torch.randn(30, 256, generator=generator)
    exact = a.double() @ b.double().T
    product = hadamard(a, d) @ hadamard(b, d).T
    assert (product - exact).norm() / exact.norm() < 1e-5
    wrong = hadamard(a, d) @ b.T  # two-sided: one transform alone does not cancel
    assert (wrong - exact).norm() / exact.norm() > 0.5


def test_hadamard_spreads_an_outlier():
    x = torch.zeros(1, 16)
    x[0, 3] = 16.0
    assert torch.equal(hadamard(x, 16).abs(), torch.full((1, 16), 4.0))


def test_quantizing_with_hadamard_stays_in_the_transformed_domain(kernel_name):
    x = torch.from_numpy(data("lognormal", 16, 64))
    y = apply_quantizer(x, parse_quantizer("e2m1@1x16:nvfp4:hadamard(16)"))
    transformed = hadamard(x, 16)
    assert_same(y, apply_quantizer(transformed, parse_quantizer("e2m1@1x16:nvfp4")))
