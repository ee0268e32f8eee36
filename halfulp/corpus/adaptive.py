"""Which keys occur in which units of a corpus: exact while it fits, else an adaptive sample.

Adaptive sampling (Wegman; Flajolet 1990, Computing 43): keep the keys below a threshold that is
halved whenever they become too many. Keys are uniform 64-bit hashes, so that the kept ones are a
random share of the distinct ones, whatever the order and however the corpus was sharded.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from halfulp.corpus.pairs import MOST_UNITS, Pairs, key_starts, merged

_WAITING = 1 << 15  # occurrences that wait for the next sort, at least
_LEAST_SLOTS, _MOST_SLOTS = 1 << 12, 1 << 16  # of `known`: what is seldom used should be small
KNOWN = np.dtype([("key", "<u8"), ("last", "<u4"), ("bound", "<u4")])
_NO_BOUND = 2**32 - 1


@dataclass
class Sample:
    """At most `limit` distinct keys, each with the smallest priorities of the units that hold it.

    `keys`, `priorities` [pairs], sorted: a key stands once for each of its units, at most
    MOST_UNITS times, those of the smallest priorities. `least` [distinct keys]: the smallest mark.
    A key is kept when it is below 2^(64 − shift). Call `settle` before reading.
    `known` [a power of two]: a key has a slot by its lowest bits. Units of priorities above its
    bound can be passed over, and so can the unit `last` met where marks ascend.
    """

    limit: int
    shift: int = 0
    keys: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))
    priorities: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    least: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint64))

    def __post_init__(self) -> None:
        self.known = nothing_known(2)
        self._make_room(0)

    def chosen(self, keys: np.ndarray) -> np.ndarray:
        """Positions of the keys that are below the threshold."""
        if not self.shift:
            return np.arange(len(keys))
        return np.flatnonzero(keys <= np.uint64(self.cut))

    @property
    def cut(self) -> int:
        """The largest key that is kept."""
        return (1 << (64 - self.shift)) - 1

    def wanted(self, keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
        """Positions of the occurrences that can change the sample, as far as `known` shows."""
        if not self.shift:
            return np.flatnonzero(self._unknown(keys, priorities))
        chosen = self.chosen(keys)
        return chosen[self._unknown(keys[chosen], priorities[chosen])]

    def add(self, keys: np.ndarray, priorities: np.ndarray, marks: np.ndarray) -> None:
        """Occurrences of `chosen` keys: the priority of the unit and a mark for each, [n]."""
        kept = np.flatnonzero(self._unknown(keys, priorities))
        self.hold(keys[kept], priorities[kept], marks[kept])

    def hold(self, keys: np.ndarray, priorities: np.ndarray, marks: np.ndarray) -> None:
        """`add` for what has been looked up in `known`."""
        if self._count + len(keys) > len(self._waiting[0]):
            self.settle()
            self._make_room(max(_WAITING, len(self.keys) // 2, len(keys)))
        end = self._count + len(keys)
        for place, part in zip(self._waiting, (keys, priorities, marks), strict=True):
            place[self._count : end] = part
        self._count = end
        if len(keys) > _WAITING:  # as at first, when all keys are kept
            self.settle()
            self._make_room(0)

    def merge(self, other: "Sample") -> None:
        """Take in what `other` saw, as if it had been added here."""
        other.settle()
        self.shift = max(self.shift, other.shift)
        marks = np.repeat(other.least, units_of(other.keys))
        kept = self.chosen(other.keys)
        self.hold(other.keys[kept], other.priorities[kept], marks[kept])
        self._sort_in()

    def settle(self) -> None:
        """Sort in what waits, and halve the threshold while there are more than `limit` keys."""
        if self._count:
            self._sort_in()

    def _sort_in(self) -> None:
        before = Pairs(self.keys, self.priorities, key_starts(self.keys), self.least)
        pairs = merged(before, *(part[: self._count] for part in self._waiting))
        self._count = 0
        distinct = pairs.distinct
        while (count := len(self.chosen(distinct))) > self.limit:
            self.shift += 1
        pairs = pairs.first(count)
        self.keys, self.priorities, self.least = pairs.keys, pairs.priorities, pairs.least
        self._remember_full(pairs)

    def _unknown(self, keys: np.ndarray, priorities: np.ndarray) -> np.ndarray:
        slots = (keys & np.uint64(len(self.known) - 1)).view(np.int64)
        unknown = self.known["key"][slots] != keys
        return np.logical_or(unknown, priorities <= self.known["bound"][slots], out=unknown)

    def _make_room(self, size: int) -> None:
        types = np.uint64, np.uint32, np.uint64
        self._waiting = tuple(np.empty(size, dtype) for dtype in types)
        self._count = 0

    def _remember_full(self, pairs: Pairs) -> None:
        """Keys that have MOST_UNITS units: later units can seldom change them."""
        ends = np.append(pairs.starts[1:], len(pairs.keys))
        full = ends[ends - pairs.starts == MOST_UNITS] - 1
        # In one slot the key of the most units stays, as it comes most often.
        full = full[np.argsort(pairs.priorities[full])[::-1]]
        wanted = 1 << (4 * len(full)).bit_length()
        self.known = nothing_known(min(max(wanted, _LEAST_SLOTS), _MOST_SLOTS))
        slots = pairs.keys[full] & np.uint64(len(self.known) - 1)
        self.known["key"][slots] = pairs.keys[full]
        self.known["last"][slots] = self.known["bound"][slots] = pairs.priorities[full]

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


def nothing_known(slots: int = _LEAST_SLOTS) -> np.ndarray:
    """A table `known` without entries."""
    known = np.zeros(slots, KNOWN)
    known["key"] = np.arange(slots, dtype=np.uint64) ^ np.uint64(1)  # a key of another slot
    known["bound"] = _NO_BOUND
    return known


def units_of(keys: np.ndarray) -> np.ndarray:
    """How many units hold each distinct key of sorted pairs, MOST_UNITS standing for more."""
    return np.diff(np.append(key_starts(keys), len(keys)))
