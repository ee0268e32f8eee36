"""What belongs to samples, in C where it can be built."""

import ctypes

import numpy as np

from halfulp.corpus import native
from halfulp.corpus.adaptive import nothing_known
from halfulp.corpus.choose import Choice, NumpyChooser, Units
from halfulp.corpus.keys import BLOCK, MOST, Block
from halfulp.corpus.native import Job, described


class _Choice(ctypes.Structure):
    """The struct Choice of sample.c."""

    _fields_ = (
        ("job", Job),
        *((name, ctypes.c_void_p) for name in ("unit_ends", "priorities", "known")),
        *(("counts", ctypes.c_void_p), ("room", ctypes.c_int64)),
        *(("marks", ctypes.c_void_p), ("chosen_priorities", ctypes.c_void_p)),
        ("place", ctypes.c_int64),
    )


class NativeChooser:
    """NumpyChooser in C: samples that hold the same."""

    block = 5 * BLOCK  # tokens

    def __init__(self, choice: Choice, library: ctypes.CDLL) -> None:
        self._choice = choice
        self._library = library
        self._orders = np.asarray(choice.orders, np.int64)
        self._sums = np.empty(self.block + MOST + 1, np.uint64)
        room = (len(choice.orders), self.block)
        self._keys, self._marks = np.empty((2, *room), np.uint64)
        self._priorities = np.empty(room, np.uint32)
        self._counts = np.empty(len(choice.orders), np.int64)
        for sample in choice.samples:
            sample.known = nothing_known()

    def feed(self, block: Block, units: Units) -> None:
        """Add the block's sequences to their samples; marks ascend."""
        choice = self._choice
        cuts = np.array([sample.cut for sample in choice.samples], np.uint64)
        unit_ends = np.ascontiguousarray(units.ends, np.int64)
        priorities = np.ascontiguousarray(units.priorities, np.uint32)
        job = Job(
            *described(block, self._orders, choice.apart),
            *(0, None, cuts.ctypes.data, self._sums.ctypes.data),
            *(None, None, self._keys.ctypes.data),
        )
        known = np.array([(s.known.ctypes.data, len(s.known)) for s in choice.samples], np.uint64)
        made = _Choice(
            job,
            *(array.ctypes.data for array in (unit_ends, priorities, known, self._counts)),
            *(self.block, self._marks.ctypes.data, self._priorities.ctypes.data, units.place),
        )
        self._library.halfulp_choose(ctypes.byref(made))
        chosen = zip(choice.samples, self._counts.tolist(), strict=True)
        for row, (sample, count) in enumerate(chosen):
            if count:
                arrays = (self._keys, self._priorities, self._marks)
                sample.hold(*(array[row, :count] for array in arrays))


def chooser(choice: Choice) -> NumpyChooser | NativeChooser:
    """The kernel in use. KernelError when HALFULP_KERNEL=c cannot be honored."""
    library, _ = native.status()
    return NumpyChooser(choice) if library is None else NativeChooser(choice, library)
