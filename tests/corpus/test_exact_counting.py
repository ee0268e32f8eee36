"""Exact counting: against sets, within its budget, and its refusal."""

import tracemalloc

import numpy as np
import pytest

from halfulp.corpus.exact import Exact, KeySet
from halfulp.errors import DataError


@pytest.mark.parametrize("distinct", [1, 1000, 600_000])
def test_the_distinct_keys_are_those_of_a_set(distinct):
    random = np.random.default_rng(distinct)
    parts = [random.integers(0, distinct, 90_000, dtype=np.uint64) for _ in range(12)]
    keys = KeySet(1 << 27)
    for part in parts:
        keys.add(part)
    expected = np.array(sorted(set(np.concatenate(parts).tolist())), np.uint64)
    assert np.array_equal(keys.keys(), expected)
    assert len(keys) == len(expected)


def test_nothing_is_zero_keys():
    assert len(KeySet(1 << 20)) == 0


def test_merging_is_a_union():
    one, other = KeySet(1 << 23), KeySet(1 << 23)
    one.add(np.arange(0, 10, dtype=np.uint64))
    other.add(np.arange(5, 15, dtype=np.uint64))
    one.merge(other)
    assert one.keys().tolist() == list(range(15))


def test_it_stays_within_its_budget_and_uses_it():
    """3 million keys need 24 MB, and fit into 32 MB with what waits."""
    budget = 32 << 20
    keys = KeySet(budget)
    tracemalloc.start()
    try:
        for at in range(0, 3_000_000, 50_000):
            keys.add(np.arange(at, at + 50_000, dtype=np.uint64))
        assert len(keys) == 3_000_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 24e6 < peak < 1.6 * budget


def test_it_refuses_with_the_bytes_it_needs():
    keys = Exact((2, 3), budget_bytes=16 << 20)
    message = r"needs more than 1\d,\d{3},\d{3} bytes here and may use 8,388,608. Count with a sk"
    tokens = np.random.default_rng(0).integers(0, 1 << 30, 2_000_000)
    with pytest.raises(DataError, match=message):
        keys.update(tokens)


def test_unlike_counts_do_not_merge():
    with pytest.raises(DataError, match="unlike n"):
        Exact((2,), budget_bytes=1).merge(Exact((3,), budget_bytes=1))
