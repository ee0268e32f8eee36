"""One pass over token documents, one HyperLogLog for every n."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from halfulp.corpus.hll import Hll
from halfulp.corpus.keys import MOST, NEW_DOCUMENT, Stream
from halfulp.corpus.native_near import near
from halfulp.corpus.near import Hits, Task
from halfulp.corpus.theta import Theta
from halfulp.errors import DataError


class Counter:
    """Distinct n-grams of a stream of documents, for several n at once; none crosses a document.

    `sketches` and `occurrences` by n; `tokens` and `documents` taken so far. `apart`: only
    n-grams that begin at a multiple of n in their document (windows). `samples` by n, each of at
    most 2^lg_capacity n-grams; empty without lg_capacity.
    """

    def __init__(
        self,
        orders: Sequence[int],
        *,
        lg_k: int = 14,
        apart: bool = False,
        lg_capacity: int | None = None,
    ) -> None:
        self.orders = _checked(orders)
        self.apart = apart
        self.sketches = {n: Hll(lg_k) for n in self.orders}
        self.occurrences = dict.fromkeys(self.orders, 0)
        self.lg_k = lg_k
        self._stream = Stream(self.orders[-1])
        registers = np.zeros((len(self.orders), 1 << lg_k), np.uint8)
        for row, n in enumerate(self.orders):
            self.sketches[n].registers = registers[row]
        sampled = self.orders if lg_capacity else ()
        self.samples = {n: Theta(lg_capacity or 0) for n in sampled}
        self._near = near(Task(self.orders, apart, lg_k, registers))

    @property
    def tokens(self) -> int:
        return self._stream.tokens

    @property
    def documents(self) -> int:
        return self._stream.documents

    def go_on(self, tokens: np.ndarray, begun: int) -> None:
        """Begin inside a document: its last tokens and how many there were, as in Stream."""
        self._stream.go_on(tokens, begun)

    def update(self, tokens: np.ndarray, starts: Sequence[int] | np.ndarray = NEW_DOCUMENT) -> None:
        """Count tokens [n] (any integers); `starts` are the positions where documents begin.

        Without `starts` the tokens are one document; with an empty one they go on with the
        document of the call before. Many short documents are best given in one call.
        """
        for block in self._stream.blocks(tokens, starts, size=self._near.block):
            counts = block.count(self.orders, apart=self.apart)
            for n, count in zip(self.orders, counts, strict=True):
                self.occurrences[n] += count
            cuts = [sample.cut for sample in self.samples.values()] or [0] * len(self.orders)
            self._sample(self._near.feed(block, np.array(cuts, np.uint64)))

    def merge(self, other: "Counter") -> None:
        """Take in all that `other` counted, as documents of their own.

        DataError for other orders, lg_k, `apart` or lg_capacity.
        """
        mine, theirs = ((c.orders, c.apart, len(c.samples)) for c in (self, other))
        if mine != theirs:
            raise DataError(
                f"counts of n = {list(other.orders)} cannot be merged into counts of "
                f"n = {list(self.orders)}. Count both with the same n."
            )
        for n, sketch in self.sketches.items():
            sketch.merge(other.sketches[n])
            self.occurrences[n] += other.occurrences[n]
        for n, sample in self.samples.items():
            sample.merge(other.samples[n])
        self._stream.tokens += other.tokens
        self._stream.documents += other.documents

    def _sample(self, hits: Hits) -> None:
        bounds = np.searchsorted(hits.rows, range(len(self.orders) + 1)) if self.samples else ()
        for sample, (low, high) in zip(self.samples.values(), pairwise(bounds), strict=True):
            sample.add(hits.h2[low:high])


def _checked(orders: Sequence[int]) -> tuple[int, ...]:
    found = tuple(sorted(set(orders)))
    if not found or found[0] < 1 or found[-1] > MOST:
        raise DataError(
            f"n is {', '.join(map(str, orders)) or 'not given'}; it must lie in 1 … {MOST}."
        )
    return found
