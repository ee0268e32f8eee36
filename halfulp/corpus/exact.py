"""Exact numbers of distinct keys: sorted in memory, with a refusal instead of swapping."""

from collections.abc import Sequence

import numpy as np

from halfulp.corpus.keys import BLOCK, MOST, NEW_DOCUMENT, Stream, first_end, ngram_keys, prefix
from halfulp.errors import DataError

KEY_BYTES = 8
_SPACE = 2  # places for each distinct key: sorted ones, and as many that wait to be sorted in
_LEAST = 1 << 19
_STRETCH = 1 << 16


class KeySet:
    """Distinct 64-bit keys, exactly: 16 bytes of memory for each, within `budget_bytes`."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._places = np.empty(0, np.uint64)
        self._kept = 0  # places[:kept] ascend, each key once
        self._used = 0

    def add(self, keys: np.ndarray) -> None:
        """Add keys [n] uint64. DataError when they outgrow the budget."""
        if self._used + len(keys) > len(self._places):
            self._make_room(len(keys))
        self._places[self._used : self._used + len(keys)] = keys
        self._used += len(keys)

    def merge(self, other: "KeySet") -> None:
        """Add all keys of `other`."""
        self.add(other.keys())

    def keys(self) -> np.ndarray:
        """All distinct keys, ascending; a view that the next `add` changes."""
        self._sort()
        return self._places[: self._kept]

    def __len__(self) -> int:
        return len(self.keys())

    def _make_room(self, count: int) -> None:
        self._sort()
        needed = self._kept + max(count, self._kept // (2 * _SPACE))
        if needed > self.budget_bytes // KEY_BYTES:
            raise DataError(
                f"exact counting needs more than {needed * KEY_BYTES:,} bytes here and may use "
                f"{self.budget_bytes:,}. Count with a sketch, or allow more memory."
            )
        if len(self._places) < _SPACE * self._kept + count:
            room = max(_LEAST, _SPACE * (self._kept + count))
            grown = np.empty(min(room, self.budget_bytes // KEY_BYTES), np.uint64)
            grown[: self._kept] = self._places[: self._kept]
            self._places = grown

    def _sort(self) -> None:
        """All used places in order, and each key once: no second array.

        Not np.unique, which hashes 64-bit integers and is 40 times as slow as a sort.
        """
        if self._used == self._kept:
            return
        used, kept = self._places[: self._used], 0
        used.sort()
        for at in range(0, len(used), _STRETCH):
            part = used[at : at + _STRETCH]
            differs = part[1:] != part[:-1]
            first = at == 0 or part[0] != used[kept - 1]
            part = part[np.append(first, differs)]
            used[kept : kept + len(part)] = part
            kept += len(part)
        self._kept = self._used = kept


class Exact:
    """Counter's exact twin: distinct n-grams for several n, none across documents."""

    def __init__(self, orders: Sequence[int], *, budget_bytes: int, apart: bool = False) -> None:
        self.orders = tuple(sorted(set(orders)))
        self.apart = apart
        self._sets = {n: KeySet(budget_bytes // len(self.orders)) for n in self.orders}
        self._stream = Stream(self.orders[-1])
        self._work = np.empty((2, BLOCK + MOST + 1), np.uint64)

    def update(self, tokens: np.ndarray, starts: Sequence[int] | np.ndarray = NEW_DOCUMENT) -> None:
        """As Counter.update. DataError when the keys outgrow the budget."""
        for block in self._stream.blocks(tokens, starts):
            sums = prefix(block, self._work[0])
            for n, keys in self._sets.items():
                ends = np.arange(first_end(block, n), len(block.tokens))
                inside = block.inside(ends, n, apart=self.apart)
                keys.add(ngram_keys(block, sums, n, out=self._work[1])[inside])

    def merge(self, other: "Exact") -> None:
        """Take in all that `other` counted. DataError for other orders or `apart`."""
        if (self.orders, self.apart) != (other.orders, other.apart):
            raise DataError("exact counts of unlike n cannot be merged. Count both with the same.")
        for n, keys in self._sets.items():
            keys.merge(other._sets[n])

    def keys(self, n: int) -> np.ndarray:
        """The distinct keys of all n-grams, ascending, uint64."""
        return self._sets[n].keys()

    @property
    def distinct(self) -> dict[int, int]:
        """Number of distinct n-grams by n."""
        return {n: len(keys) for n, keys in self._sets.items()}
