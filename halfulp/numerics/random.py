"""Counter-based random bits: a keyed hash of the element index, with no state to save.

word(i; k0, k1) depends on the key and on the index of the element in the logical, unsharded tensor
only: never on threads, shards, devices or the order of calls. Three multiplications per word pass
the serial-pair, lag and neighbouring-key tests of tests/numerics/test_random.py; two do not.
"""

import hashlib
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
_GOLDEN = 0x9E3779B9


@dataclass(frozen=True)
class Key:
    """64 bits that select one stream of random words."""

    k0: int
    k1: int

    @staticmethod
    def of(seed: int, name: str) -> "Key":
        """The key of (seed, tensor name): blake2b, so that similar names give unrelated streams."""
        return _key_of(seed, name)

    def fold(self, number: int) -> "Key":
        """The key of this stream at `number` (a step, a micro-batch, a high index word)."""
        low = number & _MASK
        return Key(
            word(low, self.k0, self.k1),
            word((low + _GOLDEN) & _MASK, self.k1, self.k0),
        )

    def tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """The key as an int32 tensor [2], for traced graphs where ints would be constants."""
        return torch.tensor([_signed(self.k0), _signed(self.k1)], dtype=torch.int32, device=device)


@cache
def _key_of(seed: int, name: str) -> Key:
    digest = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=8).digest()
    return Key(int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little"))


def word(index: int, k0: int, k1: int) -> int:
    """One 32-bit random word, on Python integers: the reference of the tensor and C versions."""
    x = (index ^ k0) & _MASK
    x ^= x >> 17
    x = x * _MULTIPLIERS[0] & _MASK
    x ^= x >> 11
    x = (x + k1) & _MASK
    x = x * _MULTIPLIERS[1] & _MASK
    x ^= x >> 15
    x = x * _MULTIPLIERS[2] & _MASK
    return x ^ x >> 14


def words(index: Tensor, k0: Tensor | int, k1: Tensor | int) -> Tensor:
    """`word` on an int32 tensor of indices; keys are Python ints or int32 tensors."""
    x = index ^ (k0 if isinstance(k0, Tensor) else _signed(k0))
    x = x ^ _shift(x, 17)
    x = x * _signed(_MULTIPLIERS[0])
    x = x ^ _shift(x, 11)
    x = x + (k1 if isinstance(k1, Tensor) else _signed(k1))
    x = x * _signed(_MULTIPLIERS[1])
    x = x ^ _shift(x, 15)
    x = x * _signed(_MULTIPLIERS[2])
    return x ^ _shift(x, 14)


def fold_tensor(key: Tensor, number: Tensor) -> Tensor:
    """`Key.fold` on int32 tensors: keys [..., 2], number []; gives [..., 2]."""
    k0, k1 = key.unbind(-1)
    return torch.stack([words(number, k0, k1), words(number + _signed(_GOLDEN), k1, k0)], -1)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int32 arithmetically."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
