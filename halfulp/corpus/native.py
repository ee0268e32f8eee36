"""The C kernels of counting: built once per machine, chosen by HALFULP_KERNEL as the others."""

import ctypes
import functools
import sys
from pathlib import Path

import numpy as np

from halfulp.corpus.adaptive import KNOWN, SLOTS
from halfulp.corpus.choose import Choice, NumpyChooser, Units
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


class _Choice(ctypes.Structure):
    """The struct Choice of ngrams.c."""

    _fields_ = (
        ("job", _Job),
        *((name, ctypes.c_void_p) for name in ("unit_ends", "priorities", "known")),
        ("slots", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("counts", "ends", "chosen_priorities")),
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
            *_described(block, self._orders, task.apart),
            task.lg_k,
            *(array.ctypes.data for array in arrays),
        )
        count = self._library.halfulp_ngrams(ctypes.byref(job))
        rows, h2 = self._hits[:, :count].copy()
        return Hits(rows, h2.view(np.uint64))


class NativeChooser:
    """NumpyChooser in C: samples that hold the same."""

    def __init__(self, choice: Choice, library: ctypes.CDLL) -> None:
        self._choice = choice
        self._library = library
        self._orders = np.asarray(choice.orders, np.int64)
        self._sums = np.empty(BLOCK + MOST + 1, np.uint64)
        self._keys, self._ends = np.empty((2, len(choice.orders) * BLOCK), np.int64)
        self._priorities = np.empty(len(self._keys), np.uint32)
        self._counts = np.empty(len(choice.orders), np.int64)
        for sample in choice.samples:
            sample.known = np.empty(SLOTS, KNOWN)
            sample.forget()
        self._known = np.array([s.known.ctypes.data for s in choice.samples], np.uintp)

    def feed(self, block: Block, units: Units) -> None:
        """Add the block's sequences to their samples; marks ascend."""
        choice = self._choice
        cuts = np.array([sample.cut for sample in choice.samples], np.uint64)
        unit_ends = np.ascontiguousarray(units.ends, np.int64)
        priorities = np.ascontiguousarray(units.priorities, np.uint32)
        job = _Job(
            *_described(block, self._orders, choice.apart),
            *(0, None, cuts.ctypes.data, self._sums.ctypes.data),
            *(None, None, self._keys.ctypes.data),
        )
        before = (unit_ends, priorities, self._known)
        after = (self._counts, self._ends, self._priorities)
        made = _Choice(
            job, *(x.ctypes.data for x in before), SLOTS, *(x.ctypes.data for x in after)
        )
        self._library.halfulp_choose(ctypes.byref(made))
        at = 0
        for sample, count in zip(choice.samples, self._counts.tolist(), strict=True):
            part = slice(at, at + count)
            at += count
            if count:
                marks = (self._ends[part] + units.place).view(np.uint64)
                sample.hold(self._keys[part].view(np.uint64), self._priorities[part], marks)


def _described(block: Block, orders: np.ndarray, apart: bool) -> tuple[int, ...]:
    """The first fields of a _Job."""
    return (
        *(block.tokens.ctypes.data, block.tokens.itemsize, len(block.tokens), block.context),
        *(block.starts.ctypes.data, orders.ctypes.data),
        *(len(block.starts), len(orders), apart),
    )


def chooser(choice: Choice) -> NumpyChooser | NativeChooser:
    """The kernel in use. KernelError when HALFULP_KERNEL=c cannot be honored."""
    library, _ = status()
    return NumpyChooser(choice) if library is None else NativeChooser(choice, library)


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
    library.halfulp_choose.restype = None
    library.halfulp_choose.argtypes = [ctypes.c_void_p]
    return library
