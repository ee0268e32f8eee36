"""The C kernel of the counter: built once per machine, chosen by HALFULP_KERNEL as the others."""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np

from halfulp.corpus.keys import BLOCK, MOST, Block
from halfulp.corpus.near import Hits, NumpyNear, Task
from halfulp.errors import KernelError
from halfulp.numerics.kernel import attempt, build

_SEEN = 16384  # of ngrams.c


class _Job(ctypes.Structure):
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


class NativeNear:
    """NumpyNear in C: the same bits."""

    block = 4 * BLOCK  # there is but one work array

    def __init__(self, task: Task, library: ctypes.CDLL) -> None:
        self._task = task
        self._library = library
        self._orders = np.asarray(task.orders, np.int64)
        self._sums = np.empty(self.block + MOST + 1, np.uint64)
        self._seen = np.empty(0, np.uint64)
        self._hits = np.empty((2, 0), np.int64)

    def feed(self, block: Block, cuts: np.ndarray) -> Hits:
        """Raise the registers; the hits are the n-grams with h2 ≤ cuts [orders] uint64, cut > 0."""
        task = self._task
        if cuts.any() and not self._hits.size:
            self._hits = np.empty((2, len(task.orders) * self.block), np.int64)
            self._seen = np.zeros((len(task.orders), _SEEN), np.uint64)
        arrays = (task.registers, cuts, self._sums, self._seen, *self._hits)
        job = _Job(
            block.tokens.ctypes.data,
            *(block.tokens.itemsize, len(block.tokens), block.context),
            *(block.starts.ctypes.data, self._orders.ctypes.data),
            *(len(block.starts), len(task.orders), task.apart, task.lg_k),
            *(array.ctypes.data for array in arrays),
        )
        count = self._library.halfulp_ngrams(ctypes.byref(job))
        rows, h2 = self._hits[:, :count].copy()
        return Hits(rows, h2.view(np.uint64))


def near(task: Task) -> NumpyNear | NativeNear:
    """The kernel in use. KernelError when HALFULP_KERNEL=c cannot be honored."""
    library, _ = status()
    return NumpyNear(task) if library is None else NativeNear(task, library)


@functools.cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """The C library, or None where NumPy counts; and why."""
    return attempt(_load)


def _load() -> ctypes.CDLL:
    if sys.byteorder != "little":
        raise KernelError("the C kernel of the counter is for little-endian machines")
    path = build("ngrams", Path(__file__).parent, ("ngrams.c",), ("../numerics/round.h",))
    library = ctypes.CDLL(str(path))
    library.halfulp_ngrams.restype = ctypes.c_int64
    library.halfulp_ngrams.argtypes = [ctypes.c_void_p]
    return library
