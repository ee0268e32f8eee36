"""The FP8 GEMM of the hardware (torch._scaled_mm) beside halfulp's simulation of it."""

from dataclasses import dataclass

import torch
from common import section, table
from gpu_bench import Bench, Run
from torch import Tensor

from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.gemm import multiply, multiply_bf16, parse_accumulation
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.rounding import round_to

MODES = ("fast", "split", "fp32")
_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_BLOCK = 64  # rows and columns of the result that the slow model of the accumulator computes


@dataclass(frozen=True)
class Operand:
    """FP8 codes [rows, K], and what one step is worth: fp32 [] or [rows, 1]."""

    codes: Tensor
    step: Tensor

    @property
    def values(self) -> Tensor:
        return self.codes.float() * self.step


@dataclass(frozen=True)
class Case:
    """One kind of FP8 GEMM: the quantizers of both operands, and how the hardware sums."""

    a: str
    b: str
    fast: bool

    def __str__(self) -> str:
        return f"{self.a} × {self.b}, {'fast' if self.fast else 'precise'}"


TENSOR, ROW, GRADIENT = "e4m3@tensor:current", "e4m3@row:current", "e5m2@tensor:current"
CASES = [
    Case(a, b, f)
    for a, b in ((TENSOR, TENSOR), (GRADIENT, TENSOR), (ROW, ROW))
    for f in (True, False)
]


def encode(x: Tensor, text: str) -> Operand:
    q = parse_quantizer(text)
    s, step = scales(x, q)
    return Operand(round_to(x * s, q.format).to(_DTYPES[q.format.name]), step)


def real(a: Operand, b: Operand, out: torch.dtype, *, fast: bool) -> Tensor:
    """a bᵀ by the hardware."""
    step = b.step.mT.contiguous() if b.step.ndim else b.step
    return torch._scaled_mm(
        a.codes, b.codes.mT, scale_a=a.step, scale_b=step, out_dtype=out, use_fast_accum=fast
    )


def operands(
    b: Bench, case: Case, size: int, k: int, positive: bool = False
) -> tuple[Operand, Operand]:
    """Normal values; `positive`: their magnitudes, whose products do not cancel."""
    generator = torch.Generator(b.device).manual_seed(k)
    x, w = (torch.randn(size, k, generator=generator, device=b.device) for _ in "xw")
    x, w = (x.abs(), w.abs()) if positive else (x, w)
    return encode(x, case.a), encode(0.02 * w, case.b)


def agreement(b: Bench) -> None:
    """Errors against fp64 and equal results, by K, and what the accumulator keeps."""
    size = _BLOCK if b.dry else 2048
    lengths = (256, 512) if b.dry else (256, 4096) if b.quick else (256, 1024, 4096, 16384)
    lines = []
    for case in CASES:
        for k in lengths:
            try:
                lines.append([str(case), str(k), *_compared(b, case, size, k)])
            except (RuntimeError, ValueError) as error:
                lines.append([str(case), str(k), str(error).splitlines()[0], *[""] * 7])
    head = ["real FP8 GEMM", "K", "error", *(f"{m}, error" for m in MODES)]
    head += [*(f"{m}, equal" for m in MODES), "best, ≤ 1 ulp"]
    text = (
        f"{size} × {size} results. Error: relative to the fp64 product of the same operands, in "
        "fp32 where the hardware gives fp32 (per tensor), else in bf16. Equal: share of bf16 "
        "results with the same bits as the simulation that sums so.\n\n"
    )
    section("Real and simulated FP8 GEMM: agreement", text + table(head, lines))
    _accumulator(b, lengths)


