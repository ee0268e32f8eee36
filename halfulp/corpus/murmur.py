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


def fmix(x: np.ndarray, scratch: np.ndarray) -> None:
    """Murmur's 64-bit finalizer, a bijection with fmix(0) = 0, in place; `scratch`: as long."""
    for factor in _FMIX:
        np.right_shift(x, _33, out=scratch)
        np.bitwise_xor(x, scratch, out=x)
        np.multiply(x, factor, out=x)
    np.right_shift(x, _33, out=scratch)
    np.bitwise_xor(x, scratch, out=x)


def hash_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both halves (h1, h2) [n] uint64 of the hash of each key [n] uint64."""
    work = np.empty((3, len(keys)), np.uint64)
    np.multiply(keys, FIRST, out=work[0])
    finish(*work)
    return work[0], work[1]


def finish(h1: np.ndarray, h2: np.ndarray, scratch: np.ndarray) -> None:
    """The rest of the hash in place: h1 comes in as key · FIRST, h2 and scratch as anything."""
    np.left_shift(h1, _31, out=scratch)
    np.right_shift(h1, _33, out=h1)
    np.bitwise_or(h1, scratch, out=h1)
    np.multiply(h1, SECOND, out=h1)
    np.bitwise_xor(h1, START, out=h1)
    np.add(h1, START, out=h1)
    np.add(h1, START, out=h2)
    fmix(h1, scratch)
    fmix(h2, scratch)
    np.add(h1, h2, out=h1)
    np.add(h2, h1, out=h2)
