"""The sequences of a block that belong to samples, given to them: the definition in NumPy.

Once a sample has met more than it keeps, few do: a key must lie below the sample's threshold. So
the questions in which document and in which unit it ends are for those alone.
"""

from dataclasses import dataclass

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.keys import BLOCK, MOST, Block, first_end, ngram_keys, prefix

_SLOTS = 1 << 16


@dataclass(frozen=True)
class Units:
    """The units that a block's fresh symbols lie in.

    `ends` [units]: positions in the block up to which they reach. `priorities` [units] uint32.
    `place`: what the sample's mark of position 0 is.
    """

    ends: np.ndarray
    priorities: np.ndarray
    place: int


@dataclass(frozen=True)
class Choice:
    """What is sampled: a sample for each of `orders`, and `apart` as in Family."""

    orders: tuple[int, ...]
    samples: tuple[Sample, ...]
    apart: bool


class NumpyChooser:
    """Gives blocks to the samples; keeps the work arrays of one block."""

    block = 17 * BLOCK  # tokens: those of a batch

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._slots = np.empty(_SLOTS, np.int32)
        self._sums, self._keys = np.empty((2, self.block + MOST + 1), np.uint64)

    def feed(self, block: Block, units: Units) -> None:
        """Add the block's sequences to their samples; marks ascend."""
        choice, size = self._choice, len(block.tokens)
        of_unit = np.repeat(units.priorities, np.diff(np.minimum(units.ends, size), prepend=0))
        sums = prefix(block, self._sums)
        for n, sample in zip(choice.orders, choice.samples, strict=True):
            first = first_end(block, n)
            keys = ngram_keys(block, sums, n, out=self._keys)
            chosen = sample.wanted(keys, of_unit[first:])
            chosen = chosen[block.inside(chosen + first, n, apart=choice.apart)]
            keys, ends = keys[chosen], chosen + first
            priorities = of_unit[ends]
            fresh = np.flatnonzero(~self._repeated(keys, priorities))
            marks = (ends[fresh] + units.place).view(np.uint64)
            sample.hold(keys[fresh], priorities[fresh], marks)

    def _repeated(self, keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
        """Mask of pairs that were there before, as far as a small table shows."""
        slots = (keys & np.uint64(_SLOTS - 1)).view(np.int64)
        self._slots[slots[::-1]] = np.arange(len(keys) - 1, -1, -1)
        before = self._slots[slots]  # the first one in the slot
        repeated = (keys[before] == keys) & (priorities[before] == priorities)
        return repeated & (before != np.arange(len(keys)))
