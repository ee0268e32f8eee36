"""The hash behind every sketch: MurmurHash3_x64_128 of one 64-bit key, seed 9001.

That is the hash of Apache DataSketches, so that its sketches and ours meet in one union.
"""

import numpy as np

SEED = 9001
FIRST, SECOND = np.uint64(0x87C37B91114253D5), np.uint64(0x4CF5AD432745937F)
_FMIX = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_33, _31 = np.uint64(33), np.uint64(31)
_SEED, _LENGTH = np.uint64(SEED), np.uint64(8)  # a key is 8 bytes
START = _SEED ^ _LENGTH
SLACK = np.uint64(1 << 33)


def fmix(x: np.ndarray, scratch: np.ndarray) -> None:
    """Murmur's 64-bit finalizer, a bijection with fmix(0) = 0, in place; `scratch`: as long."""
    almost(x, scratch)
    np.multiply(x, _FMIX[1], out=x)
    np.right_shift(x, _33, out=scratch)
    np.bitwise_xor(x, scratch, out=x)


def almost(x: np.ndarray, scratch: np.ndarray) -> None:
    """The finalizer before its last product, in place; `scratch`: as long."""
    np.right_shift(x, _33, out=scratch)
    np.bitwise_xor(x, scratch, out=x)
    np.multiply(x, _FMIX[0], out=x)
    np.right_shift(x, _33, out=scratch)
    np.bitwise_xor(x, scratch, out=x)


def hash_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both halves (h1, h2) [n] uint64 of the hash of each key [n] uint64."""
    a, b, scratch = np.empty((3, len(keys)), np.uint64)
    np.multiply(keys, FIRST, out=a)
    halves(a, b, scratch)
    return finished(a, b)


def halves(a: np.ndarray, b: np.ndarray, scratch: np.ndarray) -> None:
    """Most of the hash, in place: `a` comes in as key · FIRST, and `finished` makes the rest."""
    np.left_shift(a, _31, out=scratch)
    np.right_shift(a, _33, out=a)
    np.bitwise_or(a, scratch, out=a)
    np.multiply(a, SECOND, out=a)
    np.bitwise_xor(a, START, out=a)
    np.add(a, START, out=a)
    np.add(a, START, out=b)
    almost(a, scratch)
    almost(b, scratch)


def finished(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(h1, h2) from the two numbers that `halves` leaves."""
    a, b = a * _FMIX[1], b * _FMIX[1]
    b ^= b >> _33
    h1 = (a ^ a >> _33) + b
    return h1, h1 + b


def at_most(a: np.ndarray, b: np.ndarray, bound: int, out: np.ndarray) -> np.ndarray:
    """Indices of all hashes whose h2 is ≤ bound, and of very few others; `out`: scratch.

    One product serves both halves: f a + 2 f b = f (a + 2 b). It differs from h2 by less than
    3 · 2^31, which the last step of the finalizer, x ^ x >> 33, may change.
    """
    np.add(a, b, out=out)
    np.add(out, b, out=out)
    np.multiply(out, _FMIX[1], out=out)
    np.add(out, SLACK, out=out)
    return np.flatnonzero(out <= np.uint64(min(bound + 2 * int(SLACK), (1 << 64) - 1)))
