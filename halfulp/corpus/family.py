"""Sequences of several lengths over one stream of words or tokens; none crosses a document."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.keys import BLOCK, MOST, Block, Stream, first_end, ngram_keys, prefix
from halfulp.corpus.tally import PLACE_BITS, Tally


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

    def __init__(self, lengths: Sequence[int], *, limit: int, shard: int, apart: bool) -> None:
        self.tallies = {n: Tally(Sample(limit)) for n in lengths}
        self._stream = Stream(max(lengths))
        self._apart = apart
        self._shard = shard << PLACE_BITS
        self._open = 0  # symbols of the open document so far
        self._work = np.empty((3, BLOCK + MOST + 1), np.uint64)

    def feed(self, batch: Symbols) -> None:
        """Count the sequences that end in these symbols."""
        place = self._shard + self._stream.tokens
        self._count(batch)
        at = 0
        for block in self._stream.blocks(batch.symbols, batch.starts):
            sums = prefix(block, self._work[:2, : len(block.tokens) + 1])
            for n, tally in self.tallies.items():
                keys = ngram_keys(block, sums, n, out=self._work[2])
                self._sample(tally, n, block, keys, at, batch, place)
            at += len(block.tokens) - block.context

    def _sample(
        self,
        tally: Tally,
        n: int,
        block: Block,
        keys: np.ndarray,
        at: int,
        batch: Symbols,
        place: int,
    ) -> None:
        """`at`: where the block's fresh symbols begin in the batch; `place`: where that begins."""
        chosen = tally.sample.chosen(keys)
        ends = chosen + first_end(block, n)
        inside = block.inside(ends, n, apart=self._apart)
        chosen, ends = chosen[inside], ends[inside]
        ends += at - block.context
        units = np.searchsorted(batch.cuts, ends, side="right")
        places = (place + ends).astype(np.uint64)
        tally.sample.add(keys[chosen], batch.priorities[units], places)

    def _count(self, batch: Symbols) -> None:
        """Occurrences of each length in each unit, from the lengths of units and documents."""
        documents = np.concatenate([[-self._open], batch.starts])
        begins = np.concatenate([[0], batch.cuts[:-1]])
        document = documents[np.searchsorted(batch.starts, begins, side="right")]
        before, after = begins - document, batch.cuts - document
        for n, tally in self.tallies.items():
            if self._apart:
                found = after // n - before // n
            else:
                found = np.maximum(after - n + 1, 0) - np.maximum(before - n + 1, 0)
            tally.count(found, batch.priorities)
        self._open = len(batch.symbols) - int(documents[-1])
