"""Rounding of fp32 values to a format, in torch ops: the definition every kernel agrees with.

The same bits come from eager torch, torch.compile and the C kernel (round.c), on every device.
Semantics, for x of fp32 and a format with m mantissa bits, smallest exponent e and largest L:

* nearest: ties to even, subnormals included; truncate: toward zero.
* stochastic: the two neighbors of x bracket it and P(up) = (x − low) / step. For formats with 8
  exponent bits all 23 − m discarded bits decide (exact); for the others 22 random bits do: exact
  in the normal range, |bias| ≤ 2^-23 step among the format's subnormals. Values on the grid stay.
* beyond L: saturating casts give ±L (for ±inf too); others ±inf, NaN (formats without inf), or ±L
  (formats with neither). Truncation never leaves L for a finite x.
* NaN stays NaN; −0 stays −0.
"""

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from halfulp.errors import FormatError
from halfulp.numerics import kernel
from halfulp.numerics.cuda import round_elements, transformed, use_cuda
from halfulp.numerics.format import Format, get_format
from halfulp.numerics.random import Key, words

_SIGN, _MAGNITUDE, _EXPONENT = -(2**31), 2**31 - 1, 0x7F800000
_QUIET_NAN = 0x7FC00000
_CHUNK = 1 << 16  # elements: the definition's temporaries stay in cache
_ROUNDINGS = ("nearest", "stochastic", "truncate")