def _compared(b: Bench, case: Case, size: int, k: int) -> list[str]:
    a, w = operands(b, case, size, k)
    exact = a.values.double() @ w.values.double().mT
    out = torch.bfloat16 if a.step.ndim else torch.float32
    sums = {m: multiply(a.values, w.values, parse_accumulation(m)) for m in MODES}
    errors = [_error(t.to(out), exact) for t in (real(a, w, out, fast=case.fast), *sums.values())]
    found = real(a, w, torch.bfloat16, fast=case.fast)
    apart = {m: _ulps(found, t.bfloat16()) for m, t in sums.items()}
    equal = {m: _share(d == 0) for m, d in apart.items()}
    best = max(equal, key=lambda m: equal[m])
    shares = [*equal.values(), _share(apart[best] <= 1)]
    return [*(f"{e:.1e}" for e in errors), *(f"{s:.2%}" for s in shares)]


def _error(x: Tensor, exact: Tensor) -> float:
    return ((x.double() - exact).norm() / exact.norm()).item()


def _share(x: Tensor) -> float:
    return x.double().mean().item()


def _ulps(x: Tensor, y: Tensor) -> Tensor:
    """Steps between two bf16 tensors, counted over zero."""
    ordered = []
    for t in (x, y):
        bits = t.contiguous().view(torch.int16).int()
        ordered.append(torch.where(bits < 0, -(bits & 0x7FFF), bits))
    return (ordered[0] - ordered[1]).abs()


def _accumulator(b: Bench, lengths: tuple[int, ...]) -> None:
    """Unscaled codes, so that the fp32 results show the accumulator itself."""
    size = _BLOCK if b.dry else 2048
    kinds = [(case, False) for case in CASES[:4]] + [(case, True) for case in CASES[:2]]
    lines = []
    for case, positive in kinds:
        for k in lengths:
            pair = (_unscaled(t) for t in operands(b, case, size, k, positive))
            name = f"{case}, {'positive' if positive else 'normal'}"
            lines.append([name, str(k), *_told(*pair, fast=case.fast)])
    head = ["real FP8 GEMM, unscaled", "K", "fraction bits", "aligned, equal", "halfulp, equal"]
    text = (
        "Fraction bits: those in use in 99.9 % of the fp32 results. Equal: share of fp32 results "
        f"with all bits the same, in a corner of {_BLOCK} × {_BLOCK}. Aligned: 32 products and the "
        "running sum are cut to 13 fraction bits of the largest exponent among them; precise sums "
        "go to fp32 every 128 terms. halfulp: its fast and split, which cut the sum of 32 or 128 "
        "exact products. Errors against fp64; positive operands do not cancel.\n\n"
    )
    head += ["error", "halfulp, error"]
    section("What the FP8 accumulator keeps", text + table(head, lines))


def _told(a: Operand, b: Operand, *, fast: bool) -> list[str]:
    found = real(a, b, torch.float32, fast=fast)
    corner, bits = found[:_BLOCK, :_BLOCK], _fraction_bits(found)
    left, right = a.codes[:_BLOCK].double(), b.codes[:_BLOCK].double()
    model = aligned(left, right, promote=0 if fast else 128)
    mode = parse_accumulation("fast" if fast else "split")
    ours, exact = multiply(left.float(), right.float(), mode), left @ right.mT
    shares = [_share(t == corner) for t in (model, ours)]
    errors = [_error(t, exact) for t in (corner, ours)]
    return [bits, *(f"{s:.2%}" for s in shares), *(f"{e:.1e}" for e in errors)]


def _unscaled(x: Operand) -> Operand:
    return Operand(x.codes, torch.ones_like(x.step))


def _fraction_bits(x: Tensor) -> str:
    bits = x.contiguous().view(torch.int32)
    lowest = bits & -bits  # the last one-bit of the pattern
    used = 23 - lowest.clamp(min=1).double().log2().clamp(max=23)
    return f"{used.flatten().kthvalue(max(1, int(used.numel() * 0.999)))[0].item():.0f}"


