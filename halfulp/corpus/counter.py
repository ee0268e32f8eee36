"""One pass over token documents, one HyperLogLog for every n."""

from collections.abc import Sequence

import numpy as np

from halfulp.corpus import murmur
from halfulp.corpus.hll import Hll
from halfulp.corpus.keys import (
    BASE,
    BLOCK,
    MOST,
    NEW_DOCUMENT,
    Block,
    Stream,
    first_end,
    powers,
    prefix,
)  # fmt: skip
from halfulp.errors import DataError


class Counter:
    """Distinct n-grams of a stream of documents, for several n at once; none crosses a document.

    `sketches` and `occurrences` by n; `tokens` and `documents` taken so far. `apart`: only
    n-grams that begin at a multiple of n in their document (windows).
    """

    def __init__(self, orders: Sequence[int], *, lg_k: int = 14, apart: bool = False) -> None:
        self.orders = _checked(orders)
        self.apart = apart
        self.sketches = {n: Hll(lg_k) for n in self.orders}
        self.occurrences = dict.fromkeys(self.orders, 0)
        self._stream = Stream(self.orders[-1])
        self._work = np.empty((3, BLOCK + MOST), np.uint64)

    @property
    def tokens(self) -> int:
        return self._stream.tokens

    @property
    def documents(self) -> int:
        return self._stream.documents

    def update(self, tokens: np.ndarray, starts: Sequence[int] | np.ndarray = NEW_DOCUMENT) -> None:
        """Count tokens [n] (any integers); `starts` are the positions where documents begin.

        Without `starts` the tokens are one document; with an empty one they go on with the
        document of the call before. Many short documents are best given in one call.
        """
        for block in self._stream.blocks(tokens, starts):
            sums = prefix(block)
            for n in self.orders:
                self.occurrences[n] += block.count(n, apart=self.apart)
                self._feed(block, sums, n)

    def merge(self, other: "Counter") -> None:
        """Take in all that `other` counted, as documents of their own.

        DataError for other orders, lg_k or `apart`.
        """
        if (self.orders, self.apart) != (other.orders, other.apart):
            raise DataError(
                f"counts of n = {list(other.orders)} cannot be merged into counts of "
                f"n = {list(self.orders)}. Count both with the same n."
            )
        for n, sketch in self.sketches.items():
            sketch.merge(other.sketches[n])
            self.occurrences[n] += other.occurrences[n]
        self._stream.tokens += other.tokens
        self._stream.documents += other.documents

    def _feed(self, block: Block, sums: np.ndarray, n: int) -> None:
        first, size = first_end(block, n), len(block.tokens)
        if first >= size:
            return
        h1, h2, scratch = self._work[:, : size - first]
        np.subtract(sums[first + 1 :], sums[first + 1 - n : size + 1 - n], out=h1)
        np.multiply(h1, _key_factors()[first:size], out=h1)
        murmur.finish(h1, h2, scratch)
        sketch = self.sketches[n]
        near = np.flatnonzero(h2 <= sketch.bound)
        near = near[block.inside(near + first, n, apart=self.apart)]
        sketch.insert(h1[near], h2[near])


def _key_factors() -> np.ndarray:
    """B^i · FIRST: an n-gram's key and the first step of its hash in one product."""
    return powers(BASE, BLOCK + MOST, int(murmur.FIRST))


def _checked(orders: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted(set(orders)))
    if not found or found[0] < 1 or found[-1] > MOST:
        raise DataError(
            f"n is {', '.join(map(str, orders)) or 'not given'}; it must lie in 1 … {MOST}."
        )
    return found
