"""The n-grams of a block that change a sketch or belong to a sample: the definition in NumPy.

Few do: an n-gram counts only if its hash is below what the lowest register holds already. So the
last steps of the hash, and the question whether it lies in one document, are for those alone.
"""

from dataclasses import dataclass

import numpy as np

from halfulp.corpus import murmur
from halfulp.corpus.hll import raise_registers, raises, slots_of
from halfulp.corpus.keys import BLOCK, MOST, Block, first_end, ngram_keys, prefix

LARGEST_HASH = (1 << 64) - 1
_MANY = LARGEST_HASH >> 1  # a bound from here on: half of all hashes
_LG_MET = 14
_SMALL = 2  # bytes: tokens of so many are few enough for a table of all of them


@dataclass(frozen=True)
class Hits:
    """N-grams with a low hash, each [hits]: `rows` index of n, ascending, `h2` uint64.

    One that occurs several times may be there once or several times.
    """

    rows: np.ndarray
    h2: np.ndarray


@dataclass(frozen=True)
class Task:
    """What to count: `orders` (each n), and `apart` as in Counter.

    `registers` [orders, 2^lg_k] are raised in place.
    """

    orders: tuple[int, ...]
    apart: bool
    lg_k: int
    registers: np.ndarray


class NumpyNear:
    """Feeds blocks to a task's registers; keeps the work arrays of one block."""

    block = 8 * BLOCK  # tokens

    def __init__(self, task: Task) -> None:
        self._task = task
        self._work = np.empty((4, self.block + MOST + 1), np.uint64)
        self._met: dict[int, np.ndarray] = {}
        self._seen = np.zeros(1 << 8 * _SMALL, bool)

    def feed(self, block: Block, cuts: np.ndarray) -> Hits:
        """Raise the registers; the hits are the n-grams with h2 ≤ cuts [orders] uint64, cut > 0."""
        sums = prefix(block, self._work[0], int(murmur.FIRST))
        hits = [self._row(block, sums, row, int(cut)) for row, cut in enumerate(cuts)]
        return Hits(np.repeat(np.arange(len(hits)), list(map(len, hits))), np.concatenate(hits))

    def _row(self, block: Block, sums: np.ndarray, row: int, cut: int) -> np.ndarray:
        """Raise the registers of one row; the h2 of its hits."""
        task, n, registers = self._task, self._task.orders[row], self._task.registers[row]
        ends, a, b = self._near(block, sums, n, max(LARGEST_HASH >> int(registers.min()), cut))
        h1, h2 = murmur.finished(a, b)
        slots = slots_of(h1, task.lg_k)
        wanted = raises(registers, slots, h2)
        if cut:
            wanted |= h2 <= np.uint64(cut)
        chosen = np.flatnonzero(wanted)
        chosen = chosen[block.inside(ends[chosen], n, apart=task.apart)]
        h2 = h2[chosen]
        raise_registers(registers, slots[chosen], h2)
        return h2[h2 <= np.uint64(cut)] if cut else h2[:0]

    def _near(
        self, block: Block, sums: np.ndarray, n: int, bound: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ends of all n-grams with h2 ≤ bound and some more, and what `halves` makes of them.

        Those that were met before are left out where most others would have to be looked at.
        """
        first = first_end(block, n)
        a, b, scratch = self._work[1:, : len(block.tokens) - first]
        ngram_keys(block, sums, n, out=a)
        small = n == 1 and block.tokens.itemsize <= _SMALL
        if bound < _MANY and not small:
            murmur.halves(a, b, scratch)
            near = murmur.at_most(a, b, bound, scratch)
            return near + first, a[near], b[near]
        fresh = self._unseen(block.tokens[first:]) if small else self._not_met(block, n, a, scratch)
        a = a[fresh]
        b, scratch = b[: len(a)], scratch[: len(a)]
        murmur.halves(a, b, scratch)
        return fresh + first, a, b

    def _unseen(self, tokens: np.ndarray) -> np.ndarray:
        """Positions of the tokens that were not there in a call before."""
        fresh = np.flatnonzero(~self._seen.take(tokens))
        self._seen[tokens[fresh]] = True
        return fresh

    def _not_met(self, block: Block, n: int, keys: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """Which n-grams in one document have a key that is not in the table; it is afterwards."""
        if n not in self._met:
            self._met[n] = ~np.arange(1 << _LG_MET, dtype=np.uint64) << np.uint64(64 - _LG_MET)
        slots = np.right_shift(keys, np.uint64(64 - _LG_MET), out=scratch).view(np.int64)
        fresh = np.flatnonzero(self._met[n].take(slots) != keys)
        inside = block.inside(fresh + first_end(block, n), n, apart=self._task.apart)
        fresh = fresh[inside]
        self._met[n][slots[fresh]] = keys[fresh]
        return fresh
