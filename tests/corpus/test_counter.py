"""Counting n-grams: against sets of tuples, and both kernels bit by bit."""

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest

from halfulp.corpus import native
from halfulp.corpus.counter import Counter
from halfulp.corpus.exact import Exact
from halfulp.corpus.hll import Hll, rel_std
from halfulp.corpus.keys import BLOCK
from halfulp.corpus.murmur import hash_keys
from halfulp.corpus.theta import Theta
from halfulp.errors import DataError, KernelError

ORDERS = (1, 2, 3, 5, 8, 32, 700)
BUDGET = 1 << 26


def corpus(seed: int = 0, size: int = 40_000, documents: int = 60, words: int = 40):
    """Tokens and document starts; some documents are empty, some are shorter than an n-gram."""
    random = np.random.default_rng(seed)
    starts = np.sort(random.integers(0, size + 1, documents))
    starts[:3] = 0
    starts[5:9] = starts[5]
    return random.zipf(1.3, size) % words, starts


def ngrams(tokens, starts, n: int, *, apart: bool = False) -> list[tuple[int, ...]]:
    found, step = [], n if apart else 1
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        document = tokens[begin:end].tolist()
        found += [tuple(document[i : i + n]) for i in range(0, len(document) - n + 1, step)]
    return found


@pytest.mark.parametrize("apart", [False, True])
def test_distinct_and_occurrences_are_those_of_sets_of_tuples(apart):
    tokens, starts = corpus()
    exact = Exact(ORDERS, budget_bytes=BUDGET, apart=apart)
    counter = Counter(ORDERS, apart=apart)
    exact.update(tokens, starts)
    counter.update(tokens, starts)
    for n in ORDERS:
        expected = ngrams(tokens, starts, n, apart=apart)
        assert exact.distinct[n] == len(set(expected))
        assert counter.occurrences[n] == len(expected)
    assert (counter.tokens, counter.documents) == (len(tokens), len(starts))


@pytest.mark.parametrize("apart", [False, True])
def test_registers_and_samples_are_those_of_the_exact_keys(counting_kernel, apart):
    tokens, starts = corpus(1)
    exact = Exact(ORDERS, budget_bytes=BUDGET, apart=apart)
    counter = Counter(ORDERS, lg_k=8, lg_capacity=6, apart=apart)
    exact.update(tokens, starts)
    counter.update(tokens, starts)
    assert (native.status()[0] is None) == (counting_kernel == "torch")
    for n in ORDERS:
        expected = Hll(8)
        expected.update(exact.keys(n))
        assert counter.sketches[n].to_bytes() == expected.to_bytes()
        assert counter.sketches[n].registers.any()
        sample = Theta(6)
        sample.add(hash_keys(exact.keys(n))[1])
        assert counter.samples[n].to_bytes() == sample.to_bytes()
        assert len(sample.hashes) > 16


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", "<i4", ">i4", "<u8", "<i8"])
def test_the_type_of_the_tokens_does_not_matter(counting_kernel, dtype):
    tokens, starts = corpus(2)
    assert images(tokens.astype(dtype), starts) == images(tokens.astype(np.uint32), starts)


def images(tokens, starts, **how) -> list[bytes]:
    counter = Counter((1, 2, 9), **how)
    counter.update(tokens, starts)
    return [sketch.to_bytes() for sketch in counter.sketches.values()]


def test_both_kernels_agree_on_long_documents_of_wide_numbers(monkeypatch):
    tokens = np.random.default_rng(3).integers(0, 2**64, 3 * BLOCK + 77, dtype=np.uint64)
    found = {}
    for name in ("c", "torch"):
        monkeypatch.setenv("HALFULP_KERNEL", name)
        native.status.cache_clear()
        found[name] = images(tokens, (0, 5, BLOCK, BLOCK + 1), lg_k=12)
    native.status.cache_clear()
    assert found["c"] == found["torch"]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_how_a_corpus_is_cut_into_calls_does_not_matter(counting_kernel, seed, apart):
    tokens, starts = corpus(seed, documents=7)
    how = {"lg_k": 10, "lg_capacity": 8, "apart": apart}
    whole, pieces = Counter((1, 3, 64), **how), Counter((1, 3, 64), **how)
    whole.update(tokens, starts)
    cuts = np.sort(np.random.default_rng(seed).integers(0, len(tokens), 9))
    edges = [0, *cuts, len(tokens)]
    for low, high in pairwise(edges):
        last = high == len(tokens)
        inside = starts[(starts >= low) & ((starts < high) | last)]
        pieces.update(tokens[low:high], inside - low)
    assert state(whole) == state(pieces)