def aligned(a: Tensor, b: Tensor, *, width: int = 32, bits: int = 13, promote: int = 0) -> Tensor:
    """a bᵀ (fp64 [M, K], [N, K]) as a tensor core with a short, aligned accumulator sums it.

    Each step takes `width` products and the running sum, cuts them toward zero to multiples of
    2^(e − bits), e the largest exponent among them, and keeps `bits` fraction bits of their sum.
    `promote`: after so many terms the sum goes to an fp32 total and starts anew; 0 = never.
    """
    total = torch.zeros(len(a), len(b), device=a.device)
    sums = torch.zeros_like(total, dtype=torch.float64)
    exponents = [torch.frexp(t)[1] for t in (a, b)]
    for start in range(0, a.shape[1], width):
        part = slice(start, start + width)
        products = a[:, None, part] * b[None, :, part]
        e = exponents[0][:, None, part] + exponents[1][None, :, part] - 1
        e = torch.where(products == 0, -1000, e).amax(-1)
        e = torch.maximum(e, torch.where(sums == 0, -1000, torch.frexp(sums)[1]))
        unit = torch.exp2((e - 1 - bits).double())
        cut = torch.trunc(products / unit[..., None]).sum(-1) + torch.trunc(sums / unit)
        sums = _cut(cut * unit, bits)
        if promote and (start + width) % promote == 0:
            total, sums = total + sums.float(), torch.zeros_like(sums)
    return total + sums.float()


def _cut(x: Tensor, bits: int) -> Tensor:
    mantissa, exponent = torch.frexp(x)
    return (mantissa * 2.0 ** (bits + 1)).trunc() * torch.exp2((exponent - bits - 1).double())


def gemm_speed(b: Bench) -> None:
    """TFLOP/s of square GEMMs, quantizing included where simulated."""
    sizes = (64,) if b.dry else (4096,) if b.quick else (4096, 8192)
    columns = [_speeds(b, size) for size in sizes]
    lines = [[name, *(c.get(name, "") for c in columns)] for name in columns[0]]
    section("GEMM speed", table(["GEMM, M = N = K", *(f"{s}: TFLOP/s" for s in sizes)], lines))


def _speeds(b: Bench, size: int) -> dict[str, str]:
    x, w = (torch.randn(size, size, generator=torch.manual_seed(i)).to(b.device) for i in (0, 1))
    halves = x.bfloat16(), w.bfloat16().mT
    runs: dict[str, Run] = {"fp32": lambda: x @ w.mT, "bf16": lambda: halves[0] @ halves[1]}
    runs["tf32"] = lambda: _in_tf32(x, w)
    failed = {}
    for case in CASES:
        pair = encode(x, case.a), encode(w, case.b)
        run = lambda p=pair, c=case: real(*p, torch.bfloat16, fast=c.fast)  # noqa: E731
        try:
            run()
            runs[f"FP8 {case}"] = run
        except (RuntimeError, ValueError) as error:
            failed[f"FP8 {case}"] = str(error).splitlines()[0]
    q, p2 = parse_quantizer(TENSOR), parse_quantizer(f"{TENSOR}:p2")
    quantized = [apply_quantizer(t, q) for t in (x, w)]
    for mode in MODES:
        sums = parse_accumulation(mode)
        runs[f"simulated FP8, {mode} sums"] = lambda s=sums: multiply(*quantized, s)
    runs["quantizing both operands, eager"] = lambda: [apply_quantizer(t, q) for t in (x, w)]
    exact = [apply_quantizer(t, p2) for t in (x, w)]
    runs["simulated FP8, exact carrier (bf16)"] = lambda: multiply_bf16(*exact)
    times = b.times(runs, calls=1 if b.dry else 3)
    return {n: f"{2 * size**3 / t.best / 1e12:.1f}" for n, t in times.items()} | failed


def _in_tf32(x: Tensor, w: Tensor) -> Tensor:
    torch.set_float32_matmul_precision("high")
    try:
        return x @ w.mT
    finally:
        torch.set_float32_matmul_precision("highest")
