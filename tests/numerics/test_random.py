"""The keyed hash: three implementations, one set of words; and their statistical quality."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles.compare import on_kernel
from oracles.hashing import fold, hash3, key_of, words_at

from halfulp.numerics.random import Key, fold_tensor, word, words
from halfulp.numerics.rounding import random_words, round_to

KEY = Key.of(7, "layers.0.ffn/x")
INDICES = [0, 1, 2, 65535, 2**31 - 1, 2**31, 2**32 - 1]
WINDOWS = {"high": 28, "low": 0, "bf16": 12}


def unsigned(t: torch.Tensor) -> np.ndarray:
    return t.numpy().view(np.uint32)


@pytest.mark.parametrize("key", [(0, 0), (1, 2**31), (2**32 - 1, 2**32 - 1), (KEY.k0, KEY.k1)])
def test_python_tensor_and_oracle_words_agree(key):
    expected = hash3(np.array(INDICES), *key).tolist()
    assert [word(i, *key) for i in INDICES] == expected
    index = torch.tensor([i - 2**32 if i >= 2**31 else i for i in INDICES], dtype=torch.int32)
    assert unsigned(words(index, *key)).tolist() == expected
    tensors = Key(*key).tensor()
    assert unsigned(words(index, tensors[0], tensors[1])).tolist() == expected


def test_words_of_a_tensor_follow_its_elements():
    x, key = torch.empty(5, 7), (KEY.k0, KEY.k1)
    for index in (0, 2**31 - 3, 2**32 - 40):
        expected = words_at(key, index, 35).reshape(5, 7)
        assert (unsigned(random_words(x, KEY.tensor(), index)) == expected).all()


def test_c_words_seen_through_rounding():
    """e8m1 goes up iff discarded + word mod 2^22 ≥ 2^22: bisection reads the 22 bits out."""
    n = 2000
    low, high = np.zeros(n, np.int64), np.full(n, 1 << 22)  # low: goes not up; high: goes up
    with on_kernel("c"):
        while (high - low > 1).any():
            middle = (low + high) // 2
            x = (0x3F800000 + middle).astype(np.int32).view(np.float32)
            up = round_to(torch.from_numpy(x), "e8m1", rounding="stochastic", key=KEY) > 1
            low, high = np.where(up, low, middle), np.where(up, middle, high)
    assert ((1 << 22) - high == hash3(np.arange(n), KEY.k0, KEY.k1) % (1 << 22)).mean() > 0.999


def test_keys_agree_with_the_oracle():
    assert (KEY.k0, KEY.k1) == key_of(7, "layers.0.ffn/x")
    for number in (0, 1, 1000, 2**32 - 1, 2**32):
        folded = KEY.fold(number)
        assert (folded.k0, folded.k1) == fold((KEY.k0, KEY.k1), number)
    number = torch.tensor(1000, dtype=torch.int32)
    assert unsigned(fold_tensor(KEY.tensor(), number)).tolist() == list(
        fold((KEY.k0, KEY.k1), 1000)
    )


def test_words_do_not_repeat():
    """Of 2^20 words about 128 collide in 2^32 (±11.3); 6 standard errors."""
    drawn = hash3(np.arange(1 << 20), KEY.k0, KEY.k1)
    collisions = len(drawn) - len(np.unique(drawn))
    assert collisions == 0 or abs(collisions - 128) < 6 * 11.3


def pair_z(a: np.ndarray, b: np.ndarray, shift: int) -> float:
    """z of the chi-square of 4-bit pairs against independence and uniformity (256 cells)."""
    cells = (a >> np.uint32(shift) & 15) << 4 | (b >> np.uint32(shift) & 15)
    counts = np.bincount(cells, minlength=256)
    expected = len(a) / 256
    chi2 = ((counts - expected) ** 2).sum() / expected
    return float((chi2 - 255) / np.sqrt(2 * 255))


@pytest.fixture(scope="module")
def stream() -> np.ndarray:
    """2^19 + 2^20 consecutive words; equal to ours by the tests above."""
    return hash3(np.arange((1 << 19) + (1 << 20)), KEY.k0, KEY.k1)


@pytest.mark.parametrize("window", WINDOWS)
def test_pairs_at_lags_are_independent(stream, window):
    """z < 6 at each of 21 lags; failure probability of a good generator below 1e-6."""
    n = 1 << 19
    z = [pair_z(stream[:n], stream[lag : lag + n], WINDOWS[window]) for lag in 2 ** np.arange(21)]
    assert max(map(abs, z)) < 6


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("neighbors", ["steps", "names", "seeds", "high_words"])
def test_neighboring_keys_are_independent(neighbors, window):
    """The same elements under keys that differ by one step, letter or seed: z < 6 for 12 pairs."""
    make = {
        "steps": lambda i: KEY.fold(i),
        "names": lambda i: Key.of(7, f"layers.{i}.ffn/x"),
        "seeds": lambda i: Key.of(i, "layers.0.ffn/x"),
        "high_words": lambda i: KEY.fold(1000).fold(i),
    }[neighbors]
    draws = [hash3(np.arange(1 << 17), make(i).k0, make(i).k1) for i in range(13)]
    z = [pair_z(a, b, WINDOWS[window]) for a, b in pairwise(draws)]
    assert max(map(abs, z)) < 6


def test_the_pair_test_has_teeth():
    """It catches a Weyl sequence, which is uniform but not independent."""
    weak = (np.arange((1 << 17) + 1) * 0x9E3779B9 % 2**32).astype(np.uint32)
    assert abs(pair_z(weak[:-1], weak[1:], WINDOWS["high"])) > 1000


def test_every_bit_is_fair(stream):
    """32 bits, |z| < 5 each; failure probability 2e-5."""
    share = np.array([(stream >> np.uint32(bit) & 1).mean() for bit in range(32)])
    assert (np.abs(share - 0.5) < 5 * 0.5 / np.sqrt(len(stream))).all()
