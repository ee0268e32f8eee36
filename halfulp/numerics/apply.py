"""A quantizer at work on a tensor: transform, scale, round, unscale."""

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from halfulp.errors import FormatError
from halfulp.numerics import kernel, op  # noqa: F401 (op registers halfulp::quantize)
from halfulp.numerics.cuda import quantize as cuda_quantize
from halfulp.numerics.cuda import use_cuda
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.launch import launcher
from halfulp.numerics.quantizer import Quantizer, parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import (
    check_out,
    check_rounding,
    random_words,
    round_definition,
    round_to,
    use_c,
)
from halfulp.numerics.scaling import amax_bits, divide, scale_of


def apply_quantizer(
    x: Tensor,
    q: Quantizer | str,
    *,
    key: Key | Tensor | None = None,
    scale: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x` [..., K] in fp32, quantized and scaled back: the values that the GEMM sees.

    * `q`: a Quantizer, or what `parse_quantizer` reads.
    * With `q.hadamard` the result is in the transformed domain.
    * `key`: for stochastic rounding; a Key, or an int32 tensor [2] in traced graphs.
    * `scale`: fp32 tensor [] for delayed scaling (see `delayed_scale`).
    * A group (tensor, row, block, tile) that holds inf or NaN becomes NaN if its scale is current.
    * 2-D tiles run over the flattened leading dimensions; the last tile of a row may be partial.

    Raises FormatError for a dtype other than fp32, a missing key or scale, or a K that the
    transform does not divide.
    """
    if isinstance(q, str):
        q = parse_quantizer(q)
    if scale is None and (out is None or use_c(out)) and _direct(x, q, key):
        y = torch.empty_like(x) if out is None else check_out(out, x)
        k0, k1 = (key.k0, key.k1) if type(key) is Key else (0, 0)
        launcher(q)(x, y, k0, k1)
        return y
    if x.dtype is not torch.float32:
        raise FormatError(f"quantizers work on fp32 tensors; found {x.dtype}. Convert it first.")
    if x.ndim == 0 and q.granularity not in ("element", "tensor"):
        raise FormatError("quantizers run along the last axis; one number has none. Reshape it.")
    check_rounding(q.rounding, key)
    if torch.compiler.is_compiling() and x.is_cpu and out is None:
        return torch.ops.halfulp.quantize(x, str(q), key, scale)
    if (q.scale == "delayed") != (scale is not None):
        raise FormatError(f"{q}: scale= belongs to delayed scaling, and only to it.")
    if scale is not None and (scale.dtype is not torch.float32 or scale.numel() != 1):
        raise FormatError(
            f"{q}: scale= must be one fp32 number; found {scale.dtype} of {scale.shape}."
        )
    if q.hadamard:
        x = hadamard(x, q.hadamard)
    x = x.contiguous()
    y = torch.empty_like(x) if out is None else check_out(out, x)
    if x.numel() == 0:
        return y
    if not isinstance(key, Tensor):
        if use_c(x, y):
            return _apply_c(x, y, q, key, scale)
        if use_cuda(x, y) and not q.format.is_identity:
            cuda_quantize(x, y, q, key, scale)
            return y
    return (
        y.copy_(_apply_torch(x, q, key, scale))
        if out is not None
        else _apply_torch(x, q, key, scale)
    )


def _direct(x: Tensor, q: Quantizer, key: Key | Tensor | None) -> bool:
    """Whether one call of the C kernel does it all; everything unusual goes the long way."""
    return (
        use_c(x)
        and x.dtype is torch.float32
        and 0 < x.numel() < 1 << 31
        and x.ndim > 0
        and (type(key) is Key or (key is None and not q.stochastic))
        and q.is_one_pass
    )


def _apply_c(x: Tensor, y: Tensor, q: Quantizer, key: Key | None, scale: Tensor | None) -> Tensor:
    if q.scale == "none":
        return round_to(x, q.format, rounding=q.rounding, key=key, saturate=q.saturate, out=y)
    k0, k1 = (key.k0, key.k1) if key else (0, 0)
    if q.scale not in ("delayed", "static"):
        launcher(q)(x, y, k0, k1)
        return y
    status = kernel.status()
    assert status.library is not None
    s = static_scale(q.static_scale) if scale is None else scale
    plan = kernel.plan(q.format, q.rounding, True, "given")
    pointers = status.parallel, x.data_ptr(), y.data_ptr()
    status.library.halfulp_round(*pointers, x.numel(), plan, k0, k1, 0, s.data_ptr())
    return y


@cache
def static_scale(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def _apply_torch(x: Tensor, q: Quantizer, key: Key | Tensor | None, scale: Tensor | None) -> Tensor:
    random = None
    if q.stochastic:
        assert key is not None
        random = random_words(x, key)
    if q.scale == "none":
        return round_definition(x, q.format, q.rounding, q.saturate, random)
    s, inverse = scales(x, q, scale)
    return round_definition(x * s, q.format, q.rounding, True, random) * inverse


def scales(x: Tensor, q: Quantizer, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(s, 1/s) for `x` [..., K], broadcastable to it; `scale` as in `apply_quantizer`."""
    if q.scale in ("delayed", "static"):
        s = torch.full((), q.static_scale, device=x.device) if scale is None else scale
        return s, divide(1.0, s)
    if q.granularity == "tensor":
        return scale_of(amax_bits(x), q)
    rows, columns = q.tile
    if (rows, columns) == (1, 0):
        return scale_of(amax_bits(x, -1), q)
    return _tile_scales(x, q)


def _tile_scales(x: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    matrix = x.reshape(-1, x.shape[-1])
    (height, width), (rows, columns) = q.tile, matrix.shape
    padded = pad(matrix, (0, -columns % width, 0, -rows % height))
    tiles = padded.unflatten(1, (-1, width)).unflatten(0, (-1, height))
    tensor_amax = amax_bits(x) if q.scale == "nvfp4" else None
    pair = scale_of(amax_bits(tiles, (1, 3)), q, tensor_amax)
    s, inverse = (t.expand_as(tiles).flatten(2).flatten(0, 1) for t in pair)
    return s[:rows, :columns].view(x.shape), inverse[:rows, :columns].view(x.shape)


def delayed_scale(amaxes: Tensor, q: Quantizer) -> Tensor:
    """The scale (fp32 []) that a history of amaxes (fp32 [H]; 0 = not seen yet) gives.

    An empty history gives 1: the first step is unscaled, as in Transformer Engine. Non-finite
    entries are ignored.
    """
    seen = torch.where(amaxes < math.inf, amaxes, 0.0).amax()
    return scale_of(seen.view(torch.int32), q)[0]
