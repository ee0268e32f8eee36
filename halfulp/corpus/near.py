"""The n-grams of a block that change a sketch or belong to a sample: the definition in NumPy.

Few do: an n-gram counts only if its hash is below what the lowest register holds already. So the
last steps of the hash, and the question whether it lies in one document, are for those alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from halfulp.corpus import murmur
from halfulp.corpus.hll import raise_registers, raises, slots_of
from halfulp.corpus.keys import BLOCK, MOST, Block, first_end, ngram_keys, prefix

LARGEST_HASH = (1 << 64) - 1
_MANY = LARGEST_HASH >> 1  # a bound from here on: half of all hashes
_LG_MET = 14
_TOGETHER = 1 << 13  # hashes looked at at once: for more, the system would give memory every time


class Found(NamedTuple):
    """N-grams of one row: their `ends`, and hashes but for the last steps, each [found]."""

    row: int
    ends: np.ndarray
    a: np.ndarray
    b: np.ndarray


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

    block = BLOCK  # tokens

    def __init__(self, task: Task) -> None:
        self._task = task
        self._work = np.empty((4, BLOCK + MOST + 1), np.uint64)
        self._met: dict[int, np.ndarray] = {}

    def feed(self, block: Block, cuts: np.ndarray) -> Hits:
        """Raise the registers; the hits are the n-grams with h2 ≤ cuts [orders] uint64, cut > 0."""
        task = self._task
        sums = prefix(block, self._work[0], int(murmur.FIRST))
        least = task.registers.min(axis=1).tolist()
        bounds = [max(LARGEST_HASH >> low, int(cut)) for low, cut in zip(least, cuts, strict=True)]
        hits, held, waiting = [], [], 0
        for row, bound in enumerate(bounds):
            for found in _cut(self._near(block, sums, row, bound)):
                held.append(found)
                waiting += len(found.ends)
                if waiting >= _TOGETHER // 2:
                    hits.append(self._raise(block, cuts, held))
                    held, waiting = [], 0
        if held:
            hits.append(self._raise(block, cuts, held))
        return Hits(*map(np.concatenate, zip(*hits, strict=True)))

    def _raise(
        self, block: Block, cuts: np.ndarray, found: Sequence[Found]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raise the registers by what `_near` found in some rows; the rows and h2 of the hits."""
        task = self._task
        ends, a, b = (np.concatenate(parts) for parts in zip(*(f[1:] for f in found), strict=True))
        rows = np.repeat([f.row for f in found], [len(f.ends) for f in found])
        h1, h2 = murmur.finished(a, b)
        slots = slots_of(h1, task.lg_k) + (rows << task.lg_k)
        registers = task.registers.reshape(-1)
        wanted = raises(registers, slots, h2)
        if cuts.any():
            wanted |= (h2 <= cuts[rows]) & (cuts[rows] > 0)
        chosen = np.flatnonzero(wanted)
        orders = np.asarray(task.orders)[rows[chosen]]
        chosen = chosen[block.inside(ends[chosen], orders, apart=task.apart)]
        rows, h2 = rows[chosen], h2[chosen]
        raise_registers(registers, slots[chosen], h2)
        hit = (h2 <= cuts[rows]) & (cuts[rows] > 0)
        return rows[hit], h2[hit]

    def _near(self, block: Block, sums: np.ndarray, row: int, bound: int) -> Found:
        """All n-grams with h2 ≤ bound and some more.

        Those that were met lately are left out where most others would have to be looked at.
        """
        n = self._task.orders[row]
        first = first_end(block, n)
        a, b, scratch = self._work[1:, : len(block.tokens) - first]
        ngram_keys(block, sums, n, out=a)
        if bound < _MANY:
            murmur.halves(a, b, scratch)
            near = murmur.at_most(a, b, bound, scratch)
            return Found(row, near + first, a[near], b[near])
        ends = self._not_met(block, n, a, scratch)
        a = a[ends - first]
        b, scratch = b[: len(a)], scratch[: len(a)]
        murmur.halves(a, b, scratch)
        return Found(row, ends, a, b.copy())

    def _not_met(self, block: Block, n: int, keys: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """Ends of the n-grams in one document whose key is not in the table; it is afterwards."""
        if n not in self._met:
            self._met[n] = ~np.arange(1 << _LG_MET, dtype=np.uint64) << np.uint64(64 - _LG_MET)
        slots = np.right_shift(keys, np.uint64(64 - _LG_MET), out=scratch).view(np.int64)
        fresh = np.flatnonzero(self._met[n].take(slots) != keys)
        ends = fresh + first_end(block, n)
        inside = block.inside(ends, n, apart=self._task.apart)
        self._met[n][slots[fresh[inside]]] = keys[fresh[inside]]
        return ends[inside]


def _cut(found: Found) -> Iterator[Found]:
    """The same in pieces of at most _TOGETHER; one without n-grams if there are none."""
    for at in range(0, max(1, len(found.ends)), _TOGETHER):
        yield Found(found.row, *(part[at : at + _TOGETHER] for part in found[1:]))
