"""Keys: the definition in Python integers, spans and their concatenation."""

import numpy as np
import pytest

from halfulp.corpus.keys import BASE, OFFSET, Stream, join, ngram_keys, prefix
from halfulp.corpus.spans import span_keys

MASK = (1 << 64) - 1


def mixed(token: int) -> int:
    x = (token + OFFSET) & MASK
    for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
        x = (x ^ x >> 33) * factor & MASK
    return x ^ x >> 33


def key(tokens: list[int]) -> int:
    total = 0
    for token in tokens:
        total = (total * BASE + mixed(token)) & MASK
    return total


@pytest.mark.parametrize("n", [1, 2, 7])
def test_ngram_keys_are_those_of_the_definition(n):
    tokens = np.random.default_rng(n).integers(0, 2**63, 50)
    (block,) = Stream(n).blocks(tokens, (0,))
    found = ngram_keys(block, prefix(block), n).tolist()
    assert found == [key(tokens[i : i + n].tolist()) for i in range(51 - n)]


def test_span_keys_are_those_of_ngrams_of_any_length():
    symbols = np.frombuffer(b"to be or not to be", np.uint8)
    starts, ends = np.array([0, 3, 3, 13, 0, 18]), np.array([2, 5, 3, 15, 18, 18])
    found = span_keys(symbols, starts, ends).tolist()
    assert found == [key(symbols[a:b].tolist()) for a, b in zip(starts, ends, strict=True)]
    assert found[0] == found[3]
    assert found[2] == found[5] == 0


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("factor", [1, 12345])
def test_keys_of_longer_prefixes_than_are_made_at_once(dtype, factor):
    tokens = np.random.default_rng(0).integers(0, 200, 40_000).astype(dtype)
    (block,) = Stream(1).blocks(tokens, (0,), size=40_000)
    found = prefix(block, factor=factor)
    expected = key(tokens.tolist()) * factor & MASK
    assert (int(found[0]), int(found[-1])) == (0, expected)


@pytest.mark.usefixtures("counting_kernel")
def test_keys_of_long_spans():
    tokens = np.random.default_rng(0).integers(0, 200, 40_000).astype(np.uint16)
    found = span_keys(tokens, np.array([100, 7]), np.array([39_000, 16_391])).tolist()
    assert found == [key(tokens[100:39_000].tolist()), key(tokens[7:16_391].tolist())]


def test_the_key_of_a_concatenation():
    assert join(key([5, 6]), key([7, 8, 9]), 3) == key([5, 6, 7, 8, 9])
    assert join(0, key([7]), 1) == join(key([7]), 0, 0) == key([7])


def test_a_million_ngrams_have_a_million_keys():
    """Two of them share a key with probability 3e-8."""
    pairs = np.stack(np.meshgrid(np.arange(1000), np.arange(1000)), -1).reshape(-1)
    keys = span_keys(pairs, np.arange(0, 2_000_000, 2), np.arange(2, 2_000_001, 2))
    keys.sort()
    assert (keys[1:] != keys[:-1]).all()


def test_the_upper_bits_are_uniform():
    """Counts in 256 equal parts: chi-square within 5 of its standard deviations."""
    pairs = np.stack(np.meshgrid(np.arange(1000), np.arange(100)), -1).reshape(-1)
    keys = span_keys(pairs, np.arange(0, 200_000, 2), np.arange(2, 200_001, 2))
    counts = np.bincount((keys >> np.uint64(56)).astype(int), minlength=256)
    expected = len(keys) / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 5 * np.sqrt(2 * 255)
