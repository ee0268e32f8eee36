"""Sketches on disk, their union, and what two of them share."""

import json

import numpy as np
import pytest

from halfulp.corpus.counter import Counter
from halfulp.corpus.overlap import overlap
from halfulp.corpus.sketch_file import Amounts, Definition, Sketch, load, merge, paths_of, save
from halfulp.errors import DataError

WORDS = Definition(sequences="words:2", tokenizer="", normalizer="words 1")


def sketch(
    low: int, high: int, *, definition: Definition = WORDS, lg_k: int = 10, lg_capacity: int = 10
) -> Sketch:
    """Of the single symbols low … high − 1."""
    counter = Counter((1,), lg_k=lg_k, lg_capacity=lg_capacity)
    counter.update(np.arange(low, high))
    amounts = Amounts(documents=1, symbols=high - low, occurrences=high - low, text_bytes=9)
    marks = ((5, 5.25), (high - low, counter.sketches[1].estimate()))
    theta = counter.samples[1]
    return Sketch(
        definition=definition,
        amounts=amounts,
        hll=counter.sketches[1],
        theta=theta,
        checkpoints=marks,
    )


def same(one: Sketch, other: Sketch) -> bool:
    images = [(s.hll.to_bytes(), s.theta.to_bytes()) for s in (one, other)]
    facts = [(s.definition, s.amounts, s.checkpoints) for s in (one, other)]
    return images[0] == images[1] and facts[0] == facts[1]


def test_what_is_saved_is_loaded(tmp_path):
    path, made = tmp_path / "a.hll", sketch(0, 5000)
    save(made, path)
    assert same(load(path), made)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.hll", "a.hll.json", "a.theta"]
    facts = json.loads((tmp_path / "a.hll.json").read_text())
    assert facts["definition"]["sequences"] == "words:2"
    assert facts["distinct"] == pytest.approx(5000, rel=4 * facts["rel_std"])


@pytest.mark.parametrize("index", range(3))
def test_a_missing_file_is_named(tmp_path, index):
    path = tmp_path / "a.hll"
    save(sketch(0, 50), path)
    gone = paths_of(path)[index]
    gone.unlink()
    with pytest.raises(DataError, match=gone.name):
        load(path)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"format": "other"}', '{"format": "halfulp sketch 1"}']
)
def test_a_broken_side_car_is_named(tmp_path, text):
    path = tmp_path / "a.hll"
    save(sketch(0, 50), path)
    paths_of(path)[2].write_text(text)
    with pytest.raises(DataError, match=r"a\.hll\.json does not say what .* Make the sketch again"):
        load(path)


@pytest.mark.parametrize(
    "edit",
    [
        {"distinct": 51.0},
        {"amounts": {"documents": 1, "symbols": 50, "occurrences": "50", "text_bytes": 9}},
        {"amounts": {"documents": 1, "symbols": 50, "occurrences": -50, "text_bytes": 9}},
    ],
)
def test_a_side_car_of_another_sketch_or_edited_is_named(tmp_path, edit):
    path = tmp_path / "a.hll"
    save(sketch(0, 50), path)
    sidecar = paths_of(path)[2]
    facts = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(facts | edit))
    with pytest.raises(DataError, match=r"a\.hll\.json does not say what .* Make the sketch again"):
        load(path)
    sidecar.write_text(json.dumps(facts))
    assert load(path).amounts.occurrences == 50


def test_the_union_is_the_sketch_of_everything():
    whole = sketch(0, 9000)
    for cut in (1, 4000):
        united = merge([sketch(cut, 9000), sketch(0, cut)])
        assert united.hll.to_bytes() == whole.hll.to_bytes()
        assert united.theta.to_bytes() == whole.theta.to_bytes()
        assert united.amounts == Amounts(documents=2, symbols=9000, occurrences=9000, text_bytes=18)
        assert united.checkpoints == ()


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"definition": Definition(sequences="words:3", tokenizer="", normalizer="words 1")},
         "sequences is 'words:2' in one and 'words:3' in another"),
        ({"definition": Definition(sequences="words:2", tokenizer="ab", normalizer="words 1")},
         "tokenizer is '' in one and 'ab'"),
        ({"lg_k": 11}, "lg_k is 10 in one and 11"),
        ({"lg_capacity": 9}, "lg_capacity is 10 in one and 9"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("act", [lambda a, b: merge([a, b]), overlap])
def test_unlike_sketches_are_refused(act, other, named):
    with pytest.raises(DataError, match=f"count unlike things: {named}.*Make both with one"):
        act(sketch(0, 50), sketch(0, 50, **other))


def test_overlap_of_small_corpora_is_counted():
    found = overlap(sketch(0, 600), sketch(400, 1400))
    assert found.exact
    assert (found.common.value, found.common.low, found.common.high) == (200, 200, 200)
    assert found.share_of_a.value == pytest.approx(1 / 3)
    assert found.share_of_b.value == pytest.approx(1 / 5)
    assert (found.jaccard.value, found.compared) == (pytest.approx(1 / 7), 1400)


def test_overlap_of_large_corpora_is_within_its_interval():
    """20 pairs at 95 %: fewer than 15 in the interval has probability 3e-4; none is too wide."""
    hits = 0
    for pair in range(20):
        at = pair * 100_000
        a, b = sketch(at, at + 20_000), sketch(at + 15_000, at + 45_000)
        found = overlap(a, b)
        assert not found.exact
        assert 0.1 < (found.common.high - found.common.low) / found.common.value < 1.5
        hits += found.common.low <= 5000 <= found.common.high
        assert found.share_of_a.low < found.share_of_a.value < found.share_of_a.high
    assert hits >= 15


def test_overlap_of_strangers_and_of_one_corpus_with_itself():
    a, b = sketch(0, 30_000), sketch(30_000, 60_000)
    apart, together = overlap(a, b), overlap(a, a)
    assert (apart.common.value, apart.common.low) == (0, 0)
    assert 0 < apart.common.high < 600
    assert (together.jaccard.value, together.jaccard.high) == (1, 1)
    assert 0.97 < together.jaccard.low < 1


def test_overlap_with_nothing():
    found = overlap(sketch(0, 0), sketch(0, 10))
    assert (found.exact, found.common.value, found.share_of_a.value) == (True, 0, 0)
