"""Which keys occur in which units of a corpus: exact while it fits, else an adaptive sample.

Adaptive sampling (Wegman; Flajolet 1990, Computing 43): keep the keys below a threshold that is
halved whenever they become too many. Keys are uniform 64-bit hashes, so that the kept ones are a
random share of the distinct ones, whatever the order and however the corpus was sharded.
"""

import math
from dataclasses import dataclass, field

import numpy as np

MOST_UNITS = 13  # remembered of each key: f_1 … f_12 need to know whether there are more than 12
_WAITING = 1 << 16  # occurrences that wait for the next sort, at least
_SLOTS = 1 << 15
_LAST = np.uint32(2**32 - 1)
_NO_MARK = np.uint64(2**64 - 1)


@dataclass
class Sample:
    """At most `limit` distinct keys, each with the smallest priorities of the units that hold it.

    `keys`, `priorities` [pairs], sorted: a key stands once for each of its units, at most
    MOST_UNITS times, those of the smallest priorities. `least` [distinct keys]: the smallest mark.
    A key is kept when it is below 2^(64 − shift). Call `settle` before reading.
    """

    limit: int
    shift: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    priorities: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    least: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def __post_init__(self) -> None:
        self._waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._count = 0
        self._full_keys = np.zeros(0, np.uint64)
        self._full_bounds = np.zeros(0, np.uint32)

    def chosen(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys that are below the threshold."""
        if not self.shift:
            return np.arange(len(keys))
        return np.flatnonzero(keys < np.uint64(1 << (64 - self.shift)))

    def add(self, keys: np.ndarray, priorities: np.ndarray, marks: np.ndarray) -> None:
        """Occurrences of `chosen` keys: the priority of the unit and a mark for each, [n]."""
        if len(self._full_keys):
            slots = keys & np.uint64(_SLOTS - 1)
            known = (self._full_keys[slots] == keys) & (priorities >= self._full_bounds[slots])
            kept = np.flatnonzero(~known)
            keys, priorities, marks = keys[kept], priorities[kept], marks[kept]
        if len(keys):
            self._waiting.append((keys, priorities, marks))
            self._count += len(keys)
        if self._count >= max(_WAITING, len(self.keys) // 2):
            self.settle()

    def merge(self, other: "Sample") -> None:
        """Take in what `other` saw, as if it had been added here."""
        other.settle()
        self.shift = max(self.shift, other.shift)
        marks = np.full(len(other.keys), _NO_MARK)
        marks[key_starts(other.keys)] = other.least
        kept = self.chosen(other.keys)
        self._waiting.append((other.keys[kept], other.priorities[kept], marks[kept]))
        self.settle()

    def settle(self) -> None:
        """Sort in what waits, and halve the threshold while there are more than `limit` keys."""
        if not self._waiting:
            return
        marks = np.full(len(self.keys), _NO_MARK)
        marks[key_starts(self.keys)] = self.least
        parts = [(self.keys, self.priorities, marks), *self._waiting]
        self._waiting, self._count = [], 0
        keys, priorities, marks = (np.concatenate(part) for part in zip(*parts, strict=True))
        order = _order(keys, priorities)
        keys, priorities, marks = keys[order], priorities[order], marks[order]
        starts = key_starts(keys)
        distinct, least = keys[starts], np.minimum.reduceat(marks, starts)
        while (count := len(self.chosen(distinct))) > self.limit:
            self.shift += 1
        stop = starts[count] if count < len(starts) else len(keys)
        self.least = least[:count]
        self._keep(keys[:stop], priorities[:stop])

    def _keep(self, keys: np.ndarray, priorities: np.ndarray) -> None:
        """Of sorted pairs: each once, and the first MOST_UNITS of each key."""
        fresh = np.ones(len(keys), bool)
        fresh[1:] = (keys[1:] != keys[:-1]) | (priorities[1:] != priorities[:-1])
        keys, priorities = keys[fresh], priorities[fresh]
        near = np.ones(len(keys), bool)
        near[MOST_UNITS:] = keys[MOST_UNITS:] != keys[:-MOST_UNITS]
        self.keys, self.priorities = keys[near], priorities[near]
        self._remember_full()

    def _remember_full(self) -> None:
        """A table of keys that have MOST_UNITS units: later units can seldom change them."""
        ends = np.append(key_starts(self.keys)[1:], len(self.keys)) - 1
        full = ends[units_of(self.keys) == MOST_UNITS]
        if not len(full):
            self._full_keys = np.zeros(0, np.uint64)
            return
        slots = self.keys[full] & np.uint64(_SLOTS - 1)
        self._full_keys = np.zeros(_SLOTS, np.uint64)
        self._full_bounds = np.full(_SLOTS, _LAST)
        self._full_keys[slots], self._full_bounds[slots] = self.keys[full], self.priorities[full]

    @property
    def exact(self) -> bool:
        """Whether every key is kept."""
        return self.shift == 0

    @property
    def distinct(self) -> int:
        """How many distinct keys there were: counted when `exact`, else estimated."""
        return len(self.least) << self.shift

    @property
    def rel_std(self) -> float:
        """Relative standard error of `distinct`; 0 when it was counted."""
        return 0.0 if self.exact else math.sqrt((1 - 0.5**self.shift) / max(1, len(self.least)))


def _order(keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
    """np.lexsort((priorities, keys)) up to equal pairs, by two sorts that are much faster."""
    order = np.argsort(keys)
    found = keys[order]
    rank = np.cumsum(np.append(False, found[1:] != found[:-1]), dtype=np.uint64)
    return order[np.argsort(rank << np.uint64(32) | priorities[order])]


def key_starts(keys: np.ndarray) -> np.ndarray:
    """Where each distinct key begins in sorted `keys`."""
    return np.flatnonzero(np.concatenate([[len(keys) > 0], keys[1:] != keys[:-1]])[: len(keys)])


def units_of(keys: np.ndarray) -> np.ndarray:
    """How many units hold each distinct key of sorted pairs, MOST_UNITS standing for more."""
    return np.diff(np.append(key_starts(keys), len(keys)))
