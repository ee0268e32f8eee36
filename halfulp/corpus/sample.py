"""A sample of the distinct n-grams, chosen by their hash, with the number of documents of each.

An n-gram is in it when its hash is below 2^−s of the range; s grows so that the sample stays
within its capacity. The choice depends on nothing but the set of n-grams, so samples of shards
unite, and samples of two corpora can be compared. As a file it is a compact theta sketch of
Apache DataSketches (Dasgupta et al. 2016, arXiv:1510.01455).
"""

import struct
from collections.abc import Mapping

import numpy as np

from halfulp.errors import DataError

GROUPS = 16
_PENDING = 1 << 14  # occurrences that wait to be sorted in
_ENOUGH = 1 << 15  # documents of one group: beyond, no more are counted
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_THETA = struct.Struct("<BBBBBBHIfQ")
_PREAMBLE, _VERSION, _FAMILY, _FLAGS, _SEED_HASH = 3, 3, 3, 2 | 8 | 16, 0x93CC
_MOST_THETA = (1 << 63) - 1


class Sample:
    """At most `capacity` distinct n-grams, all those with hash < 2^(63 − shift).

    `hashes` [kept] ascending, uint64 below 2^63; `documents` [kept, GROUPS] uint16: how many
    documents of each group hold the n-gram. A document's group is its number mod GROUPS.
    """

    def __init__(self, capacity: int = 1 << 14) -> None:
        self.capacity = capacity
        self.shift = 0
        self._hashes = np.empty(0, np.uint64)
        self._documents = np.empty((0, GROUPS), np.uint16)
        self._last = np.empty(0, np.int64)  # document of the latest occurrence
        self._pending: list[tuple[np.ndarray, np.ndarray]] = []
        self._waiting = 0

    @property
    def cut(self) -> int:
        """The largest 64-bit h2 that belongs to the sample."""
        return ((1 << 64) - 1) >> self.shift

    @property
    def hashes(self) -> np.ndarray:
        self._settle()
        return self._hashes

    @property
    def documents(self) -> np.ndarray:
        self._settle()
        return self._documents

    @property
    def scale(self) -> int:
        """Distinct n-grams for each one kept; 1: the sample is all of them."""
        self._settle()
        return 1 << self.shift

    def add(self, h2: np.ndarray, documents: np.ndarray) -> None:
        """Occurrences [n] by hash (uint64) and number of their document, which never falls."""
        if len(h2):
            self._pending.append((h2 >> np.uint64(1), documents))
            self._waiting += len(h2)
            if self._waiting >= _PENDING:
                self._settle()

    def estimate(self) -> float:
        """Number of distinct n-grams; relative standard error at most 1/√kept."""
        return float(len(self.hashes) * self.scale)

    def frequencies(self, most: int = 12, *, without: int | None = None) -> np.ndarray:
        """f_1 … f_most [most]: how many distinct n-grams are in exactly 1 … `most` documents.

        Scaled to the whole corpus. `without` leaves out one group of documents (jackknife).
        """
        documents = self.documents
        counts = documents.sum(axis=1, dtype=np.int64)
        if without is not None:
            counts = counts - documents[:, without]
        return np.bincount(counts, minlength=most + 1)[1 : most + 1] * float(self.scale)

    def merge(self, other: "Sample") -> None:
        """Take in `other`, a sample of other documents. DataError for another capacity."""
        if other.capacity != self.capacity:
            raise DataError(
                f"a sample of {other.capacity} n-grams cannot be merged into one of "
                f"{self.capacity}. Make both alike."
            )
        self._settle()
        hashes = np.concatenate((self._hashes, other.hashes))
        documents = np.concatenate((self._documents, other.documents))
        unique, at = _places(hashes)
        total = np.zeros((len(unique), GROUPS), np.int64)
        np.add.at(total, at, documents)
        self._hashes, self._documents = unique, np.minimum(total, _ENOUGH).astype(np.uint16)
        self._last = np.full(len(unique), -1, np.int64)
        self.shift = max(self.shift, other.shift)
        self._fit()

    def state(self) -> dict[str, np.ndarray]:
        """All there is, as arrays: what `from_state` takes."""
        self._settle()
        head = np.array([self.capacity, self.shift])
        return {
            "head": head, "hashes": self._hashes, "documents": self._documents, "last": self._last,
        }  # fmt: skip

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray]) -> "Sample":
        made = cls(int(state["head"][0]))
        made.shift = int(state["head"][1])
        made._hashes, made._documents = state["hashes"], state["documents"]
        made._last = state["last"]
        return made

    def to_bytes(self) -> bytes:
        """The hashes as a compact, ordered theta sketch of Apache DataSketches."""
        hashes = self.hashes
        theta = min(1 << 63 - self.shift, _MOST_THETA)
        head = (_PREAMBLE, _VERSION, _FAMILY, 0, 0, _FLAGS, _SEED_HASH, len(hashes), 1.0, theta)
        return _THETA.pack(*head) + hashes.astype("<u8").tobytes()

    def _settle(self) -> None:
        """Sort the waiting occurrences in."""
        if not self._waiting:
            return
        hashes, documents = _once(*map(np.concatenate, zip(*self._pending, strict=True)))
        self._pending, self._waiting = [], 0
        unique, at = _places(np.concatenate((self._hashes, hashes)))
        old, new = np.split(at, [len(self._hashes)])
        counts, last = np.zeros((len(unique), GROUPS), np.uint16), np.full(len(unique), -1)
        counts[old], last[old] = self._documents, self._last
        groups = documents % GROUPS
        count = (last[new] != documents) & (counts[new, groups] < _ENOUGH)
        np.add.at(counts, (new[count], groups[count]), 1)
        np.maximum.at(last, new, documents)
        self._hashes, self._documents, self._last = unique, counts, last
        self._fit()

    def _fit(self) -> None:
        """Raise the shift until the sample is within its capacity."""
        while (kept := np.searchsorted(self._hashes, self.cut >> 1, side="right")) > self.capacity:
            self.shift += 1
        self._hashes, self._last = self._hashes[:kept], self._last[:kept]
        self._documents = self._documents[:kept]


