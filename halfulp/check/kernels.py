"""Kernel conformance: does this machine's GEMM, norm or softmax compute as it claims?

A rigorous bound (halfulp.check.bounds) of what the claimed arithmetic can do is compared with what
the kernel did: one output beyond it refutes the claim. What the kernel seems to do instead is found
by simulating candidate accumulators on operands whose products cancel, where nothing but the
accumulator makes an error.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from halfulp.check import bounds
from halfulp.check.arithmetic import Accumulator, Arithmetic, Bounded, exact
from halfulp.errors import FormatError
from halfulp.numerics.rounding import round_to

PASS, FAIL, UNKNOWN = "pass", "fail", "could not tell"
TOLERANCE = 1 + 1e-9
ULPS = 4.0  # error of exp and tanh in a vector library, in units of u
FLASH_ULPS = 64.0  # that of the exp in torch's fused CPU attention (20 ulp), with room
_EPS = 1e-5
_NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
}

Gemm = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Adder:
    """A way to add up products: sums of `block` terms in `inside`, these sums in `between`.

    block = 0: no blocks. `operands`: what the operands are rounded to before, "" for nothing.
    """

    name: str
    inside: str
    block: int = 0
    between: str = "fp32"
    operands: str = ""


ADDERS: Mapping[str, Adder] = {
    adder.name: adder
    for adder in (
        Adder(name="fp32", inside="fp32"),
        Adder(name="tf32 operands", inside="fp32", operands="tf32"),
        Adder(name="bf16 operands", inside="fp32", operands="bf16"),
        Adder(name="14 bits, fp32 every 128", inside="e8m13", block=128),
        Adder(name="14 bits", inside="e8m13"),
        Adder(name="fp16", inside="fp16"),
        Adder(name="bf16", inside="bf16"),
        Adder(name="fp32, bf16 every 128", inside="fp32", block=128, between="bf16"),
    )
}
"""What a GEMM can claim to do, or be found to do."""


@dataclass(frozen=True, kw_only=True)
class KernelReport:
    """A verdict on one kernel with its evidence.

    `violations`: share of outputs beyond the bound of the claim on random operands, `hidden`: on
    operands whose products cancel (GEMMs only); `worst`: largest error over the bound;
    `explained_by`: the arithmetic whose error comes nearest; `ratios`: measured rms error over that
    of each candidate (GEMMs only).
    """

    kernel: str
    claim: str
    verdict: str
    violations: float
    hidden: float
    worst: float
    outputs: int
    explained_by: str
    ratios: Mapping[str, float]

    def __str__(self) -> str:
        return (
            f"{self.kernel}: {self.verdict}. Claim: {self.claim}. {self.violations:.1%} of "
            f"{self.outputs} outputs are beyond its bound, {self.hidden:.1%} where the products "
            f"cancel (largest error/bound {self.worst:.2g}); "
            f"the error is that of: {self.explained_by}."
        )


def check_gemm(
    name: str,
    gemm: Gemm,
    *,
    dtype: torch.dtype = torch.bfloat16,
    claimed: str = "fp32",
    n: int = 512,
    outputs: int = 4096,
    seed: int = 0,
    device: str = "cpu",
) -> KernelReport:
    """Whether `gemm`(a [M, n], b [n, N]) → [M, N] adds up as `claimed`, a name of ADDERS.

    Violations are counted on Gaussian operands; the explanation comes from cancelling ones.
    Raises FormatError for an unknown claim or dtype and a result of another shape.
    """
    adder, form = _claim(claimed), _form(dtype)
    side = max(8, math.isqrt(outputs))
    gaussian, cancelling = (_operands(kind, side, n, seed, dtype) for kind in (False, True))
    y, z = (_run(gemm, operands, device) for operands in (gaussian, cancelling))
    ratio, hidden = _over_bound(y, *gaussian, adder, form), _over_bound(z, *cancelling, adder, form)
    # Rounded operands cancel as exact ones do; an fp32 result shows them without cancelling.
    ratios = _explain(y, gaussian, form) if form == "fp32" else _explain(z, cancelling, form)
    best = _nearest(ratios)
    return _report(
        f"{name} {_short(dtype)}",
        f"{claimed} accumulation, {_short(y.dtype)} result",
        ratio,
        explained_by=best,
        ratios=ratios,
        hidden=hidden,
        doubt=best != claimed and ratios.get(claimed, math.inf) > 4,
    )


def check_kernels(
    *,
    device: str = "cpu",
    dtypes: Sequence[torch.dtype] = (torch.bfloat16, torch.float16, torch.float32),
    seed: int = 0,
) -> Iterator[KernelReport]:
    """The kernels of torch on `device` that a transformer uses: each claims to compute in fp32."""
    for dtype in dtypes:
        yield check_gemm("torch.matmul", torch.matmul, dtype=dtype, seed=seed, device=device)
        yield check_gemm("F.linear", _linear, dtype=dtype, seed=seed, device=device)
        for name, (run, bound) in _FUNCTIONS.items():
            yield check_function(name, run, bound, dtype=dtype, seed=seed, device=device)


def _claim(claimed: str) -> Adder:
    if claimed not in ADDERS:
        raise FormatError(f"accumulator {claimed!r} is unknown. Use one of: {'; '.join(ADDERS)}.")
    return ADDERS[claimed]


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _form(dtype: torch.dtype) -> str:
    if dtype not in _NAMES:
        known = ", ".join(map(_short, _NAMES))
        raise FormatError(f"kernels are checked for operands of {known}; found {_short(dtype)}.")
    return _NAMES[dtype]


def _operands(
    cancel: bool, side: int, n: int, seed: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a [side, n] and b [n, side]; with `cancel` a b = 0, the terms in random order."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(side, n, generator=generator).to(dtype).float()
    b = torch.randn(n, side, generator=generator).to(dtype).float()
    if cancel:
        half, order = n // 2, torch.randperm(n - n % 2, generator=generator)
        a = torch.cat((a[:, :half], a[:, :half]), 1)[:, order]
        b = torch.cat((b[:half], -b[:half]), 0)[order]
    return a.to(dtype), b.to(dtype)


def _run(gemm: Gemm, operands: tuple[Tensor, Tensor], device: str) -> Tensor:
    a, b = (t.to(device) for t in operands)
    y, expected = gemm(a, b).cpu(), (a.shape[0], b.shape[1])
    if tuple(y.shape) != expected:
        raise FormatError(
            f"the GEMM was asked for a [M, n] @ b [n, N] = {expected} and gave {tuple(y.shape)}. "
            "Wrap it so that it multiplies as torch.matmul does."
        )
    return y


def _over_bound(y: Tensor, a: Tensor, b: Tensor, adder: Adder, form: str) -> Tensor:
    """|error| over the bound of the claim, one value per output; inf for NaN."""
    left, right = exact(a.float()), exact(b.float())
    if adder.operands:
        rounder = Arithmetic.of(adder.operands)
        left, right = (_rounded_once(t, rounder) for t in (left, right))
    accumulator = _accumulator(adder, form)
    bound = bounds.matmul(left, right, accumulator, out=Arithmetic.of(_form(y.dtype)))
    off = (y.double() - bound.value).abs()
    ratio = torch.where(off == 0, 0.0, off / bound.error)
    return ratio.nan_to_num(nan=math.inf).flatten()


def _rounded_once(x: Bounded, a: Arithmetic) -> Bounded:
    return Bounded(x.value, (a.u * x.value.abs()).clamp(min=a.h))


def _accumulator(adder: Adder, form: str) -> Accumulator:
    inside, between = Arithmetic.of(adder.inside), Arithmetic.of(adder.between)
    exact_products = form != "fp32" and adder.inside == "fp32"
    if not adder.block:
        return Accumulator(arithmetic=inside, exact_products=exact_products)
    return Accumulator(arithmetic=inside, order="blocked", block=adder.block, between=between)


def _explain(y: Tensor, operands: tuple[Tensor, Tensor], form: str) -> dict[str, float]:
    """Measured rms error over that of each candidate whose sums are rounded one by one."""
    a, b = (t.float() for t in operands)
    exact_y = a.double() @ b.double()
    measured, ratios = _size(y.double() - exact_y), {}
    for name, adder in ADDERS.items():
        if form == "fp32" or not adder.operands:
            simulated = _size(_simulate(a, b, adder).double() - exact_y)
            ratios[name] = measured / simulated if simulated else 1.0 if not measured else math.inf
    return ratios


def _size(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _simulate(a: Tensor, b: Tensor, adder: Adder) -> Tensor:
    """a b, one term after the other; fp32 [M, N]."""
    if adder.operands:
        a, b = round_to(a, adder.operands), round_to(b, adder.operands)
    total = torch.zeros(a.shape[0], b.shape[1])
    partial = torch.zeros_like(total)
    for k in range(a.shape[1]):
        partial = _cast(partial + a[:, k : k + 1] * b[k : k + 1], adder.inside)
        if adder.block and (k + 1) % adder.block == 0:
            total, partial = _cast(total + partial, adder.between), torch.zeros_like(total)
    return _cast(total + partial, adder.between) if adder.block else partial


def _cast(x: Tensor, name: str) -> Tensor:
    return x if name == "fp32" else round_to(x, name)


def _nearest(ratios: Mapping[str, float]) -> str:
    """The candidate whose rms error is nearest in ratio."""
    best = min(ratios, key=lambda name: abs(math.log(max(ratios[name], 1e-30))))
    return best if 0.01 < ratios[best] < 30 or best == "fp32" else "none of the candidates"


def _linear(a: Tensor, b: Tensor) -> Tensor:
    return F.linear(a, b.mT.contiguous())


def _report(
    kernel: str,
    claim: str,
    ratio: Tensor,
    *,
    explained_by: str,
    ratios: Mapping[str, float],
    hidden: Tensor | None = None,
    doubt: bool = False,
) -> KernelReport:
    worst = ratio if hidden is None else torch.cat((ratio, hidden))
    verdict = FAIL if (worst > TOLERANCE).any() else UNKNOWN if doubt else PASS
    return KernelReport(
        kernel=kernel,
        claim=claim,
        verdict=verdict,
        violations=_beyond(ratio),
        hidden=0.0 if hidden is None else _beyond(hidden),
        worst=worst.max().item(),
        outputs=ratio.numel(),
        explained_by=explained_by,
        ratios=ratios,
    )


def _beyond(ratio: Tensor) -> float:
    return (ratio > TOLERANCE).double().mean().item()


# Kernels that are no GEMMs: (what runs on inputs [4, 64, 128], its bound when `a` is inside).
Run = Callable[[Tensor], Tensor]
Bound = Callable[[Bounded, Arithmetic, Arithmetic], Bounded]


def _affine(like: Tensor) -> tuple[Tensor, Tensor]:
    """A gain and a bias that every dtype holds exactly."""
    steps = torch.arange(like.shape[-1], dtype=torch.float64, device=like.device) % 8
    return ((steps + 5) / 8).to(like.dtype), ((steps - 4) / 16).to(like.dtype)


def _layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], *_affine(x), _EPS)


def _layer_norm_bound(x: Bounded, a: Arithmetic, out: Arithmetic) -> Bounded:
    gain, bias = (exact(t) for t in _affine(x.value))
    return bounds.layer_norm(x, gain, bias, _EPS, a, out=out)


def _rms_norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], _affine(x)[0], _EPS)


def _rms_norm_bound(x: Bounded, a: Arithmetic, out: Arithmetic) -> Bounded:
    return bounds.rms_norm(x, exact(_affine(x.value)[0]), _EPS, a, out=out)


def _attention(x: Tensor) -> Tensor:
    """Four heads whose queries, keys and values are shifted copies of `x`."""
    q, k, v = x, x.roll(1, -1), x.roll(2, -1)
    return F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]


def _attention_bound(x: Bounded, a: Arithmetic, out: Arithmetic) -> Bounded:
    q, k, v = x, exact(x.value.roll(1, -1)), exact(x.value.roll(2, -1))
    visible = torch.ones(x.value.shape[-2], x.value.shape[-2], dtype=torch.bool).tril()
    return bounds.attention(
        q,
        k,
        v,
        Accumulator(arithmetic=a),
        probabilities=out,
        visible=visible,
        ulps=FLASH_ULPS,
        out=out,
    )


_FUNCTIONS: Mapping[str, tuple[Run, Bound]] = {
    "F.softmax": (
        lambda x: F.softmax(4 * x, -1),
        lambda x, a, out: bounds.softmax(exact(4 * x.value), a, ulps=ULPS, out=out),
    ),
    "F.layer_norm": (_layer_norm, _layer_norm_bound),
    "F.rms_norm": (_rms_norm, _rms_norm_bound),
    "F.silu": (F.silu, lambda x, a, out: bounds.silu(x, a, ulps=ULPS, out=out)),
    "F.gelu(tanh)": (
        lambda x: F.gelu(x, approximate="tanh"),
        lambda x, a, out: bounds.gelu_tanh(x, a, ulps=ULPS, out=out),
    ),
    "scaled_dot_product_attention": (_attention, _attention_bound),
}


def check_function(
    name: str,
    run: Run,
    bound: Bound,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    device: str = "cpu",
) -> KernelReport:
    """Whether `run`(x [4, 64, 128]) stays within `bound`(x, fp32 inside, the dtype at the end)."""
    out, generator = Arithmetic.of(_form(dtype)), torch.Generator().manual_seed(seed)
    x = torch.randn(4, 64, 128, generator=generator).to(dtype)
    y = run(x.to(device)).cpu().double()
    ratios, wide = {}, exact(x.float())
    for inside in dict.fromkeys(("fp32", out.name)):
        within = bound(wide, Arithmetic.of(inside), out)
        off = (y - within.value).abs()
        ratios[inside] = torch.where(off == 0, 0.0, off / within.error).nan_to_num(nan=math.inf)
    found = [name for name, ratio in ratios.items() if ratio.max() <= TOLERANCE]
    return _report(
        f"{name} {_short(dtype)}",
        f"fp32 inside, {_short(dtype)} result",
        ratios["fp32"].flatten(),
        explained_by=f"{found[0]} inside" if found else "none of the candidates",
        ratios={},
    )
