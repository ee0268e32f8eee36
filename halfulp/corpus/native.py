"""The C kernels of counting: built once per machine, chosen by HALFULP_KERNEL as the others."""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np

from halfulp.corpus.keys import Block
from halfulp.errors import KernelError
from halfulp.numerics.kernel import attempt, build


class Job(ctypes.Structure):
    """The struct Job of ngrams.c."""

    _fields_ = (
        ("tokens", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("width", "size", "context")),
        *((name, ctypes.c_void_p) for name in ("starts", "orders")),
        *((name, ctypes.c_int64) for name in ("documents", "rows", "apart", "lg_k")),
        *(
            (name, ctypes.c_void_p)
            for name in ("registers", "cuts", "sums", "seen", "hit_rows", "hits")
        ),
    )


def described(block: Block, orders: np.ndarray, apart: bool) -> tuple[int, ...]:
    """The first fields of a Job."""
    return (
        *(block.tokens.ctypes.data, block.tokens.itemsize, len(block.tokens), block.context),
        *(block.starts.ctypes.data, orders.ctypes.data),
        *(len(block.starts), len(orders), apart),
    )


@functools.cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """The C library, or None where NumPy counts; and why."""
    return attempt(_load)


def _load() -> ctypes.CDLL:
    if sys.byteorder != "little":
        raise KernelError("the C kernel of the counter is for little-endian machines")
    path = build(
        "ngrams", Path(__file__).parent, ("ngrams.c", "sample.c"), ("keys.c", "../numerics/round.h")
    )
    library = ctypes.CDLL(str(path))
    for name in ("halfulp_ngrams", "halfulp_choose", "halfulp_merge", "halfulp_prefix"):
        function = getattr(library, name)
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    return library
