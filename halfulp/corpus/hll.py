"""HyperLogLog: how many distinct keys there were, in 2^lg_k bytes, and the union of any two.

Registers and file are those of Apache DataSketches' HLL_8, so that its tools and Spark's
`hll_union_agg` read them. The estimate is Ertl's (2017, arXiv:1702.01284, algorithm 6), which
needs no table of measured corrections at any size.
"""

import math
import struct

import numpy as np

from halfulp.corpus import murmur
from halfulp.errors import DataError

LEAST_LG_K, MOST_LG_K = 4, 21
LARGEST = 63  # of a register: 1 + the leading zeros of h2, at most 62 of them
_HEADER = struct.Struct("<8B3dII")
_PREAMBLE_INTS, _VERSION, _FAMILY = 10, 1, 7
_COMPACT, _OUT_OF_ORDER = 8, 16
_HLL_8 = 2 | 2 << 2
_CHUNK = 1 << 14
# The largest h2 that raises a register of each value; none raises 63, which stands for more too.
_BOUNDS = np.array([((1 << 64) - 1) >> value for value in range(LARGEST)] + [0], np.uint64)


class Hll:
    """A set of 64-bit keys, of which only the number of distinct ones can be asked.

    `registers` [2^lg_k] uint8. DataError for lg_k outside 4 … 21.
    """

    def __init__(self, lg_k: int = 14) -> None:
        if not LEAST_LG_K <= lg_k <= MOST_LG_K:
            raise DataError(
                f"lg_k is {lg_k}; a sketch has 2^{LEAST_LG_K} … 2^{MOST_LG_K} registers. "
                "14 gives 0.8 % for 16 KB, 16 gives 0.4 % for 64 KB."
            )
        self.lg_k = lg_k
        self.registers = np.zeros(1 << lg_k, np.uint8)

    def update(self, keys: np.ndarray) -> None:
        """Add keys [n] uint64 (or int64, bit for bit)."""
        keys = np.ascontiguousarray(keys).view(np.uint64)
        for at in range(0, len(keys), _CHUNK):
            h1, h2 = murmur.hash_keys(keys[at : at + _CHUNK])
            raise_registers(self.registers, slots_of(h1, self.lg_k), h2)

    def merge(self, other: "Hll") -> None:
        """Take in all keys of `other`. DataError for another lg_k."""
        if other.lg_k != self.lg_k:
            raise DataError(
                f"a sketch with lg_k {other.lg_k} cannot be merged into one with {self.lg_k}. "
                "Make both with one lg_k."
            )
        np.maximum(self.registers, other.registers, out=self.registers)

    def estimate(self) -> float:
        """Number of distinct keys; relative standard error at most rel_std(lg_k)."""
        return _estimate(np.bincount(self.registers, minlength=LARGEST + 1))

    def to_bytes(self) -> bytes:
        """The HLL_8 image of Apache DataSketches: 40 bytes of preamble, then the registers."""
        counts = np.bincount(self.registers, minlength=LARGEST + 1)
        weights = counts * 2.0 ** -np.arange(LARGEST + 1)
        flags, current_minimum, list_size, exceptions = _COMPACT | _OUT_OF_ORDER, 0, 0, 0
        head = _HEADER.pack(
            *(_PREAMBLE_INTS, _VERSION, _FAMILY, self.lg_k, list_size, flags, current_minimum),
            _HLL_8,
            *(0.0, weights[:32].sum(), weights[32:].sum()),
            *(int(counts[0]), exceptions),
        )
        return head + self.registers.tobytes()

    @classmethod
    def from_bytes(cls, image: bytes) -> "Hll":
        """The sketch in an HLL_8 image, ours or one that DataSketches wrote in its HLL mode.

        DataError for anything else.
        """
        lg_k = _checked(image)
        made = cls(lg_k)
        made.registers = np.frombuffer(image, np.uint8, offset=_HEADER.size).copy()
        return made


