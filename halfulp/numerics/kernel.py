"""Which kernel rounds CPU tensors: the C library, built once per machine, or the torch definition.

`HALFULP_KERNEL=torch|c` chooses; unset, C is used where a compiler is found. Both give the same
bits. Traced graphs (torch.compile) and other devices always use the torch definition.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfulp.errors import KernelError
from halfulp.numerics.format import Format

_HEADERS, _SOURCES = ("round.h", "scale.h", "adamw.h"), ("round.c", "adamw.c", "count.c")
_FLAGS = (
    "-O3",
    "-std=gnu11",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-shared",
    "-fPIC",
)
_X86_FLAGS = ("-mprefer-vector-width=512",) if platform.machine() == "x86_64" else ()


@dataclass(frozen=True)
class KernelStatus:
    """`name` is "c" or "torch"; `reason` says why in one sentence."""

    name: str
    reason: str
    library: ctypes.CDLL | None = None
    parallel: ctypes.c_void_p | None = None


@functools.cache
def status() -> KernelStatus:
    """The kernel in use for eager CPU tensors.

    Raises KernelError when HALFULP_KERNEL=c cannot be honored or has an unknown value.
    """
    library, reason = attempt(_load)
    if library is None:
        return KernelStatus("torch", reason)
    parallel = _thread_pool()
    threads = "torch's thread pool" if parallel else "one thread (torch exports no thread pool)"
    return KernelStatus("c", f"{reason}, {threads}", library, parallel)


def attempt(load: Callable[[], ctypes.CDLL]) -> tuple[ctypes.CDLL | None, str]:
    """The library that `load` gives, or None where the definition without C serves; and why.

    Raises KernelError when HALFULP_KERNEL=c cannot be honored or has an unknown value.
    """
    asked = os.environ.get("HALFULP_KERNEL", "")
    if asked not in ("", "c", "torch"):
        raise KernelError(f"HALFULP_KERNEL={asked!r} is unknown. Use c, torch, or leave it unset.")
    if asked == "torch":
        return None, "HALFULP_KERNEL=torch asks for the torch definition"
    try:
        library = load()
    except (OSError, subprocess.SubprocessError, KernelError) as error:
        if asked == "c":
            raise KernelError(
                f"HALFULP_KERNEL=c was asked, but the C kernel cannot be built here: {error}. "
                "Install a C compiler (gcc or clang) or unset HALFULP_KERNEL: same bits, slower."
            ) from error
        return None, f"the C kernel cannot be built here ({error})"
    return library, f"C kernel at {library._name}"


def _load() -> ctypes.CDLL:
    library = ctypes.CDLL(str(build("round", Path(__file__).parent, _SOURCES, _HEADERS)))
    pointer, i32, i64 = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int64
    f32 = ctypes.c_float
    signatures = {
        "halfulp_round": (None, [pointer] * 3 + [i64, pointer, i32, i32, i32, pointer]),
        "halfulp_amax": (i32, [pointer] * 2 + [i64]),
        "halfulp_tensor": (None, [pointer] * 3 + [i64, pointer, i32, i32, i32]),
        "halfulp_tiles": (None, [pointer] * 3 + [i64, i64, pointer, i32, i32, i32]),
        "halfulp_adamw": (None, [pointer] * 5 + [i64, pointer, pointer] + [i32] * 5),
        "halfulp_accumulate": (None, [pointer] * 3 + [i64, pointer, i32]),
        "halfulp_count": (None, [pointer] * 3 + [i64, f32, f32, pointer]),
        "halfulp_beyond": (i64, [pointer] * 2 + [i64, i64, pointer, i32, f32]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def build(stem: str, folder: Path, sources: Sequence[str], headers: Sequence[str] = ()) -> Path:
    """Compile C files of `folder` into the user's cache unless the same text was compiled before.

    Raises KernelError without a compiler or when it fails; OSError or SubprocessError when it or
    the cache cannot be used.
    """
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    compiler = compiler or shutil.which("clang")
    if not compiler:
        raise KernelError("no C compiler: neither $CC nor cc, gcc or clang on the PATH")
    facts = (
        *((folder / name).read_text() for name in (*headers, *sources)),
        *_FLAGS,
        *_X86_FLAGS,
        compiler,
        platform.machine(),
        platform.libc_ver()[1],
    )
    digest = hashlib.sha256("\0".join(facts).encode()).hexdigest()[:16]
    target = cache_directory() / f"{stem}-{digest}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: several ranks may build at once.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        built = Path(scratch) / target.name
        paths = (str(folder / name) for name in sources)
        command = [*compiler.split(), *_FLAGS, *_X86_FLAGS, *paths, "-o", str(built), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        if result.returncode:
            raise KernelError(f"{compiler} failed: {result.stderr.strip()[-500:]}")
        os.replace(built, target)
    return target


class _Quantizer(ctypes.Structure):
    """The struct Quantizer of round.h."""

    _fields_ = (
        *((n, ctypes.c_int32) for n in ("mantissa_bits", "smallest_exponent", "kind", "rounding")),
        *((n, ctypes.c_float) for n in ("largest", "cap", "overflow")),
        *((n, ctypes.c_int32) for n in ("saturate", "scale", "margin", "rows", "columns")),
    )


_ROUNDING = {"nearest": 0, "stochastic": 1, "truncate": 2}
_OVERFLOW, _SATURATE, _WIDE, _WIDE_SATURATE = range(4)
SCALES = ("none", "given", "current", "p2", "e8m0_up", "e8m0_floor", "nvfp4")  # enum of round.h


@functools.cache
def plan(
    fmt: Format,
    rounding: str,
    saturate: bool,
    scale: str = "none",
    margin: int = 0,
    tile: tuple[int, int] = (0, 0),
) -> ctypes.c_void_p:
    """Pointer to the C description of a quantizer; made once and kept for the process's life."""
    saturate = saturate or fmt.overflow == "saturate"
    kinds = (_WIDE, _WIDE_SATURATE) if fmt.exponent_bits == 8 else (_OVERFLOW, _SATURATE)
    largest = fmt.largest
    struct = _Quantizer(
        fmt.mantissa_bits,
        fmt.smallest_exponent,
        kinds[saturate],
        _ROUNDING[rounding],
        largest,
        largest if saturate else 2.0 ** min(127, fmt.largest_exponent + 1),
        float("inf") if fmt.overflow == "inf" else float("nan"),
        saturate,
        SCALES.index(scale),
        margin,
        *tile,
    )
    _plans.append(struct)
    return ctypes.cast(ctypes.byref(struct), ctypes.c_void_p)


_plans: list[_Quantizer] = []


def struct_at(pointer: ctypes.c_void_p) -> ctypes.Structure:
    """The description that `plan` points to."""
    return _Quantizer.from_address(pointer.value or 0)


def cache_directory() -> Path:
    """Where halfulp keeps what it can make again: $HALFULP_CACHE, else the user's cache."""
    if own := os.environ.get("HALFULP_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "halfulp"


def _thread_pool() -> ctypes.c_void_p | None:
    import torch

    name = {"Darwin": "libtorch_cpu.dylib"}.get(platform.system(), "libtorch_cpu.so")
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / name))
        return ctypes.cast(library.torch_parallel_for, ctypes.c_void_p)
    except (OSError, AttributeError):
        return None


def floats(values: tuple[float, ...]) -> ctypes.Array:
    """A C array of fp32 numbers."""
    return (ctypes.c_float * len(values))(*values)
