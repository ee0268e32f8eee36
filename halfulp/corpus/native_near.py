"""What counts for sketches, in C where it can be built."""

import ctypes

import numpy as np

from halfulp.corpus import native
from halfulp.corpus.keys import BLOCK, MOST, Block
from halfulp.corpus.native import Job, described
from halfulp.corpus.near import Hits, NumpyNear, Task

_SEEN = 16384  # of ngrams.c


class NativeNear:
    """NumpyNear in C: the same bits."""

    block = 4 * BLOCK  # there is but one work array

    def __init__(self, task: Task, library: ctypes.CDLL) -> None:
        self._task = task
        self._library = library
        self._orders = np.asarray(task.orders, np.int64)
        self._sums = np.empty(self.block + MOST + 1, np.uint64)
        nothing = ~np.arange(_SEEN, dtype=np.uint64) << np.uint64(50)  # a key of another slot
        self._seen = np.tile(nothing, (len(task.orders), 1))
        self._hits = np.empty((2, 0), np.int64)

    def feed(self, block: Block, cuts: np.ndarray) -> Hits:
        """Raise the registers; the hits are the n-grams with h2 ≤ cuts [orders] uint64, cut > 0."""
        task = self._task
        if cuts.any() and not self._hits.size:
            self._hits = np.empty((2, len(task.orders) * self.block), np.int64)
        arrays = (task.registers, cuts, self._sums, self._seen, *self._hits)
        job = Job(
            *described(block, self._orders, task.apart),
            task.lg_k,
            *(array.ctypes.data for array in arrays),
        )
        count = self._library.halfulp_ngrams(ctypes.byref(job))
        rows, h2 = self._hits[:, :count].copy()
        return Hits(rows, h2.view(np.uint64))


def near(task: Task) -> NumpyNear | NativeNear:
    """The kernel in use. KernelError when HALFULP_KERNEL=c cannot be honored."""
    library, _ = native.status()
    return NumpyNear(task) if library is None else NativeNear(task, library)
