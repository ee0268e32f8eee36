"""A sample of the distinct keys, chosen by their hash, for what two corpora share.

A key is in it when its hash is below 2^−shift of the range; the shift grows so that the sample
stays within its capacity. The choice depends on nothing but the set of keys, so that samples of
shards unite and samples of two corpora can be compared. As a file it is a compact theta sketch of
Apache DataSketches (Dasgupta et al. 2016, arXiv:1510.01455).
"""

import struct

import numpy as np

from halfulp.errors import DataError

LG_CAPACITY = 14
_WAITING = 1 << 14  # hashes that wait to be sorted in
_HEADER = struct.Struct("<6BHIfQ")
_PREAMBLE_LONGS, _VERSION, _FAMILY, _SEED_HASH = 3, 3, 3, 0x93CC
_FLAGS = 2 | 8 | 16  # read-only, compact, ordered
_LARGEST = (1 << 63) - 1


class Theta:
    """At most 2^lg_capacity distinct keys: all those whose hash is below 2^(63 − shift)."""

    def __init__(self, lg_capacity: int = LG_CAPACITY) -> None:
        self.lg_capacity = lg_capacity
        self._shift = 0
        self._hashes = np.empty(0, np.uint64)
        self._waiting: list[np.ndarray] = []
        self._count = 0

    @property
    def cut(self) -> int:
        """The largest h2 (64 bits) that may belong to the sample."""
        return ((1 << 64) - 1) >> self._shift

    @property
    def hashes(self) -> np.ndarray:
        """[kept] uint64, ascending: h2 without its last bit."""
        self._settle()
        return self._hashes

    @property
    def shift(self) -> int:
        """Every kept key stands for 2^shift; 0: all keys are kept."""
        self._settle()
        return self._shift

    def add(self, h2: np.ndarray) -> None:
        """Add keys by the second half of their hash, [n] uint64."""
        self._waiting.append(h2)
        self._count += len(h2)
        if self._count >= _WAITING:
            self._settle()

    def merge(self, other: "Theta") -> None:
        """Take in all keys of `other`. DataError for another capacity."""
        if other.lg_capacity != self.lg_capacity:
            raise DataError(
                f"a sample of 2^{other.lg_capacity} keys cannot be merged into one of "
                f"2^{self.lg_capacity}. Make both with one capacity."
            )
        self._shift = max(self.shift, other.shift)
        self._hashes = np.concatenate((self._hashes, other.hashes))
        self._fit()

    def at_shift(self, shift: int) -> np.ndarray:
        """The hashes that a sample with this larger shift has."""
        return self.hashes[: np.searchsorted(self.hashes, np.uint64(1 << (63 - shift)))]

    def estimate(self) -> float:
        """Number of distinct keys; exact at shift 0, else relative standard error 1/√kept."""
        return float(len(self.hashes) << self.shift)

    def to_bytes(self) -> bytes:
        """A compact, ordered theta sketch of Apache DataSketches."""
        theta = min(1 << (63 - self.shift), _LARGEST)
        head = (_PREAMBLE_LONGS, _VERSION, _FAMILY, self.lg_capacity, 0, _FLAGS, _SEED_HASH)
        body = self.hashes.astype("<u8").tobytes()
        return _HEADER.pack(*head, len(self.hashes), 1.0, theta) + body

    @classmethod
    def from_bytes(cls, image: bytes) -> "Theta":
        """What to_bytes wrote. DataError for anything else."""
        if len(image) < _HEADER.size:
            raise DataError(f"a sample has at least {_HEADER.size} bytes; here are {len(image)}.")
        *head, lg_capacity, _, flags, seed, count, _, theta = _HEADER.unpack_from(image)
        ours = (*head, flags, seed) == (*(_PREAMBLE_LONGS, _VERSION, _FAMILY, _FLAGS, _SEED_HASH),)
        shift = 0 if theta == _LARGEST else 64 - theta.bit_length()
        if not ours or theta not in (_LARGEST, 1 << (63 - shift)):
            raise DataError(
                f"these bytes are no sample of keys (they begin with {image[:8].hex()}). "
                "Give a file that `halfulp corpus sketch` wrote."
            )
        made = cls(lg_capacity)
        made._shift, made._hashes = shift, _checked(image[_HEADER.size :], count, theta)
        return made

    def _settle(self) -> None:
        """Sort in what waits."""
        if self._waiting:
            waiting = np.concatenate(self._waiting)
            low = waiting[waiting <= np.uint64(self.cut)] >> np.uint64(1)
            self._waiting, self._count = [], 0
            self._hashes = np.concatenate((self._hashes, low))
            self._fit()

    def _fit(self) -> None:
        """Each hash once, and a larger shift while there are more than the capacity."""
        hashes = np.sort(self._hashes)
        hashes = hashes[np.append(True, hashes[1:] != hashes[:-1])[: len(hashes)]]
        while self._kept(hashes) > 1 << self.lg_capacity:
            self._shift += 1
        self._hashes = hashes[: self._kept(hashes)]

    def _kept(self, hashes: np.ndarray) -> int:
        return int(np.searchsorted(hashes, np.uint64(self.cut >> 1), side="right"))


def _checked(body: bytes, count: int, theta: int) -> np.ndarray:
    if len(body) == 8 * count:
        hashes = np.frombuffer(body, "<u8").astype(np.uint64)
        if count == 0 or ((hashes[1:] > hashes[:-1]).all() and int(hashes[-1]) < theta):
            return hashes
    raise DataError("the sample is cut or damaged; make it again.")
