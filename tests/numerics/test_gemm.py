"""Accumulation modes and carriers against slow sums."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.grids import F32, Grid, round_exact

from halfulp.errors import ConfigError, FormatError
from halfulp.numerics import gemm
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.gemm import (
    Accumulation,
    choose_carrier,
    encode,
    multiply,
    multiply_bf16,
    multiply_int8,
    parse_accumulation,
    require_fp32,
)
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key

THIRTEEN = Grid(13, -126, float((2 - Fraction(1, 2**13)) * 2**127), "inf")
PLAIN = Accumulation()


def operands(kind: str, m: int = 5, n: int = 4, k: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Integer data has exact fp32 chunk sums, so that the order inside a chunk cannot matter."""
    generator = torch.manual_seed(0)
    if kind == "integers":
        return tuple(torch.randint(-63, 64, (r, k), generator=generator).float() for r in (m, n))
    return tuple(torch.randn(r, k, generator=generator) for r in (m, n))


def dot(a: list[float], b: list[float], chunk: int, promote: bool) -> float:
    """Σ a b: chunks keep 13 fraction bits, and so does the running sum unless promoted to fp32."""
    total = None
    for start in range(0, len(a), chunk):
        terms = zip(a[start : start + chunk], b[start : start + chunk], strict=True)
        partial = float(sum(Fraction(x) * Fraction(y) for x, y in terms))
        if promote or total is None:
            partial = round_exact(partial, THIRTEEN, "truncate")
        if total is None:
            total = partial
        elif promote:
            total = float(F32(total + partial))
        else:
            total = round_exact(float(F32(total + partial)), THIRTEEN, "truncate")
    assert total is not None
    return total


MODES = {
    "fast": (32, False),
    "split": (128, True),
    "promote(64)": (64, True),
    "promote(1)": (1, True),
}


@pytest.mark.parametrize("text", MODES)
def test_accumulation_equals_the_slow_sum(text, kernel_name):
    a, b = operands("integers")
    expected = [[dot(x, y, *MODES[text]) for y in b.tolist()] for x in a.tolist()]
    assert_same(multiply(a, b, parse_accumulation(text)), np.array(expected))


@pytest.mark.parametrize(
    ("text", "low", "high"),
    [("fp32", 0, 1e-6), ("split", 1e-5, 1e-4), ("promote(32)", 1e-5, 1e-4), ("fast", 1e-4, 3e-3)],
)
def test_error_is_that_of_the_accumulator(text, low, high):
    """K = 4096: about 2^-14 of a chunk for promoted sums, growing with K for fast ones."""
    a, b = operands("normal", 16, 16, 4096)
    a, b = a.abs(), b.abs()
    exact = a.double() @ b.double().T
    error = float((multiply(a, b, parse_accumulation(text)) - exact).norm() / exact.norm())
    assert low < error < high


def test_accumulation_of_batches_and_short_k(kernel_name):
    a, b = operands("integers", 6, 4, 20)
    plain = multiply(a, b)
    assert torch.equal(plain, a @ b.T)
    batched = multiply(a.view(2, 3, 20), b.view(2, 2, 20), Accumulation(7))
    assert batched.shape == (2, 3, 2)
    assert_same(batched[1], multiply(a[3:], b[2:], Accumulation(7)))


@pytest.mark.parametrize("text", ["fp16", "promote", "promote(0)", "split(128)", ""])
def test_unknown_accumulation(text):
    with pytest.raises(FormatError, match=r"is unknown\. Use fp32, fast, split or promote"):
        parse_accumulation(text)


@pytest.mark.parametrize(
    ("a", "b", "out", "accumulate", "expected"),
    [
        ("int8@row", "int8@tensor", "fp32", "fp32", "int8"),
        ("int4@row", "int8@row", "bf16", "fp32", "int8"),
        ("int8@row", "int8@1x32", "fp32", "fp32", "fp32"),
        ("int8@row:hadamard(16)", "int8@row:hadamard(16)", "fp32", "fp32", "fp32"),
        ("int12@row", "int8@row", "fp32", "fp32", "fp32"),
        ("int8@tensor:delayed(4)", "int8@row", "fp32", "fp32", "fp32"),
        ("int8@row", "int8@tensor:static(20)", "fp32", "fp32", "fp32"),
        ("e4m3", "e4m3", "bf16", "fp32", "bf16"),
        ("bf16", "e5m2@1x32:e8m0_up", "bf16", "fp32", "bf16"),
        ("e4m3@tensor:p2", "e4m3@row:p2", "bf16", "fp32", "bf16"),
        ("e4m3@tensor", "e4m3@tensor", "bf16", "fp32", "fp32"),
        ("e2m1@1x16:nvfp4", "e2m1@1x16:nvfp4", "bf16", "fp32", "fp32"),
        ("bf16", "bf16", "fp32", "fp32", "fp32"),
        ("bf16", "bf16", "bf16:stochastic", "fp32", "fp32"),
        ("fp16", "fp16", "bf16", "fp32", "fp32"),
        ("e4m3", "e4m3", "bf16", "split", "fp32"),
        ("int8@row", "int8@row", "fp32", "promote(64)", "fp32"),
    ],
)
def test_carrier(a, b, out, accumulate, expected):
    quantizers = [parse_quantizer(t) for t in (a, b, out)]
    accumulation = parse_accumulation(accumulate)
    assert choose_carrier(*quantizers, accumulation, "exact") == expected
    assert choose_carrier(*quantizers, accumulation, "fp32") == "fp32"


