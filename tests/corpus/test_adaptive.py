"""The adaptive sample against a dictionary of sets."""

from collections import defaultdict

import numpy as np
import pytest

from halfulp.corpus.adaptive import Sample
from halfulp.corpus.pairs import MOST_UNITS, key_starts

RNG = np.random.default_rng(0)
SALT = 0x9E3779B97F4A7C15


def stream(size: int, distinct: int, units: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Zipf-like occurrences: 64-bit keys, the priorities of their units, marks."""
    ranks = (distinct ** RNG.random(size)).astype(np.uint64)
    mixed = np.array([(int(r) * SALT) % 2**64 for r in range(distinct + 1)], np.uint64)
    unit = RNG.integers(0, units, size)
    priorities = RNG.permutation(2**20)[:units].astype(np.uint32) * np.uint32(4093)
    return mixed[ranks], priorities[unit], RNG.integers(0, 10**6, size).astype(np.uint64)


def fed(limit: int, keys, priorities, marks, block: int) -> Sample:
    sample = Sample(limit)
    for at in range(0, len(keys), block):
        part = slice(at, at + block)
        chosen = sample.chosen(keys[part])
        sample.add(keys[part][chosen], priorities[part][chosen], marks[part][chosen])
    sample.settle()
    return sample


@pytest.mark.usefixtures("counting_kernel")
@pytest.mark.parametrize("limit", [100_000, 3000])
def test_units_and_marks_are_those_of_a_dictionary(limit):
    keys, priorities, marks = stream(200_000, 20_000, 900)
    sample = fed(limit, keys, priorities, marks, 5000)
    units, least = defaultdict(set), {}
    for key, priority, mark in zip(*(x.tolist() for x in (keys, priorities, marks)), strict=True):
        units[key].add(priority)
        least[key] = min(mark, least.get(key, mark))
    kept = sorted(key for key in units if key < 2 ** (64 - sample.shift))
    assert sample.exact == (limit > len(units))
    assert limit / 4 < len(kept) <= limit or sample.exact
    expected = [(k, p) for k in kept for p in sorted(units[k])[:MOST_UNITS]]
    assert list(zip(sample.keys.tolist(), sample.priorities.tolist(), strict=True)) == expected
    assert sample.keys[key_starts(sample.keys)].tolist() == kept
    # A mark that comes after its key has MOST_UNITS units may be passed over.
    few = [i for i, key in enumerate(kept) if len(units[key]) < MOST_UNITS]
    assert [int(sample.least[i]) for i in few] == [least[kept[i]] for i in few]
    assert len(few) > 100


@pytest.mark.usefixtures("counting_kernel")
def test_blocks_and_shards_give_the_same_sample():
    keys, priorities, marks = stream(150_000, 30_000, 400)
    marks = np.arange(len(keys), dtype=np.uint64)  # in the order of the text, as places are
    whole = fed(2000, keys, priorities, marks, 1000)
    merged = Sample(2000)
    for shard in (2, 0, 1):
        part = slice(shard * 50_000, (shard + 1) * 50_000)
        merged.merge(fed(2000, keys[part], priorities[part], marks[part], 7777))
    for name in ("shift", "keys", "priorities", "least"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(merged, name))


def test_a_threshold_known_before_changes_nothing_but_what_is_kept_on_the_way():
    keys, priorities, marks = stream(100_000, 30_000, 400)
    whole = fed(2000, keys, priorities, marks, 5000)
    assert whole.shift > 2
    begun = Sample(2000, shift=2)
    chosen = begun.chosen(keys)
    assert len(keys) / 8 < len(chosen) < len(keys) / 2
    begun.add(keys[chosen], priorities[chosen], marks[chosen])
    other = Sample(2000)
    other.merge(begun)
    for name in ("shift", "keys", "priorities"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(other, name))


def test_an_empty_sample_with_a_higher_threshold_takes_keys_away():
    keys = np.arange(1024, dtype=np.uint64) << np.uint64(54)
    sample = fed(1024, keys, np.zeros(1024, np.uint32), keys, 99)
    assert sample.exact
    sample.merge(Sample(1024, shift=3))
    assert (sample.shift, len(sample.keys), sample.distinct) == (3, 128, 1024)
    nothing = Sample(1024)
    nothing.merge(Sample(1024))
    assert (nothing.distinct, nothing.exact) == (0, True)


def test_the_estimate_lies_within_its_standard_error():
    # 40 samples of other keys; outside 3.5 sigma in fewer than 1 of 50 such tests.
    errors = []
    for _ in range(40):
        keys = RNG.integers(0, 2**64, 30_000, np.uint64)
        zeros = np.zeros(len(keys), np.uint32)
        sample = fed(1000, keys, zeros, keys, 10_000)
        errors.append((sample.distinct / len(keys) - 1) / sample.rel_std)
    assert np.abs(errors).max() < 3.5
    assert 0.6 < np.std(errors) < 1.5


def test_nothing_is_zero():
    sample = Sample(1000)
    sample.settle()
    assert (sample.distinct, sample.exact, sample.rel_std) == (0, True, 0)
