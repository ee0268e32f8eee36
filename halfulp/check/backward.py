"""Errors of every GEMM of a training step, forward and backward, predicted and measured per format.

Write the rounded copies of operands A, B, contracted along K, as Q(A) = (1 + β_A) A + R_A, where β
is the shrinkage of the rounding error e = Q(A) − A, with column k weighing as much as the other
operand gives it: β_A = Σ_k <e, A>_k |B|²_k / Σ_k |A|²_k |B|²_k (sums over rows). The error of A Bᵀ
is then

    bias     (1 + β_A)(1 + β_B) − 1           along A Bᵀ itself, and
    variance Σ_k (1 + β_A)² |A|²_k |R_B|²_k + (1 + β_B)² |R_A|²_k |B|²_k + |R_A|²_k |R_B|²_k

in the squared norm, exactly in expectation when the R are independent with zero mean: no product is
needed, only column sums of squares. The measurement multiplies the rounded operands. What flushes
to zero or saturates has β < 0: it shows as bias, which training cannot average out.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from halfulp.attention import has_attention_interface
from halfulp.blocks import Gemm
from halfulp.errors import CheckError
from halfulp.formats import format_quantizer
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.statistics import quantizer_statistics
from halfulp.policy import load_recipe
from halfulp.quantization import Quantized, quantize, unquantize
from halfulp.quantized_modules import attach
from halfulp.site import Clock, Site

FORMATS = ("bf16", "fp16", "e4m3", "e5m2/e4m3", "mxfp8")
BIAS = 0.02  # |bias| above it is a finding (round-off spec 3.5)
_EXACT = 1 << 20  # multiply-adds up to which the reference product is fp64


@dataclass(frozen=True, kw_only=True)
class GemmError:
    """One product of one GEMM with both operands rounded to one format.

    `rel` is ‖error‖ / ‖product‖ (Frobenius), `bias` the part of the error along the product,
    <error, product> / ‖product‖²; NaN where the product is zero or not finite, and for what was
    not measured. The last three are those of the worse operand: shares of its nonzero entries that
    became zero, of Σ x² that they held, and of entries beyond the largest value.
    """

    gemm: str
    block: str
    role: str
    which: str  # fprop | dgrad | wgrad
    format: str
    predicted_rel: float
    measured_rel: float
    predicted_bias: float
    measured_bias: float
    flushed: float
    flushed_energy: float
    saturated: float

    @property
    def ratio(self) -> float:
        """Predicted over measured relative error."""
        return self.predicted_rel / self.measured_rel if self.measured_rel else math.nan

    @property
    def biased(self) -> bool:
        """Whether the error has a part that repeats instead of averaging out."""
        bias = self.predicted_bias if math.isnan(self.measured_bias) else self.measured_bias
        return abs(bias) > BIAS


@dataclass(frozen=True, kw_only=True)
class GemmErrors:
    """All rows, GEMM by GEMM; `skipped` names GEMMs that could not be watched and says why."""

    rows: tuple[GemmError, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)


def gemm_errors(
    model: nn.Module,
    loss: Callable[[], Tensor],
    *,
    formats: Sequence[str] = FORMATS,
    which: Sequence[str] = ("fprop", "dgrad", "wgrad"),
    attention: bool = True,
    measure: bool = True,
    seed: int = 0,
    hints: Mapping[str, str] | None = None,
) -> GemmErrors:
    """Errors of the GEMMs of one forward and backward pass, per format; the model is unchanged.

    * `loss`: runs the forward pass of a training batch and returns the scalar to minimize. The pass
      itself runs unrounded: each error is that of one product alone.
    * `formats`: words of halfulp.formats for both operands, or "G/X" with another format for
      the output gradient: "e5m2/e4m3". Blocks and rows run along the contracted axis.
    * `attention`: also the products QK and PV, where the model calls transformers' attention
      interface.
    * `measure`: False predicts only, without a product per format.
    * `seed`: of stochastic rounding.

    Operands are used while autograd has them; nothing is kept. Raises PolicyError for a model that
    is quantized, CheckError when no GEMM ran.
    """
    watch = _Watch({f: _pair(f) for f in formats}, frozenset(which), measure, seed)
    handle = quantize(model, "fp32", hints=hints)
    try:
        skipped = _attach(handle, watch, attention)
        with torch.enable_grad():
            parameters = [p for p in model.parameters() if p.requires_grad]
            value = loss()
            if parameters and value.requires_grad:
                torch.autograd.grad(value, parameters, allow_unused=True)
    finally:
        unquantize(model)
    rows = tuple(
        _row(gemm, which, name, sums.tolist())
        for gemm in watch.gemms
        for (_, which, name), sums in watch.of(gemm)
    )
    if not rows:
        raise CheckError(
            "no GEMM ran in this loss. Give a loss that calls the model, with parameters that "
            "require gradients for dgrad and wgrad."
        )
    return GemmErrors(rows=rows, skipped=skipped)


class _Pair(NamedTuple):
    g: Quantizer
    x: Quantizer  # also of w

    def of(self, side: str) -> Quantizer:
        return self.g if side == "g" else self.x


def _pair(word: str) -> _Pair:
    gradient, slash, other = word.partition("/")
    return _Pair(format_quantizer(gradient), format_quantizer(other if slash else gradient))


def _attach(handle: Quantized, watch: "_Watch", attention: bool) -> dict[str, str]:
    """Put an observer on every GEMM; {GEMM: why not} of the others."""
    skipped = {}
    spec = load_recipe("fp32").gemms["linear"]
    for gemm, *_ in handle.resolution.gemms:
        product, module = gemm.role.startswith("attn"), handle.model.get_submodule(gemm.module)
        if product and not attention:
            continue
        if product and not has_attention_interface(handle.model, module):
            skipped[gemm.name] = "its module does not use transformers' attention interface"
            continue
        site = _Observer(gemm.name, gemm.block, spec, 0, handle.clock, watch=watch)
        attach(handle.model, gemm.module, gemm.role, site)
        watch.gemms.append(gemm)
    return skipped


@dataclass
class _Observer(Site):
    """A site that rounds nothing and hands the operands of its three products on."""

    clock: Clock
    watch: "_Watch" = field(kw_only=True)

    def product(
        self, gemm: str, a: str, x: Tensor, b: str, w: Tensor, at, bias: Tensor | None = None
    ) -> Tensor:
        y = super().product(gemm, a, x, b, w, at)
        self.watch.see(self.name, gemm, (a, x), (b, w), y)
        return y if bias is None else y + bias


@dataclass
class _Watch:
    """Sums per (GEMM, product, format); see `_sums`."""

    formats: Mapping[str, _Pair]
    which: frozenset[str]
    measure: bool
    seed: int
    gemms: list[Gemm] = field(default_factory=list)
    sums: dict[tuple[str, str, str], Tensor] = field(default_factory=dict)
    calls: int = 0

    def of(self, gemm: Gemm) -> list[tuple[tuple[str, str, str], Tensor]]:
        return [(key, sums) for key, sums in self.sums.items() if key[0] == gemm.name]

    def see(
        self, name: str, which: str, left: tuple[str, Tensor], right: tuple[str, Tensor], y: Tensor
    ) -> None:
        if which not in self.which:
            return
        self.calls += 1
        small = y.numel() * left[1].shape[-1] <= _EXACT
        reference = left[1].double() @ right[1].double().mT if small and self.measure else y
        for word, pair in self.formats.items():
            key = Key.of(self.seed, f"{name}/{which}/{word}").fold(self.calls)
            a, b = (_rounded(t, pair.of(s), key.fold(ord(s))) for s, t in (left, right))
            new, old = _sums(a, b, reference, self.measure), self.sums.get((name, which, word))
            self.sums[name, which, word] = new if old is None else _merge(old, new)


class _Rounded(NamedTuple):
    """A rounded operand and, over its rows, Σ x², Σ e x and Σ e² (fp64 [..., K])."""

    copy: Tensor
    energy: Tensor
    along: Tensor
    error: Tensor
    shares: Tensor  # [3]: flushed, flushed energy, saturated

    def shrinkage(self, weights: Tensor) -> Tensor:
        whole = (self.energy * weights).sum()
        return torch.where(whole > 0, (self.along * weights).sum() / whole, 0.0)

    def noise(self, shrinkage: Tensor) -> Tensor:
        """Σ (e − β x)² [..., K]."""
        left = self.error - 2 * shrinkage * self.along + shrinkage**2 * self.energy
        return left.clamp_(min=0)


def _rounded(x: Tensor, q: Quantizer, key: Key) -> _Rounded:
    x = x.contiguous()
    copy = apply_quantizer(x, q, key=key if q.stochastic else None)
    n, beyond, nonzero, flushed, energy, lost, _ = quantizer_statistics(x, copy, q).unbind()
    tiny = torch.finfo(torch.float64).tiny
    shares = [flushed / nonzero.clamp(min=1), lost / energy.clamp(min=tiny), beyond / n]
    exact = hadamard(x, q.hadamard) if q.hadamard else x
    error = copy - exact
    return _Rounded(
        copy=copy,
        energy=exact.square().sum(-2).double(),
        along=(error * exact).sum(-2).double(),
        error=error.square_().sum(-2).double(),
        shares=torch.stack(shares),
    )


def _sums(a: _Rounded, b: _Rounded, y: Tensor, measure: bool) -> Tensor:
    """fp64 [8]: ‖y‖², variance, bias ‖y‖², ‖error‖², <error, y>; then the larger shares."""
    beta_a, beta_b = a.shrinkage(b.energy), b.shrinkage(a.energy)
    noise_a, noise_b, ga, gb = a.noise(beta_a), b.noise(beta_b), 1 + beta_a, 1 + beta_b
    variance = ga**2 * a.energy * noise_b + gb**2 * noise_a * b.energy + noise_a * noise_b
    norm = torch.linalg.vector_norm(y, dtype=torch.float64).square()
    squared = along = torch.full_like(norm, math.nan)
    if measure:
        left, right = (t.to(y.dtype) for t in (a.copy, b.copy))
        error = left @ right.mT - y
        squared = torch.linalg.vector_norm(error, dtype=torch.float64).square()
        along = error.flatten().dot(y.flatten()).double()
    sums = torch.stack([norm, variance.sum(), (ga * gb - 1) * norm, squared, along])
    return torch.cat([sums, torch.maximum(a.shares, b.shares)])


def _merge(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a[:5] + b[:5], torch.maximum(a[5:], b[5:])])


def _row(gemm: Gemm, which: str, word: str, sums: list[float]) -> GemmError:
    norm, variance, bias, squared, along, flushed, flushed_energy, saturated = sums
    norm = norm or math.nan
    return GemmError(
        gemm=gemm.name,
        block=gemm.block,
        role=gemm.role,
        which=which,
        format=word,
        predicted_rel=math.sqrt(variance / norm + (bias / norm) ** 2),
        measured_rel=math.sqrt(squared / norm),
        predicted_bias=bias / norm,
        measured_bias=along / norm,
        flushed=flushed,
        flushed_energy=flushed_energy,
        saturated=saturated,
    )
