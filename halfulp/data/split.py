"""Which documents, or which tokens, are held out."""

import hashlib

import numpy as np


def held_out(keys: np.ndarray, sizes: np.ndarray, fraction: float, seed: int) -> np.ndarray | None:
    """Which documents are held out [n] bool, or None when no whole documents come near `fraction`.

    Documents are taken in the order of hash(seed, key) until their sizes reach `fraction` of the
    whole, passing over those too large for that. Documents of one key go together, so a
    duplicate never stands on both sides. What is held out is between half of `fraction` and
    three times it, and less than what is not.
    """
    total = float(sizes.sum())
    target = fraction * total
    _, group = np.unique(_mixed(keys, seed), return_inverse=True)
    weight = np.bincount(group, weights=sizes)
    fits = weight <= min(2 * target, (total - target) / 2)
    before = np.cumsum(np.where(fits, weight, 0.0)) - np.where(fits, weight, 0.0)
    taken = fits & (before < target)
    if weight[taken].sum() < target / 2:
        return None
    return taken[group]


def document_ranges(ends: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Token ranges [n, 2] of the chosen documents, neighbors joined; `ends` [documents]."""
    edges = np.diff(np.concatenate([[False], chosen, [False]]).astype(np.int8))
    bounds = np.concatenate([[0], ends])
    return np.stack([bounds[np.flatnonzero(edges == 1)], bounds[np.flatnonzero(edges == -1)]], 1)


def first_tokens(ranges: np.ndarray, count: int) -> np.ndarray:
    """The ranges that hold the first `count` tokens of `ranges`."""
    sizes = ranges[:, 1] - ranges[:, 0]
    before = np.cumsum(sizes) - sizes
    stops = ranges[:, 0] + np.minimum(sizes, np.maximum(count - before, 0))
    return np.stack([ranges[:, 0], stops], 1)[before < count]


def _mixed(keys: np.ndarray, seed: int) -> np.ndarray:
    """A permutation of the 64-bit numbers, one per seed: the finalizer of splitmix64."""
    salt = hashlib.blake2b(f"held out {seed}".encode(), digest_size=8).digest()
    x = keys.astype(np.uint64) ^ np.frombuffer(salt, "<u8")
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