def theta_from_bytes(image: bytes) -> tuple[np.ndarray, int]:
    """Hashes [kept] uint64 and shift in what Sample.to_bytes wrote. DataError for anything else."""
    if len(image) < _THETA.size:
        raise DataError(f"a sample has at least {_THETA.size} bytes; this one has {len(image)}.")
    ints, version, family, _, _, flags, seed, count, _, theta = _THETA.unpack_from(image)
    shift = 0 if theta == _MOST_THETA else 64 - theta.bit_length()
    ours = (ints, version, family, flags, seed) == (
        _PREAMBLE, _VERSION, _FAMILY, _FLAGS, _SEED_HASH,
    )  # fmt: skip
    if not ours or theta not in (_MOST_THETA, 1 << (63 - shift)):
        raise DataError(
            f"these bytes are no sample of n-grams (they begin with {image[:8].hex()}). "
            "Give a file that `halfulp corpus sketch` wrote."
        )
    hashes = np.frombuffer(image[_THETA.size :][: 8 * count], "<u8").astype(np.uint64)
    ascending = len(hashes) == count and (np.diff(hashes.astype(np.int64)) > 0).all()
    if len(image) != _THETA.size + 8 * count or not ascending or (count and hashes[-1] >= theta):
        raise DataError("the sample is cut or damaged; make it again.")
    return hashes, shift


def _once(hashes: np.ndarray, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair of a hash and a document once."""
    # One number for both: two pairs meet in it with probability 2^-64.
    pairs = hashes + documents.astype(np.uint64) * _SPREAD
    order = np.argsort(pairs)
    pairs = pairs[order]
    order = order[np.append(True, pairs[1:] != pairs[:-1])]
    return hashes[order], documents[order]


def _places(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct hashes, ascending, and the index of each given one among them."""
    order = np.argsort(hashes)
    ascending = hashes[order]
    head = np.append(True, ascending[1:] != ascending[:-1])[: len(hashes)]
    at = np.empty(len(hashes), np.int64)
    at[order] = np.cumsum(head) - 1
    return ascending[head], at
