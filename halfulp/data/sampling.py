"""Which window is sample number i: an endless stream of epochs that starts anywhere."""

import hashlib
from functools import lru_cache

import numpy as np


def windows_in(tokens: int, length: int) -> int:
    """How many windows of length + 1 tokens start at multiples of `length`."""
    return max(0, (tokens - 1) // length)


@lru_cache(maxsize=3)
def epoch_order(seed: int, epoch: int, windows: int) -> np.ndarray:
    """The order [windows] in which an epoch visits its windows.

    Depends on the arguments only; numpy promises never to change RandomState (NEP 19).
    """
    digest = hashlib.blake2b(f"epoch {seed} {epoch}".encode(), digest_size=32).digest()
    order = np.random.RandomState(np.frombuffer(digest, "<u4")).permutation(windows)
    order.flags.writeable = False
    return order


def sample_windows(first: int, count: int, *, windows: int, seed: int) -> list[int]:
    """The windows of the samples first … first + count - 1."""
    found = []
    for sample in range(first, first + count):
        epoch, place = divmod(sample, windows)
        found.append(int(epoch_order(seed, epoch, windows)[place]))
    return found
