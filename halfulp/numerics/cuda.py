"""The fused kernels of NVIDIA GPUs: round.cu, compiled once per machine by torch's own NVRTC.

They serve eager tensors and have the bits of the CPU. Where NVRTC is missing, on AMD GPUs and with
HALFULP_KERNEL=torch, the torch definition runs instead; `halfulp info` says which and why. Traced
graphs always use the definition.
"""

import ctypes
import functools
import hashlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfulp.errors import KernelError
from halfulp.numerics import kernel
from halfulp.numerics.format import Format
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key

_FILES = ("round.h", "scale.h", "adamw.h", "round.cu")
_FUNCTIONS = ("amax", "round", "blocks", "tiles", "accumulate", "adamw")
_THREADS = 256
_WAVES = (
    16  # thread blocks per multiprocessor of an elementwise kernel, which strides over the rest
)
_MOST = 1 << 31  # elements: indices are 32 bits


@dataclass(frozen=True)
class CudaStatus:
    """`name` is "nvrtc" or "torch"; `reason` says why in one sentence."""

    name: str
    reason: str


@functools.cache
def status() -> CudaStatus:
    """The kernel in use for eager CUDA tensors."""
    if os.environ.get("HALFULP_KERNEL", "") == "torch":
        return CudaStatus("torch", "HALFULP_KERNEL=torch asks for the torch definition")
    if torch.version.hip or not torch.cuda.is_available():
        return CudaStatus("torch", "there is no NVIDIA GPU")
    try:
        _module(torch.cuda.current_device())
    except (OSError, KernelError) as error:
        return CudaStatus("torch", f"the CUDA kernel cannot be built here ({error})")
    return CudaStatus("nvrtc", "CUDA kernel built by NVRTC")


def transformed() -> bool:
    """Whether torch.func (vmap, grad) is at work, whose tensors have no memory of their own."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return functorch.peek_interpreter_stack() is not None


def use_cuda(*tensors: Tensor) -> bool:
    """Whether the fused kernels serve these tensors: eager, plain, contiguous, on an NVIDIA GPU."""
    if not tensors[0].is_cuda or torch.compiler.is_compiling() or transformed():
        return False
    for t in tensors:
        if type(t) not in (Tensor, torch.nn.Parameter):
            return False
        if not (t.is_cuda and t.is_contiguous() and t.numel() < _MOST):
            return False
    return status().name == "nvrtc"


def quantize(x: Tensor, y: Tensor, q: Quantizer, key: Key | None, scale: Tensor | None) -> None:
    """Write `x` as `q` has it, without its transform, to `y`; both fp32 and not empty."""
    rule = "given" if q.scale in ("delayed", "static") else "p2" if q.power_of_two else q.scale
    saturate = q.saturate or q.scale != "none"
    plan = _plan(q.format, q.rounding, saturate, rule, q.margin, q.tile)
    if q.scale == "none":
        return _elements(x, y, plan, key, 0)
    if rule == "given":
        given = _constant(q.static_scale, x.device) if scale is None else scale
        return _elements(x, y, plan, key, 0, given=given)
    if q.granularity == "tensor":
        return _elements(x, y, plan, key, 0, amax=_amax(x))
    return _groups(x, y, q, plan, key)


def round_elements(
    x: Tensor, y: Tensor, fmt: Format, rounding: str, saturate: bool, key: Key | None, index: int
) -> None:
    """Write `x` rounded without a scale to `y`; element 0 uses random word `index` < 2^32."""
    _elements(x, y, _plan(fmt, rounding, saturate), key, index)


def accumulate(total: Tensor, part: Tensor, fmt: Format, *, promote: bool, saturate: bool) -> None:
    """Add `part` to the running sum `total` of a GEMM, one of them or the sum truncated."""
    plan = _plan(fmt, "truncate", saturate)
    n = total.numel()
    arguments = (_at(total), _at(part), _u32(n), plan, _u32(promote), _u32(0))
    _launch("accumulate", total, _waves(total, n), arguments)


def adamw(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, fmt: Format | None, rounding: str,
    key: Key, index: int, scalars: Sequence[float],
) -> None:  # fmt: skip
    """One AdamW step; `fmt` None keeps the weight as it is. See optim/adamw.py for the formula."""
    q = _UNUSED if fmt is None else _plan(fmt, rounding, False)
    half = (_u32(t.dtype is torch.bfloat16) for t in (w, grad))
    rule = q, _u32(fmt is None), kernel.floats(tuple(scalars))
    n = w.numel()
    arguments = (_at(w), _at(grad), _at(m), _at(v), _u32(n), *rule, *_keys(key), _u32(index), *half)
    _launch("adamw", w, _waves(w, n), arguments)


def _elements(
    x: Tensor, y: Tensor, plan: Any, key: Key | None, index: int,
    *, given: Tensor | None = None, amax: Tensor | None = None,
) -> None:  # fmt: skip
    n, keys = x.numel(), _keys(key)
    arguments = (_at(x), _at(y), _u32(n), plan, *keys, _u32(index), _at(given), _at(amax))
    _launch("round", x, _waves(x, n), arguments)


def _groups(x: Tensor, y: Tensor, q: Quantizer, plan: Any, key: Key | None) -> None:
    columns = x.shape[-1]
    rows = x.numel() // columns
    height, width = q.tile
    amax = _at(_amax(x) if q.scale == "nvfp4" else None)
    shape = (_at(x), _at(y), _u32(rows), _u32(columns), plan, *_keys(key))
    across = -(-columns // (width or columns))
    if height == 1 and 0 < width <= _THREADS:
        step = 4 if columns % 4 == 0 == width % 4 and _in_fours(x, y) else 1
        lanes = min(32, 1 << max(width // step - 1, 0).bit_length())
        blocks = -(-rows * across * lanes // _THREADS)
        return _launch("blocks", x, blocks, (*shape, _u32(lanes), _u32(step), amax))
    bands = -(-rows // (height or rows))
    return _launch("tiles", x, bands * across, (*shape, amax))


def _in_fours(*tensors: Tensor) -> bool:
    return not any(t.data_ptr() % 16 for t in tensors)


def _amax(x: Tensor) -> Tensor:
    """Bits of max |x|, int32 []."""
    found = torch.zeros((), dtype=torch.int32, device=x.device)
    n = x.numel()
    _launch("amax", x, _waves(x, n), (_at(x), _u32(n), _at(found)))
    return found


@functools.cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.full((), value, device=device)


_u32 = ctypes.c_uint32
_UNUSED = (ctypes.c_uint32 * 12)()  # the size of a Quantizer


def _at(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _keys(key: Key | None) -> tuple[ctypes.c_uint32, ctypes.c_uint32]:
    return (_u32(key.k0), _u32(key.k1)) if key else (_u32(0), _u32(0))


@functools.cache
def _plan(fmt: Format, rounding: str, saturate: bool, *rest: Any) -> Any:
    """The struct Quantizer itself, passed by value."""
    return kernel.struct_at(kernel.plan(fmt, rounding, saturate, *rest))


def _waves(x: Tensor, n: int) -> int:
    return min(-(-n // _THREADS), _WAVES * _multiprocessors(x.get_device()))


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(name: str, x: Tensor, blocks: int, arguments: Sequence[Any]) -> None:
    device = x.get_device()
    pointers = (ctypes.c_void_p * len(arguments))(*map(ctypes.addressof, arguments))
    stream = ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)
    module = _module(device)
    grid = blocks, 1, 1, _THREADS, 1, 1, 0, stream
    with nullcontext() if device == torch.cuda.current_device() else torch.cuda.device(device):
        # Threads of autograd may not have touched CUDA yet.
        _check(_driver().cuCtxSetCurrent(module.context))
        _check(_driver().cuLaunchKernel(module.functions[name], *grid, pointers, None))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(code: int) -> None:
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, ctypes.byref(text))
        raise KernelError(
            f"CUDA refused a kernel: {(text.value or b'?').decode()} ({code}). "
            "HALFULP_KERNEL=torch does without."
        )


@dataclass(frozen=True)
class _Module:
    """The kernels, loaded on one GPU, and torch's context there."""

    context: ctypes.c_void_p
    functions: dict[str, ctypes.c_void_p]


