"""Keys and the units that hold them: two sets of such pairs into one."""

import ctypes
from dataclasses import dataclass

import numpy as np

from halfulp.corpus import native

MOST_UNITS = 13  # remembered of each key: f_1 … f_12 need to know whether there are more than 12
_32 = np.uint64(32)
_NO_MARK = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Pairs:
    """Sorted: each key once for each of its units, the MOST_UNITS smallest priorities at most.

    `keys` uint64, `priorities` uint32 [pairs]; `starts` int64, where each key begins, and `least`
    uint64, its smallest mark, [distinct keys].
    """

    keys: np.ndarray
    priorities: np.ndarray
    starts: np.ndarray
    least: np.ndarray

    @property
    def distinct(self) -> np.ndarray:
        """Each key once."""
        return self.keys[self.starts]

    def first(self, count: int) -> "Pairs":
        """The pairs of the `count` smallest keys."""
        if count == len(self.starts):
            return self
        stop = self.starts[count]
        kept = self.keys[:stop], self.priorities[:stop], self.starts[:count], self.least[:count]
        return Pairs(*(part.copy() for part in kept))


def no_pairs() -> Pairs:
    """None of them."""
    return Pairs(*(np.empty(0, dtype) for dtype in (np.uint64, np.uint32, np.int64, np.uint64)))


def merged(pairs: Pairs, keys: np.ndarray, priorities: np.ndarray, marks: np.ndarray) -> Pairs:
    """`pairs` and other ones [n] in any order, with a mark for each."""
    if not len(keys):
        return pairs
    library, _ = native.status()
    if library is None:
        return _merged(pairs, keys, priorities, marks)
    room = len(pairs.keys) + len(keys)
    types = np.uint64, np.uint32, np.uint64, np.int64
    found = tuple(np.empty(room, dtype) for dtype in types)
    order = ascending(keys)
    before = (pairs.keys, pairs.priorities, pairs.least)
    job = _Merge(
        *(part.ctypes.data for part in before),
        len(pairs.keys),
        *(part.ctypes.data for part in (keys, priorities, marks, order)),
        len(keys),
        *(part.ctypes.data for part in found),
    )
    count = library.halfulp_merge(ctypes.byref(job))
    all_keys, all_priorities, least, starts = found
    parts = (all_keys[:count], all_priorities[:count], starts[: job.distinct])
    return Pairs(*(part.copy() for part in (*parts, least[: job.distinct])))


def ascending(keys: np.ndarray) -> np.ndarray:
    """Positions [n] int64 that put uint64 keys in order."""
    room = np.uint64(len(keys).bit_length())
    # Numbers sort several times faster than positions, so the positions are their last bits.
    order = np.sort(keys >> room << room | np.arange(len(keys), dtype=np.uint64))
    order = (order & np.uint64((1 << int(room)) - 1)).view(np.int64)
    there = keys[order]
    return order if (there[1:] >= there[:-1]).all() else np.argsort(keys)


def key_starts(keys: np.ndarray) -> np.ndarray:
    """Where each distinct key begins in sorted `keys`."""
    return np.flatnonzero(np.concatenate([[len(keys) > 0], keys[1:] != keys[:-1]])[: len(keys)])


class _Merge(ctypes.Structure):
    """The struct Merge of sample.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("keys", "priorities", "least")),
        ("pairs", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("new_keys", "new_priorities", "new_marks", "order")),
        ("added", ctypes.c_int64),
        *(
            (name, ctypes.c_void_p)
            for name in ("all_keys", "all_priorities", "all_least", "starts")
        ),
        ("distinct", ctypes.c_int64),
    )


def _merged(pairs: Pairs, keys: np.ndarray, priorities: np.ndarray, marks: np.ndarray) -> Pairs:
    """`merged` in NumPy, the definition. A stable sort of two ascending runs is one merge."""
    order = ascending(keys)
    keys = keys[order]
    starts = key_starts(keys)
    before, added = pairs.distinct, keys[starts]
    distinct = np.sort(np.concatenate((before, added)), kind="stable")
    distinct = distinct[key_starts(distinct)]
    old, new = np.searchsorted(distinct, before), np.searchsorted(distinct, added)
    least = np.full(len(distinct), _NO_MARK)
    least[old] = pairs.least
    least[new] = np.minimum(least[new], np.minimum.reduceat(marks[order], starts))
    ranked = _ranked(old, pairs.starts, pairs.priorities)
    also = np.sort(_ranked(new, starts, priorities[order]))
    both = np.sort(np.concatenate((ranked, also)), kind="stable")
    both = both[np.append(True, both[1:] != both[:-1])]
    ranks = (both >> _32).view(np.int64)
    near = np.ones(len(both), bool)
    near[MOST_UNITS:] = ranks[MOST_UNITS:] != ranks[:-MOST_UNITS]
    ranks, priorities = ranks[near], both[near].astype(np.uint32)
    return Pairs(distinct[ranks], priorities, key_starts(ranks), least)


def _ranked(ranks: np.ndarray, starts: np.ndarray, priorities: np.ndarray) -> np.ndarray:
    """rank << 32 | priority of each pair, from the rank of each distinct key."""
    counts = np.diff(starts, append=len(priorities))
    return np.repeat(ranks.view(np.uint64) << _32, counts) | priorities