def round_to(
    x: Tensor,
    format: Format | str,
    *,
    rounding: str = "nearest",
    key: Key | None = None,
    index: int = 0,
    saturate: bool | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`x` rounded element by element to `format`, without a scale; same shape and dtype as `x`.

    * `rounding`: nearest (ties to even), stochastic (needs `key`) or truncate.
    * `key`: Key.of(seed, name).fold(step); element i of the flattened tensor uses word index + i,
      so a shard that starts at element `index` of the whole tensor rounds as the whole does.
    * `saturate`: default is the format's (`Format.saturates`).
    * `out`: a contiguous fp32 tensor of the same shape, `x` itself or memory apart from it.
    * No gradient flows through; `halfulp.quantize` holds the straight-through estimator.

    Raises FormatError for dtypes other than fp32, bf16, fp16, when the result does not fit them,
    and for arguments that are not as above.
    """
    fmt = get_format(format) if isinstance(format, str) else format
    if not isinstance(x, Tensor) or not isinstance(fmt, Format):
        found = f"{type(x).__name__} and {type(fmt).__name__}"
        raise FormatError(f"round_to takes a tensor and a format or its name; found {found}.")
    check_rounding(rounding, key)
    saturate = fmt.saturates if saturate is None else saturate
    if (
        x.dtype is torch.float32
        and use_c(x)
        and 0 < x.numel() < 1 << 31 > index >= 0
        and (out is None or use_c(out))
    ):
        result = torch.empty_like(x) if out is None else check_out(out, x)
        _round_c(x, result, fmt, rounding, saturate, key, index)
        return result
    _check_dtype(x, fmt)
    if index < 0:
        raise FormatError(f"index= counts elements from 0; found {index}. Give the shard's first.")
    with torch.no_grad():
        wide = x.detach().contiguous().float()
        result = _empty_like(wide) if out is None else check_out(out, x)
        if x.numel():
            _round_into(wide, result, fmt, rounding, saturate, key, index)
        return result if out is not None else result.to(x.dtype)


def check_rounding(rounding: str, key: Key | Tensor | None) -> None:
    if rounding not in _ROUNDINGS:
        raise FormatError(f"rounding {rounding!r} is unknown. Use one of {', '.join(_ROUNDINGS)}.")
    if rounding == "stochastic" and key is None:
        raise FormatError(
            "stochastic rounding needs a key: pass key=Key.of(seed, name).fold(step)."
        )
    if key is not None and not isinstance(key, Key | Tensor):
        raise FormatError(f"key= takes Key.of(seed, name); found {type(key).__name__}.")


def check_out(out: Tensor, x: Tensor) -> Tensor:
    if out.shape != x.shape or out.dtype != torch.float32 or not out.is_contiguous():
        found = f"{out.dtype} {tuple(out.shape)}"
        raise FormatError(f"out= needs contiguous fp32 {tuple(x.shape)}; found {found}.")
    if out is not x and _shares_part(out, x):
        raise FormatError("out= shares part of its memory with x. Give x itself, or other memory.")
    increment_version(out)  # the C and CUDA kernels write behind autograd's back
    return out


def _shares_part(out: Tensor, x: Tensor) -> bool:
    """Whether writing to `out` would change what is still to be read of `x`."""
    shift = int(out.storage_offset()) - int(x.storage_offset())
    if not 0 < abs(shift) < x.numel():
        return False
    copied = x.dtype is not torch.float32 or not x.is_contiguous()
    return not copied and out.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def _check_dtype(x: Tensor, fmt: Format) -> None:
    if x.layout is not torch.strided:
        raise FormatError(f"round_to takes dense tensors; found {x.layout}. Round x.values().")
    holds = {torch.float32: (23, 8), torch.bfloat16: (7, 8), torch.float16: (10, 5)}.get(x.dtype)
    if holds is None:
        raise FormatError(
            f"round_to takes fp32, bf16 or fp16 tensors; found {x.dtype}. Convert it first: a "
            "conversion from fp64 rounds once more."
        )
    largest = torch.finfo(x.dtype).max
    if fmt.mantissa_bits > holds[0] or fmt.exponent_bits > holds[1] or fmt.largest > largest:
        raise FormatError(f"{fmt} does not fit in {x.dtype}. Pass x.float() instead.")


def _round_into(
    x: Tensor, y: Tensor, fmt: Format, rounding: str, saturate: bool, key: Key | None, index: int
) -> None:
    """Splits where the element index passes a multiple of 2^32 (its high word enters the key)."""
    flat, target, start = x.view(-1), y.view(-1), 0
    while start < x.numel():
        high, low = divmod(index + start, 1 << 32)
        stop = min(x.numel(), start + (1 << 32) - low)
        used = key.fold(high) if key and high else key
        piece = flat[start:stop], target[start:stop]
        if use_c(x, y):
            _round_c(*piece, fmt, rounding, saturate, used, low)
        elif use_cuda(*piece) and not fmt.is_identity:
            round_elements(*piece, fmt, rounding, saturate, used, low)
        else:
            _round_torch(*piece, fmt, rounding, saturate, used, low)
        start = stop


def use_c(*tensors: Tensor) -> bool:
    """Whether the C kernel serves these tensors: eager, plain, contiguous fp32 on the CPU."""
    if torch.compiler.is_compiling() or transformed() or kernel.status().name != "c":
        return False
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter) or not (t.is_cpu and t.is_contiguous()):
            return False
    return True


def _round_c(
    x: Tensor, y: Tensor, fmt: Format, rounding: str, saturate: bool, key: Key | None, index: int
) -> None:
    if fmt.is_identity:  # no bit to discard: the integer path would add the last bit to itself
        y.copy_(x)
        return
    status = kernel.status()
    assert status.library is not None
    k0, k1 = (key.k0, key.k1) if key else (0, 0)
    plan = kernel.plan(fmt, rounding, saturate)
    status.library.halfulp_round(
        status.parallel, x.data_ptr(), y.data_ptr(), x.numel(), plan, k0, k1, index, None
    )


def _round_torch(
    x: Tensor, y: Tensor, fmt: Format, rounding: str, saturate: bool, key: Key | None, index: int
) -> None:
    used = key if rounding == "stochastic" else None
    step = _CHUNK if x.is_cpu and not torch.compiler.is_compiling() else x.numel()
    for start in range(0, x.numel(), step):
        piece = x[start : start + step]
        random = None if used is None else random_words(piece, used, index + start)
        y[start : start + step] = round_definition(piece, fmt, rounding, saturate, random)


def random_words(x: Tensor, key: Key | Tensor, index: int = 0) -> Tensor:
    """int32 words for the elements of `x`, in order; `key`: a Key or its int32 tensor [2]."""
    low = index & 0xFFFFFFFF
    base = low - (1 << 32) if low >= 1 << 31 else low
    i = torch.arange(x.numel(), dtype=torch.int32, device=x.device) + base
    # Numbers where possible: a key copied to another device would make the host wait for it.
    k0, k1 = (key.k0, key.k1) if isinstance(key, Key) else key.unbind()
    return words(i, k0, k1).view(x.shape)


def round_definition(
    x: Tensor, fmt: Format, rounding: str, saturate: bool, random: Tensor | None
) -> Tensor:
    """The definition on fp32 `x`; `random`: one int32 word per element if stochastic, else None."""
    if fmt.is_identity:
        return x.clone()
    saturate = saturate or fmt.overflow == "saturate"
    if fmt.exponent_bits == 8:
        return _wide(x, fmt, rounding, saturate, random)
    return _narrow(x, fmt, rounding, saturate, random)


def _narrow(x: Tensor, fmt: Format, rounding: str, saturate: bool, random: Tensor | None) -> Tensor:
    m = fmt.mantissa_bits
    sign = x.view(torch.int32) & _SIGN
    whole = x.abs()
    cap = fmt.largest if saturate else 2.0 ** (fmt.largest_exponent + 1)
    a = torch.where(whole > cap, cap, whole)
    e = (a.view(torch.int32) & _EXPONENT).clamp(min=(fmt.smallest_exponent + 127) << 23)
    c = (e + ((23 - m) << 23)).view(torch.float32)
    step = e - (m << 23)
    # In [c, 2c) fp32 itself has the format's spacing: one addition rounds, subnormals included.
    r = (a + c) - c
    if rounding == "stochastic":
        assert random is not None
        error = a - r
        offset = step | (random >> 9 & 0x7FFFFF) | 1
        threshold = offset.view(torch.float32) - step.view(torch.float32)
        move = (step | (error.view(torch.int32) & _SIGN)).view(torch.float32)
        r = torch.where(error.abs() > threshold, r + move, r)
    if rounding == "truncate":
        r = torch.where(r > a, r - step.view(torch.float32), r)
        r = torch.where((r > fmt.largest) & (whole < math.inf), fmt.largest, r)
    if not saturate:
        r = torch.where(r > fmt.largest, math.inf if fmt.overflow == "inf" else math.nan, r)
    return ((r.view(torch.int32) & _MAGNITUDE) | sign).view(torch.float32)


def _wide(x: Tensor, fmt: Format, rounding: str, saturate: bool, random: Tensor | None) -> Tensor:
    drop = 23 - fmt.mantissa_bits
    mask = (1 << drop) - 1
    u = x.view(torch.int32)
    magnitude = u & _MAGNITUDE
    r = magnitude
    if rounding == "nearest":
        r = r + (mask >> 1) + (u >> drop & 1)
    if rounding == "stochastic":
        assert random is not None
        r = r + (random & mask)
    # NaN patterns may wrap to negative here; they are replaced below.
    r = r & ~mask
    largest = _EXPONENT - (1 << drop)
    r = torch.where(r > largest, largest if saturate else _EXPONENT, r)
    r = torch.where(magnitude > _EXPONENT, _QUIET_NAN, r)
    return (r | (u & _SIGN)).view(torch.float32)


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