def test_unknown_carrier():
    q = parse_quantizer("bf16")
    with pytest.raises(FormatError, match=r"'int8' is unknown\. Use one of fp32, exact"):
        choose_carrier(q, q, q, PLAIN, "int8")


@pytest.mark.parametrize("granularity", ["tensor", "row"])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_codes_are_the_quantized_values(name, granularity, kernel_name):
    x, _ = operands("normal", 32, 1, 64)
    for words, key in (("", None), (":stochastic", Key(1, 2))):
        q = parse_quantizer(f"{name}@{granularity}{words}")
        codes = encode(x, q, key)
        assert codes.codes.dtype is torch.int8
        assert codes.codes.abs().max() == q.format.largest
        # An integer has no -0.
        assert_same(codes.codes.float() * codes.step, apply_quantizer(x, q, key=key) + 0.0)
        assert_same(codes.step, scales(x, q)[1])


@pytest.fixture(params=[True, False], ids=["narrow", "fp32"])
def gemms(request, monkeypatch):
    """A processor with instructions for narrow GEMMs, and one without."""
    monkeypatch.setattr(gemm, "multiplies", lambda name: request.param)


@pytest.mark.parametrize("a_text", ["int8@row", "int8@tensor", "int4@row"])
@pytest.mark.parametrize("b_text", ["int8@row", "int8@tensor"])
def test_int8_carrier_is_the_exact_integer_product(a_text, b_text, kernel_name, gemms):
    a, b = operands("normal", 32, 24, 512)
    x, w = encode(a, parse_quantizer(a_text), None), encode(b, parse_quantizer(b_text), None)
    integers = x.codes.numpy().astype(np.int64) @ w.codes.numpy().astype(np.int64).T
    expected = integers.astype(F32) * x.step.numpy() * w.step.numpy().T
    product = multiply_int8(x, w)
    assert_same(product, expected)
    fp32 = multiply(*(c.codes.float() * c.step for c in (x, w)))
    assert (product - fp32).norm() / fp32.norm() < 1e-6
    exact = a.double() @ b.double().T  # two-sided: something was quantized
    assert (product - exact).norm() / exact.norm() > 1e-3


@pytest.mark.parametrize("k", [1, 1024, 1025, 3000])
def test_int8_sums_have_the_same_bits_everywhere(k, gemms):
    generator = torch.manual_seed(0)
    a, b = (torch.randint(-128, 128, (m, k), generator=generator).to(torch.int8) for m in (32, 24))
    a[0] = b[0] = -128  # the largest sum
    sums = gemm._int_sums(a, b)
    assert sums.dtype is torch.int32
    assert torch.equal(sums, (a.long() @ b.long().T).int())


def test_int8_carrier_at_the_largest_sum(gemms):
    """4096 products of 127² exceed 2^24 and stay exact until the one rounding to fp32."""
    codes = encode(torch.full((32, 4096), 3.0), parse_quantizer("int8@tensor"), None)
    expected = F32(4096 * 127 * 127) * codes.step.numpy() * codes.step.numpy()
    assert_same(multiply_int8(codes, codes), np.full((32, 32), expected))


def test_bf16_carrier_is_exact_for_exact_sums(gemms):
    a, b = operands("integers", 8, 8, 64)
    exact = a.double() @ b.double().T
    assert_same(multiply_bf16(a, b), exact.float().bfloat16())


def test_bf16_carrier_rounds_the_fp32_product(gemms):
    """Equal up to the order of the fp32 sum: at most one bf16 step, and rarely that."""
    q = parse_quantizer("e4m3@1x32:e8m0_up")
    a, b = (apply_quantizer(t, q) for t in operands("normal", 64, 64, 512))
    product, fp32 = multiply_bf16(a, b), multiply(a, b)
    rounded = fp32.bfloat16().float()
    assert torch.equal(product, product.bfloat16().float())
    assert (product != rounded).float().mean() < 0.01
    assert ((product - fp32).abs() <= fp32.abs() * 2.0**-8 * 1.01 + 1e-6).all()


def test_reduced_fp32_gemms_are_refused():
    device = torch.device("cpu")
    require_fp32(device)
    for precision, found in (("high", "tf32"), ("medium", "bf16")):
        torch.set_float32_matmul_precision(precision)
        try:
            with pytest.raises(ConfigError, match=f"on cpu in {found}"):
                require_fp32(device)
        finally:
            torch.set_float32_matmul_precision("highest")
    require_fp32(device)


def test_int8_carrier_of_batches(kernel_name, gemms):
    """Products inside attention have leading dimensions."""
    q = parse_quantizer("int8@row")
    a, b = (torch.randn(2, 3, m, 2500, generator=torch.manual_seed(m)) for m in (5, 7))
    product = multiply_int8(encode(a, q, None), encode(b, q, None))
    for i, j in ((0, 0), (1, 2)):
        one = multiply_int8(encode(a[i, j], q, None), encode(b[i, j], q, None))
        assert_same(product[i, j], one)


def test_a_bias_joins_the_sum_before_it_is_rounded_to_bf16(gemms):
    a, b = operands("integers", 8, 8, 64)
    bias = torch.full((8,), 60.0)
    exact = a.double() @ b.double().T + 60
    assert_same(multiply_bf16(a, b, bias), exact.float().bfloat16())
    twice = (multiply_bf16(a, b) + bias).bfloat16().float()
    assert not torch.equal(multiply_bf16(a, b, bias), twice)