@functools.cache
def _module(device: int) -> _Module:
    major, minor = torch.cuda.get_device_capability(device)
    image = _image(f"sm_{major}{minor}")
    context, module, found = ctypes.c_void_p(), ctypes.c_void_p(), {}
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context that the module is loaded in
        _check(_driver().cuCtxGetCurrent(ctypes.byref(context)))
        _check(_driver().cuModuleLoadData(ctypes.byref(module), image))
    for name in _FUNCTIONS:
        found[name] = ctypes.c_void_p()
        wanted = f"halfulp_{name}".encode()
        _check(_driver().cuModuleGetFunction(ctypes.byref(found[name]), module, wanted))
    return _Module(context, found)


def _image(architecture: str) -> bytes:
    """The compiled kernels, from the user's cache where they were made before."""
    files = {name: Path(__file__).with_name(name).read_bytes() for name in _FILES}
    facts = [*files.values(), architecture.encode(), str(torch.version.cuda).encode()]
    digest = hashlib.sha256(b"\0".join(facts)).hexdigest()[:16]
    target = kernel.cache_directory() / f"round-{architecture}-{digest}.cubin"
    if target.exists():
        return target.read_bytes()
    image = _compile(files, architecture)
    target.parent.mkdir(parents=True, exist_ok=True)
    waiting = target.with_name(f"{target.name}.{os.getpid()}")
    waiting.write_bytes(image)
    waiting.replace(target)
    return image


def _compile(files: dict[str, bytes], architecture: str) -> bytes:
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    headers = [name for name in files if name.endswith(".h")]
    texts = (ctypes.c_char_p * len(headers))(*(files[name] for name in headers))
    names = (ctypes.c_char_p * len(headers))(*(name.encode() for name in headers))
    nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), files["round.cu"], b"round.cu", len(headers), texts, names
    )
    options = [f"--gpu-architecture={architecture}".encode(), b"--fmad=false"]
    code = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 2)(*options))
    if code:
        log = _fetch(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
        raise KernelError(f"NVRTC failed: {log.decode(errors='replace')[:2000]}")
    return _fetch(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)


def _fetch(size_of: Any, get: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    size_of(program, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    get(program, buffer)
    return buffer.raw


def _nvrtc() -> ctypes.CDLL:
    major = str(torch.version.cuda).partition(".")[0]
    try:
        return ctypes.CDLL(f"libnvrtc.so.{major}")
    except OSError:
        return ctypes.CDLL("libnvrtc.so")
