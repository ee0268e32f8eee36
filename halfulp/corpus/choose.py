"""The sequences of a block that belong to samples, given to them: the definition in NumPy.

Once a sample has met more than it keeps, few do: a key must lie below the sample's threshold. So
the questions in which document and in which unit it ends are for those alone.
"""

from dataclasses import dataclass

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.keys import BLOCK, MOST, Block, first_end, ngram_keys, prefix


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

    block = BLOCK  # tokens

    def __init__(self, choice: Choice) -> None:
        self._choice = choice
        self._work = np.empty((3, BLOCK + MOST + 1), np.uint64)

    def feed(self, block: Block, units: Units) -> None:
        """Add the block's sequences to their samples; marks ascend."""
        choice = self._choice
        sums = prefix(block, self._work[:2, : len(block.tokens) + 1])
        for n, sample in zip(choice.orders, choice.samples, strict=True):
            keys = ngram_keys(block, sums, n, out=self._work[2])
            chosen = sample.chosen(keys)
            ends = chosen + first_end(block, n)
            inside = block.inside(ends, n, apart=choice.apart)
            chosen, ends = chosen[inside], ends[inside]
            priorities = units.priorities[np.searchsorted(units.ends, ends, side="right")]
            sample.add(keys[chosen], priorities, (ends + units.place).astype(np.uint64))
