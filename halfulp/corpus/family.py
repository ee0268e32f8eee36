"""Sequences of several lengths over one stream of words or tokens; none crosses a document."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.choose import Choice, Units
from halfulp.corpus.keys import Stream
from halfulp.corpus.native_choose import chooser
from halfulp.corpus.tally import PLACE_BITS, Tally, cells_of


class Symbols(NamedTuple):
    """Words or tokens [n] of some units.

    `starts`: positions where documents begin. `cuts`, `priorities` [units]: how many symbols there
    are up to the end of each unit, and its priority.
    """

    symbols: np.ndarray
    starts: np.ndarray
    cuts: np.ndarray
    priorities: np.ndarray


class Family:
    """Tallies of the sequences of each length; `apart`: only those at multiples of it."""

    def __init__(self, samples: Mapping[int, Sample], *, shard: int, apart: bool) -> None:
        self.tallies = {n: Tally(sample) for n, sample in samples.items()}
        self._stream = Stream(max(samples))
        self._apart = apart
        self._shard = shard << PLACE_BITS
        self._open = 0  # symbols of the open document so far
        self._chooser = chooser(Choice(tuple(samples), tuple(samples.values()), apart))

    def go_on(self, symbols: np.ndarray, begun: int) -> None:
        """Begin inside a document: its last symbols and how many there were, as in Stream."""
        self._stream.go_on(symbols, begun)
        self._open = begun

    def feed(self, batch: Symbols) -> None:
        """Count the sequences that end in these symbols."""
        place = self._shard + self._stream.tokens
        self._count(batch)
        at = 0
        for block in self._stream.blocks(batch.symbols, batch.starts, size=self._chooser.block):
            first = int(np.searchsorted(batch.cuts, at, side="right"))
            zero = at - block.context  # where the block's position 0 is in the batch
            units = Units(batch.cuts[first:] - zero, batch.priorities[first:], place + zero)
            self._chooser.feed(block, units)
            at += len(block.tokens) - block.context

    def _count(self, batch: Symbols) -> None:
        """Occurrences of each length in each unit, from the lengths of units and documents."""
        documents = np.concatenate([[-self._open], batch.starts])
        begins = np.concatenate([[0], batch.cuts[:-1]])
        document = documents[np.searchsorted(batch.starts, begins, side="right")]
        before, after = begins - document, batch.cuts - document
        cells = cells_of(batch.priorities)
        for n, tally in self.tallies.items():
            if self._apart:
                found = after // n - before // n
            else:
                found = np.maximum(after - n + 1, 0) - np.maximum(before - n + 1, 0)
            tally.count(found, cells)
        self._open = len(batch.symbols) - int(documents[-1])
