"""GEMMs on quantized operands: which arithmetic carries them, and how the sum is accumulated.

Every product here is a bᵀ with both operands contracted along their last axis. The default carrier
multiplies the dequantized values in fp32. `carrier="exact"` picks the cheapest GEMM that computes
the same thing exactly up to the order of an fp32 sum:

* int8: both operands are integers of at most 8 bits with a current scale per tensor or row; int32
  sums. (Codes cannot say that a value under a delayed or static scale was NaN.)
* bf16: both operands have at most 8 significant bits and power-of-two (or no) scales, so that the
  values themselves are bf16 numbers, and the result is rounded to bf16 anyway.
* fp32 otherwise.

On a CPU without instructions for them (numerics.cpu) the int8 and the bf16 carrier compute the same
in fp32 GEMMs: int8 sums keep every bit, and bf16 results are those of another order of the sum.

fp32 means all 24 bits of the operands: `require_fp32` refuses a process that lets torch multiply in
TF32 or bf16 instead.
"""

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from halfulp.errors import ConfigError, FormatError
from halfulp.numerics import kernel
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.cpu import multiplies
from halfulp.numerics.cuda import accumulate, use_cuda
from halfulp.numerics.quantizer import Quantizer, parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import use_c

# Hopper's FP8 tensor cores keep 13 fraction bits and truncate (DeepSeek-V3, 2412.19437 §3.5): each
# product, where these modes cut sums of products. benchmarks/gpu_fp8.py has them side by side.
_ACCUMULATOR = parse_quantizer("e8m13:truncate")
_FAST_CHUNK = 32  # K of one FP8 tensor-core instruction
_SPLIT_CHUNK = 128  # K after which Transformer Engine's split accumulator adds in fp32
_EXACT = (1 << 24) // 128**2
CARRIERS = ("fp32", "exact")


@dataclass(frozen=True)
class Accumulation:
    """How a GEMM sums: in chunks of `chunk` along K (0: all at once, in fp32).

    The sum of a chunk has 13 fraction bits; the running sum has fp32 (`promote`) or 13 too.
    """

    chunk: int = 0
    promote: bool = True


def parse_accumulation(text: str) -> Accumulation:
    """fp32; fast (running sum with 13 fraction bits, K = 32 a step); split or promote(N)."""
    if text == "fp32":
        return Accumulation()
    if text == "fast":
        return Accumulation(_FAST_CHUNK, promote=False)
    if text == "split":
        return Accumulation(_SPLIT_CHUNK)
    if match := re.fullmatch(r"promote\(([1-9]\d*)\)", text):
        return Accumulation(int(match[1]))
    raise FormatError(f"accumulate {text!r} is unknown. Use fp32, fast, split or promote(N).")


def require_fp32(device: torch.device) -> None:
    """Raises ConfigError where torch may drop bits of the operands of fp32 GEMMs on `device`."""
    if (found := _fp32_precision(device.type)) not in ("none", "ieee"):
        raise ConfigError(
            f"simulated GEMMs need fp32 operands, and this process multiplies fp32 matrices on "
            f"{device.type} in {found}. Call torch.set_float32_matmul_precision('highest')."
        )


# Dynamo, which cannot read these settings, guards on them.
@torch.compiler.assume_constant_result
def _fp32_precision(device: str) -> str:
    backend: Any = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision


# Dynamo cannot read the processor either.
@torch.compiler.assume_constant_result
def _narrow(name: str) -> bool:
    """Whether "bf16" or "int8" GEMMs on the CPU are worth it."""
    return multiplies(name)


def multiply(a: Tensor, b: Tensor, accumulation: Accumulation = Accumulation()) -> Tensor:
    """a [..., M, K] times b [..., N, K] transposed, fp32 [..., M, N]."""
    if not accumulation.chunk or not a.shape[-1]:
        return a @ b.mT
    # Under autograd or in a traced graph, a tensor that is written twice would be wrong or slow.
    reuse = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
    total = partial = None
    for start in range(0, a.shape[-1], accumulation.chunk):
        part = slice(start, start + accumulation.chunk)
        out = partial if reuse and total is not None else None
        partial = torch.matmul(a[..., part], b[..., part].mT, out=out)
        total = _truncate(partial) if total is None else _add(total, partial, accumulation.promote)
    assert total is not None
    return total


def _truncate(x: Tensor) -> Tensor:
    return apply_quantizer(x, _ACCUMULATOR)


