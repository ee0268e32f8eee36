"""The sequences of a block that belong to samples, given to them: the definition in NumPy.

Once a sample has met more than it keeps, few do: a key must lie below the sample's threshold. So
the questions in which document and in which unit it ends are for those alone.
"""

from dataclasses import dataclass

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.keys import BLOCK, MOST, Block, first_end, ngram_keys, prefix

_SLOTS = 1 << 13


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

    block = 4 * BLOCK  # tokens

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._slots = np.empty(_SLOTS, np.int64)
        self._work = np.empty((3, self.block + MOST + 1), np.uint64)

    def feed(self, block: Block, units: Units) -> None:
        """Add the block's sequences to their samples; marks ascend."""
        choice = self._choice
        lengths = np.diff(np.minimum(units.ends, len(block.tokens)), prepend=0)
        of_unit = np.repeat(units.priorities, lengths)
        sums = prefix(block, self._work[:2, : len(block.tokens) + 1])
        for n, sample in zip(choice.orders, choice.samples, strict=True):
            keys = ngram_keys(block, sums, n, out=self._work[2])
            chosen = sample.chosen(keys)
            ends = chosen + first_end(block, n)
            inside = block.inside(ends, n, apart=choice.apart)
            chosen, ends = chosen[inside], ends[inside]
            keys, priorities = keys[chosen], of_unit[ends]
            first = np.flatnonzero(~self._repeated(keys, priorities))
            marks = (ends[first] + units.place).view(np.uint64)
            sample.add(keys[first], priorities[first], marks)

    def _repeated(self, keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
        """Mask of pairs that were there before, as far as a small table shows."""
        slots = (keys & np.uint64(_SLOTS - 1)).view(np.int64)
        self._slots[slots[::-1]] = np.arange(len(keys) - 1, -1, -1)
        before = self._slots[slots]  # the first one in the slot
        repeated = (keys[before] == keys) & (priorities[before] == priorities)
        return repeated & (before != np.arange(len(keys)))