def rel_std(lg_k: int) -> float:
    """Relative standard error of an estimate: √(3 ln 2 − 1) / √(2^lg_k), the large-number limit.

    Below about 2^lg_k distinct keys the error is smaller (Ertl 2017, figure 8).
    """
    return math.sqrt((3 * math.log(2) - 1) / (1 << lg_k))


def slots_of(h1: np.ndarray, lg_k: int) -> np.ndarray:
    """The register of each key."""
    return (h1 & np.uint64((1 << lg_k) - 1)).view(np.int64)


def raises(registers: np.ndarray, slots: np.ndarray, h2: np.ndarray) -> np.ndarray:
    """Which keys would raise their register (mask)."""
    return h2 <= _BOUNDS.take(registers.take(slots))


def raise_registers(registers: np.ndarray, slots: np.ndarray, h2: np.ndarray) -> None:
    """registers[slots] = max(registers[slots], rank(h2)), in place."""
    higher = np.flatnonzero(raises(registers, slots, h2))
    np.maximum.at(registers, slots[higher], rank(h2[higher]))


def rank(h2: np.ndarray) -> np.ndarray:
    """1 + leading zeros of each 64-bit number, at most 63, as uint8."""
    # Without the last eleven bits it is exact as a float64; a number that has no others is not.
    length = _bit_length(h2 >> np.uint64(11)) + 11
    small = h2 < np.uint64(1 << 11)
    if small.any():
        length[small] = _bit_length(h2[small])
    return np.minimum(65 - length, LARGEST).astype(np.uint8)


def _bit_length(numbers: np.ndarray) -> np.ndarray:
    """Of uint64 below 2^53, from the exponent of a float64; below 0 for 0."""
    return (numbers.astype(np.float64).view(np.int64) >> 52) - 1022


def _estimate(counts: np.ndarray) -> float:
    """Ertl's algorithm 6 on the histogram of registers [LARGEST + 1]."""
    registers = int(counts.sum())
    total = registers * _tau(1 - counts[LARGEST] / registers)
    for count in counts[LARGEST - 1 : 0 : -1]:
        total = 0.5 * (total + int(count))
    total += registers * _sigma(counts[0] / registers)
    return registers * (registers / (2 * math.log(2) * total))


def _sigma(x: float) -> float:
    """x + Σ_(k≥1) x^(2^k) 2^(k−1)."""
    if x == 1:
        return math.inf
    power, total = 1.0, x
    while True:
        x *= x
        before, total = total, total + x * power
        power += power
        if total == before:
            return total


def _tau(x: float) -> float:
    """(1 − x − Σ_(k≥1) (1 − x^(2^−k))² 2^−k) / 3."""
    if x in (0, 1):
        return 0.0
    power, total = 1.0, 1 - x
    while True:
        x = math.sqrt(x)
        power *= 0.5
        before, total = total, total - (1 - x) ** 2 * power
        if total == before:
            return total / 3


def _checked(image: bytes) -> int:
    if len(image) < _HEADER.size:
        raise DataError(f"a sketch has at least {_HEADER.size} bytes; this one has {len(image)}.")
    ints, version, family, lg_k, _, _, minimum, mode, *_, exceptions = _HEADER.unpack_from(image)
    if (ints, version, family) != (_PREAMBLE_INTS, _VERSION, _FAMILY) or mode != _HLL_8:
        raise DataError(
            f"these bytes are no HLL_8 sketch of Apache DataSketches in its HLL mode (they begin "
            f"with {image[:8].hex()}). Give a file that `halfulp corpus sketch` wrote."
        )
    in_range = LEAST_LG_K <= lg_k <= MOST_LG_K and minimum == 0 and exceptions == 0
    if not in_range or len(image) != _HEADER.size + (1 << lg_k):
        raise DataError(
            f"the sketch says lg_k {lg_k} and has {len(image)} bytes instead of "
            f"{_HEADER.size + (1 << min(lg_k, 30))}. The file is cut or damaged; make it again."
        )
    if max(image[_HEADER.size :]) > LARGEST:
        raise DataError("a register is above 63. The file is damaged; make it again.")
    return lg_k