def state(counter: Counter) -> tuple:
    every = (*counter.sketches.values(), *counter.samples.values())
    return [e.to_bytes() for e in every], counter.occurrences, counter.tokens, counter.documents


def test_any_sharding_and_any_order_give_the_same_bytes(counting_kernel):
    tokens, starts = corpus(4)
    documents = np.split(tokens, starts)[1:]
    how = {"lg_k": 10, "lg_capacity": 7}
    whole = Counter((2, 4), **how)
    whole.update(tokens, starts)
    shards = [Counter((2, 4), **how) for _ in range(3)]
    for i, document in enumerate(documents[::-1]):
        shards[i % 3].update(document)
    for shard in shards[1:]:
        shards[0].merge(shard)
    assert state(shards[0]) == state(whole)
    shards[0].merge(whole)  # the same documents once more
    assert state(shards[0])[0] == state(whole)[0]


def test_estimates_are_near_the_exact_numbers():
    """12 estimates at 4 standard errors: a right one fails with probability < 1e-3."""
    for seed in range(3):
        tokens, starts = corpus(seed, size=200_000, documents=300, words=5000)
        exact = Exact((1, 2, 3, 8), budget_bytes=BUDGET)
        counter = Counter((1, 2, 3, 8), lg_k=12)
        exact.update(tokens, starts)
        counter.update(tokens, starts)
        for n, sketch in counter.sketches.items():
            error = sketch.estimate() / exact.distinct[n] - 1
            assert abs(error) < 4 * rel_std(12)


def test_memory_does_not_grow_with_the_corpus(counting_kernel):
    """Of 11 lengths with samples."""
    counter = Counter((1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32), lg_capacity=14)
    tokens = np.random.default_rng(0).integers(0, 30_000, 2 * BLOCK).astype(np.uint16)
    tracemalloc.start()
    try:
        for _ in range(2):
            counter.update(tokens)
        after_two = tracemalloc.get_traced_memory()[1]
        for _ in range(4):
            counter.update(tokens[::-1])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 1e6 < after_two <= peak < 1.2 * after_two
    assert peak < 64e6


def test_without_a_compiler_numpy_counts_and_the_reason_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("HALFULP_CACHE", str(tmp_path))
    monkeypatch.setenv("CC", "/nonexistent/cc")
    monkeypatch.delenv("HALFULP_KERNEL", raising=False)
    native.status.cache_clear()
    try:
        library, why = native.status()
        assert library is None
        assert "the C kernel cannot be built here" in why
        monkeypatch.setenv("HALFULP_KERNEL", "c")
        native.status.cache_clear()
        with pytest.raises(KernelError, match="HALFULP_KERNEL=c was asked"):
            Counter((1,))
    finally:
        native.status.cache_clear()


@pytest.mark.parametrize(
    ("tokens", "starts", "message"),
    [
        ([1, 2], (1,), "belong to no document"),
        ([1, 2], (0, 3), r"must ascend within 0 … 2"),
        ([1, 2], (0, 2, 1), "must ascend"),
        ([1.5], (0,), "must be a list of integers"),
        ([[1]], (0,), "2 dimensions"),
    ],
)
def test_bad_calls_are_answered(tokens, starts, message):
    with pytest.raises(DataError, match=message):
        Counter((2,)).update(np.array(tokens), starts)


@pytest.mark.parametrize("orders", [(), (0,), (1025,)])
def test_impossible_n(orders):
    with pytest.raises(DataError, match="must lie in 1 … 1024"):
        Counter(orders)


@pytest.mark.parametrize(
    "other", [Counter((2, 3)), Counter((2,), apart=True), Counter((2,), lg_k=9)]
)
def test_unlike_counters_do_not_merge(other):
    with pytest.raises(DataError, match=r"cannot be merged into"):
        Counter((2,)).merge(other)