def _add(total: Tensor, partial: Tensor, promote: bool) -> Tensor:
    """`total` + `partial`, one of them or their sum truncated; `total` may be overwritten."""
    if use_cuda(total, partial):
        q = _ACCUMULATOR
        accumulate(total, partial, q.format, promote=promote, saturate=q.saturate)
        return total
    if not use_c(total, partial):
        return total + _truncate(partial) if promote else _truncate(total + partial)
    status = kernel.status()
    assert status.library is not None
    plan = kernel.plan(_ACCUMULATOR.format, _ACCUMULATOR.rounding, _ACCUMULATOR.saturate)
    pointers = status.parallel, total.data_ptr(), partial.data_ptr()
    status.library.halfulp_accumulate(*pointers, total.numel(), plan, promote)
    return total


def choose_carrier(
    a: Quantizer, b: Quantizer, out: Quantizer, accumulation: Accumulation, carrier: str
) -> str:
    """ "fp32", "bf16" or "int8": what a GEMM of these operands runs in.

    Raises FormatError for a carrier that is neither fp32 nor exact.
    """
    if carrier not in CARRIERS:
        raise FormatError(f"carrier {carrier!r} is unknown. Use one of {', '.join(CARRIERS)}.")
    if carrier == "fp32" or accumulation.chunk:
        return "fp32"
    if all(_fits_int8(q) for q in (a, b)):
        return "int8"
    rounds_to_bf16 = out.format.name == "bf16" and out.rounding == "nearest"
    return "bf16" if rounds_to_bf16 and all(_fits_bf16(q) for q in (a, b)) else "fp32"


def _fits_int8(q: Quantizer) -> bool:
    return (
        q.format.is_int
        and q.format.bits <= 8
        and q.granularity in ("tensor", "row")
        and q.scale == "current"
        and not q.hadamard
    )


def _fits_bf16(q: Quantizer) -> bool:
    exact_scale = q.scale in ("none", "e8m0_up", "e8m0_floor") or q.power_of_two
    return q.format.mantissa_bits <= 7 and exact_scale


def multiply_bf16(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a bᵀ + bias of operands that are bf16 numbers; summed in fp32, rounded to bf16, as fp32."""
    # A bf16 GEMM on the CPU rounds its result: too early for a bias.
    if a.is_cpu and bias is None and _narrow("bf16"):
        return (a.bfloat16() @ b.bfloat16().mT).float()
    y = a @ b.mT if a.is_cpu else _fp32_sums(a.bfloat16(), b.bfloat16().mT)
    return (y if bias is None else y + bias).bfloat16().float()


def _fp32_sums(a: Tensor, b: Tensor) -> Tensor:
    """a b of bf16 matrices on a GPU; asked for bf16, cuBLAS may round parts of a split sum too."""
    if a.ndim == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    batch = a.flatten(0, -3), b.flatten(0, -3)
    return torch.bmm(*batch, out_dtype=torch.float32).unflatten(0, a.shape[:-2])


@dataclass(frozen=True)
class Codes:
    """Integer codes [..., M, K] (int8) and what one step is worth: fp32 [] or [..., M, 1]."""

    codes: Tensor
    step: Tensor


def encode(x: Tensor, q: Quantizer, key: Key | Tensor | None) -> Codes:
    """The int8 codes of `x` [..., M, K] for an integer quantizer per tensor or row."""
    s, step = scales(x, q)
    codes = apply_quantizer(x * s, q.unscaled, key=key)
    return Codes(codes.to(torch.int8), step)


def multiply_int8(a: Codes, b: Codes) -> Tensor:
    """a bᵀ with exact int32 sums, fp32 [..., M, N]."""
    product = _int_sums(a.codes, b.codes).float()
    return product.mul_(a.step).mul_(b.step if b.step.ndim == 0 else b.step.mT)


def _int_sums(a: Tensor, b: Tensor) -> Tensor:
    """a bᵀ of int8 matrices, int32 [..., M, N]."""
    if a.ndim > 2 or (a.is_cpu and not _narrow("int8")):
        return _int_sums_in_fp32(a, b)
    (m, k), n = a.shape, b.shape[0]
    if a.is_cuda:  # its kernels take M > 16, and K and N in multiples of 8: zeros add nothing
        a = pad(a, (0, -k % 8, 0, max(0, 17 - m)))
        b = pad(b, (0, -k % 8, 0, -n % 8))
    return torch._int_mm(a, b.mT)[:m, :n]  # pyright: ignore[reportPrivateImportUsage]


def _int_sums_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """The same sums: fp32 holds every integer up to 2^24, the most that `_EXACT` products reach."""
    parts = (
        (x.float() @ y.float().mT).to(torch.int32)
        for x, y in zip(a.split(_EXACT, -1), b.split(_EXACT, -1), strict=True)
    )
    return sum(parts, torch.zeros((), dtype=torch.int32))
