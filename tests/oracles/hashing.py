"""The keyed hash and its keys, in numpy on 64-bit integers, from the published constants."""

import hashlib

import numpy as np

_LOW = np.uint64(0xFFFFFFFF)


def hash3(index: np.ndarray, k0: int, k1: int) -> np.ndarray:
    """32-bit words (uint32) of 32-bit indices: three multiplications, two keys."""
    x = np.asarray(index, np.uint64) & _LOW
    x ^= np.uint64(k0)
    x ^= x >> np.uint64(17)
    x = x * np.uint64(0xED5AD4BB) & _LOW
    x ^= x >> np.uint64(11)
    x = x + np.uint64(k1) & _LOW
    x = x * np.uint64(0xAC4C1B51) & _LOW
    x ^= x >> np.uint64(15)
    x = x * np.uint64(0x31848BAB) & _LOW
    x ^= x >> np.uint64(14)
    return x.astype(np.uint32)


def key_of(seed: int, name: str) -> tuple[int, int]:
    """blake2b-64 of seed, NUL, name; little-endian halves."""
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    whole = int.from_bytes(digest, "little")
    return whole & 0xFFFFFFFF, whole >> 32


def fold(key: tuple[int, int], number: int) -> tuple[int, int]:
    k0, k1 = key
    low = number % 2**32
    shifted = (low + 0x9E3779B9) % 2**32
    return int(hash3(np.array(low), k0, k1)), int(hash3(np.array(shifted), k1, k0))


def words_at(key: tuple[int, int], start: int, n: int) -> np.ndarray:
    """Words of elements start … start + n − 1; a nonzero high index word is folded into the key."""
    out = []
    for high in range(start >> 32, (start + n - 1 >> 32) + 1):
        first, last = max(start, high << 32), min(start + n, (high + 1) << 32)
        index = np.arange(first, last, dtype=np.uint64) & _LOW
        out.append(hash3(index, *(fold(key, high) if high else key)))
    return np.concatenate(out)
