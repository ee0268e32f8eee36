"""Sequences chosen for samples: C and NumPy give the same, which is that of a dictionary."""

import itertools
from collections import defaultdict

import numpy as np
import pytest

from halfulp.corpus import native
from halfulp.corpus.adaptive import MOST_UNITS, Sample
from halfulp.corpus.family import Family, Symbols
from halfulp.corpus.keys import unsigned
from halfulp.corpus.pairs import ascending, key_starts, merged, no_pairs
from halfulp.corpus.spans import span_keys
from halfulp.corpus.tally import PLACE_BITS

ORDERS = (1, 2, 3, 9, 40)


def batches(seed: int, size: int, vocabulary: int):
    """Batches of documents in pieces, some longer than a batch and some empty; place by place."""
    random = np.random.default_rng(seed)
    for _ in range(4):
        tokens = (vocabulary ** random.random(size)).astype(np.uint16)
        cuts = np.sort(random.integers(0, size + 1, 50))
        cuts[-1] = size
        begins = np.concatenate([[0], cuts[:-1]])
        starts = begins[random.random(50) < 0.4]
        priorities = random.integers(0, 2**32, 50).astype(np.uint32)
        yield Symbols(tokens, np.union1d([0], starts), cuts, priorities)


def counted(kernel: str, monkeypatch, limit: int, apart: bool) -> Family:
    monkeypatch.setenv("HALFULP_KERNEL", kernel)
    native.status.cache_clear()
    samples = {n: Sample(limit) for n in ORDERS}
    family = Family(samples, shard=3, apart=apart)
    for batch in batches(0, 40_000, 3000):
        family.feed(batch)
    for sample in samples.values():
        sample.settle()
    native.status.cache_clear()
    return family


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("limit", [1 << 20, 1500])
def test_both_kernels_give_the_same_samples(monkeypatch, limit, apart):
    c, numpy = (counted(kernel, monkeypatch, limit, apart) for kernel in ("c", "torch"))
    for n in ORDERS:
        mine, its = c.tallies[n], numpy.tallies[n]
        for name in ("shift", "keys", "priorities", "least"):
            np.testing.assert_array_equal(getattr(mine.sample, name), getattr(its.sample, name))
        np.testing.assert_array_equal(mine.steps, its.steps)
    exact = [tally.sample.exact for tally in c.tallies.values()]
    assert all(exact) == (limit > 1500)


@pytest.mark.usefixtures("counting_kernel")
def test_units_and_first_places_are_those_of_a_dictionary():
    family = Family({2: Sample(1 << 20)}, shard=3, apart=False)
    units, places, place = defaultdict(set), {}, 3 << PLACE_BITS
    for batch in batches(1, 6000, 200):
        family.feed(batch)
        starts = set(batch.starts.tolist())
        unit = np.searchsorted(batch.cuts, np.arange(6000), side="right")
        for i in range(1, 6000):
            if i not in starts:
                pair = tuple(batch.symbols[i - 1 : i + 1].tolist())
                units[pair].add(int(batch.priorities[unit[i]]))
                places.setdefault(pair, place + i)
        place += 6000
    sample = family.tallies[2].sample
    sample.settle()
    flat = unsigned(np.array(list(units), np.uint16).reshape(-1))
    keys = span_keys(flat, np.arange(0, len(flat), 2), np.arange(2, len(flat) + 1, 2))
    expected = sorted(zip(keys.tolist(), units.values(), places.values(), strict=True))
    assert sample.keys[key_starts(sample.keys)].tolist() == [key for key, *_ in expected]
    assert sample.least.tolist() == [place for *_, place in expected]
    lowest = [p for _, found, _ in expected for p in sorted(found)[:MOST_UNITS]]
    assert sample.priorities.tolist() == lowest
    assert max(len(found) for found in units.values()) > MOST_UNITS


@pytest.mark.parametrize("step", [1, 1 << 40])
def test_keys_that_differ_in_their_last_bits_are_put_in_order(step):
    keys = np.random.default_rng(0).integers(0, 500, 1000).astype(np.uint64) * np.uint64(step)
    assert keys[ascending(keys)].tolist() == sorted(keys.tolist())
    assert sorted(ascending(keys).tolist()) == list(range(1000))
    assert ascending(keys[:0]).tolist() == []


@pytest.mark.usefixtures("counting_kernel")
def test_pairs_merge_into_the_smallest_priorities_of_each_key():
    random = np.random.default_rng(0)
    keys = random.integers(0, 50, 4000).astype(np.uint64)
    keys[:5] = 2**64 - 1
    priorities = random.integers(0, 300, 4000).astype(np.uint32)
    marks = random.integers(0, 2**63, 4000).astype(np.uint64)
    found = no_pairs()
    for part in (slice(0, 1000), slice(1000, 1001), slice(1001, 4000), slice(0, 0)):
        found = merged(found, keys[part], priorities[part], marks[part])
    distinct = sorted(set(keys.tolist()))
    assert found.distinct.tolist() == distinct
    assert found.least.tolist() == [marks[keys == np.uint64(key)].min() for key in distinct]
    expected = [
        sorted(set(priorities[keys == np.uint64(key)].tolist()))[:MOST_UNITS] for key in distinct
    ]
    assert found.priorities.tolist() == list(itertools.chain(*expected))
    assert found.starts.tolist() == np.cumsum([0, *map(len, expected[:-1])]).tolist()
