"""Kernel conformance: true claims pass, false ones fail, and the accumulator is named."""

import math

import pytest
import torch

from halfulp.check import bounds
from halfulp.check.arithmetic import exact
from halfulp.check.kernels import ADDERS, FAIL, PASS, UNKNOWN, check_function, check_gemm
from halfulp.check.kernels import check_kernels as check_all
from halfulp.errors import FormatError


def rounded_sum(dtype):
    """A GEMM that keeps its running sum in `dtype`, by torch's own casts."""

    def gemm(a, b):
        total = torch.zeros(a.shape[0], b.shape[1])
        for k in range(a.shape[1]):
            total = (total + a[:, k : k + 1].float() * b[k : k + 1].float()).to(dtype).float()
        return total.to(a.dtype)

    return gemm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fp32_accumulator_passes(dtype):
    report = check_gemm("sum", rounded_sum(torch.float32), dtype=dtype, outputs=4000)
    assert (report.verdict, report.violations, report.hidden) == (PASS, 0, 0)
    assert report.explained_by == "fp32"
    assert report.worst > 1e-3


@pytest.mark.parametrize(("short", "share"), [("bf16", 0.7), ("fp16", 0.2)])
def test_short_accumulator_is_caught_and_named(short, share):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[short]
    report = check_gemm("sum", rounded_sum(dtype), outputs=4000)
    assert report.verdict == FAIL
    assert share < report.violations < 1
    assert report.explained_by == short
    assert f"{report.violations:.1%}" in str(report)
    assert check_gemm("sum", rounded_sum(dtype), claimed=short, outputs=400).verdict == PASS


def test_accumulator_that_random_operands_hide_is_found_by_cancelling_ones():
    def fourteen_bits(a, b):
        from halfulp.numerics.rounding import round_to

        total = torch.zeros(a.shape[0], b.shape[1])
        for k in range(a.shape[1]):
            product = a[:, k : k + 1].float() * b[k : k + 1].float()
            total = round_to(total + product, "e8m13")
        return total.bfloat16()

    report = check_gemm("hopper", fourteen_bits, dtype=torch.float8_e4m3fn)
    assert report.violations < 1e-3 < report.hidden
    assert (report.verdict, report.explained_by) == (FAIL, "14 bits")


def test_operands_of_fewer_bits_are_found():
    def gemm(a, b):
        return a.bfloat16().float() @ b.bfloat16().float()

    report = check_gemm("medium", gemm, dtype=torch.float32)
    assert (report.verdict, report.explained_by) == (FAIL, "bf16 operands")


def test_nan_and_wrong_shapes():
    report = check_gemm("nan", lambda a, b: (a @ b) * math.nan, outputs=64, n=32)
    assert (report.verdict, report.violations) == (FAIL, 1)
    with pytest.raises(FormatError, match=r"asked for a \[M, n\] @ b \[n, N\]"):
        check_gemm("t", lambda a, b: a, outputs=64, n=32)
    with pytest.raises(FormatError, match="accumulator 'fp64' is unknown"):
        check_gemm("t", torch.matmul, claimed="fp64")


def test_better_than_claimed_passes_and_unproven_error_is_doubted():
    assert check_gemm("m", torch.matmul, claimed="bf16", outputs=400).verdict == PASS

    def noisy(a, b):  # far worse than fp32 sums, and still within their bound
        return a @ b + 2e-3 * torch.ones(a.shape[0], b.shape[1])

    report = check_gemm("noisy", noisy, dtype=torch.float32, n=4096, outputs=256)
    assert report.verdict == UNKNOWN
    assert report.violations == report.hidden == 0


def test_kernels_of_this_machine():
    reports = list(check_all())
    assert len(reports) == 3 * 8
    for report in reports:
        assert report.verdict == PASS, str(report)
    matmul = reports[0]
    assert matmul.kernel == "torch.matmul bfloat16"
    assert 0.3 < matmul.worst <= 1
    assert set(matmul.ratios) == {name for name in ADDERS if "operands" not in name}


def test_norm_that_computes_in_bf16_fails():
    def run(x):
        return x * (x * x).mean(-1, keepdim=True).add(1e-5).rsqrt()

    def bound(x, a, out):
        return bounds.rms_norm(x, exact(torch.ones(128)), 1e-5, a, out=out)

    assert check_function("norm", lambda x: run(x.float()).bfloat16(), bound).verdict == PASS
    report = check_function("norm", run, bound)
    assert (report.verdict, report.explained_by) == (FAIL, "bf16 inside")
    assert report.violations > 0.1
