"""Everything that a scan counts, against sets of tuples."""

import gzip
import itertools
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from halfulp.corpus import words as words_module
from halfulp.corpus.config import CountConfig
from halfulp.corpus.files import corpus_files
from halfulp.corpus.scan import Counted, Shard, scan
from halfulp.corpus.words import Words
from halfulp.data.tokens import write_tokens

ALONE = r"[\u3001-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003ffff]"
RUN = rf"(?:(?!{ALONE})[A-Za-z0-9_\x80-\u2fff\u3001-\U0010ffff])+"
WORD = re.compile(rf"{ALONE}|{RUN}|[^\s\u3000]", re.ASCII)


def words_of(text: str) -> tuple[str, ...]:
    return tuple(WORD.findall(text))


def distinct(documents, n: int, *, apart: bool = False) -> set:
    step = n if apart else 1
    return {d[i : i + n] for d in documents for i in range(0, len(d) - n + 1, step)}


def occurrences(documents, n: int) -> int:
    return sum(max(0, len(d) - n + 1) for d in documents)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    chance = random.Random(0)
    vocabulary = ["loss", "round_off", "x1", "Größe", "誤差", "(", ")", "==", "a" * 70, "abcdefgh",
                  "abcdefghi", "b" * 17]  # fmt: skip
    return [
        "".join(
            chance.choice(vocabulary) + chance.choice([" ", "\n", "  \t", "\r\n", ""])
            for _ in range(chance.randrange(0, 400))
        )
        for _ in range(60)
    ] + ["", " \n ", "one"]


def counted(paths, **options) -> Counted:
    files = corpus_files([str(path) for path in paths])
    return scan(Shard(0, tuple(enumerate(files)), CountConfig(**options), 0))


def test_words_lines_and_documents_are_those_of_a_set(tmp_path: Path, texts):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in texts).encode()))
    found = counted([path], words=(1, 2, 3, 5, 9))
    documents = [words_of(text) for text in texts]
    for n in (1, 2, 3, 5, 9):
        tally = found.tallies[f"words:{n}"]
        assert tally.sample.exact
        assert tally.sample.distinct == len(distinct(documents, n))
        assert tally.occurrences == occurrences(documents, n)
    filled = [d for d in documents if d]
    assert found.tallies["documents"].occurrences == len(filled)
    assert found.tallies["documents"].sample.distinct == len(set(filled))
    assert found.empty_documents == len(documents) - len(filled)
    lines = [words_of(line) for text in texts for line in text.split("\n")]
    lines = [line for line in lines if line]
    assert found.tallies["lines"].occurrences == len(lines)
    assert found.tallies["lines"].sample.distinct == len(set(lines))


@pytest.mark.parametrize(("size", "count"), [(2, 1), (7, 3), (64, 20), (1000, 63)])
def test_where_pieces_are_cut_changes_nothing(texts, size, count):
    whole, cut = Words(), Words()
    for text in texts[:count]:
        data = text.encode()
        pieces = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
        last = np.arange(len(pieces)) == len(pieces) - 1
        expected = whole.feed([data], np.array([True]))
        parts = [cut.feed([p], np.array([end])) for p, end in zip(pieces, last, strict=True)]
        for name in ("words", "lines", "documents"):
            joined = np.concatenate([_keys(part, name) for part in parts])
            np.testing.assert_array_equal(joined, _keys(expected, name))


def test_a_long_word_is_cut_at_its_own_multiples(monkeypatch):
    monkeypatch.setattr(words_module, "LONGEST", 100)
    data = b"a" * 250 + b" " + b"b" * 100 + b"c" * 7
    whole = Words().feed([data], np.array([True])).words
    assert len(whole) == 5
    assert whole[0] == whole[1]
    cut = Words()
    parts = [cut.feed([data[i : i + 33]], np.array([False])).words for i in range(0, len(data), 33)]
    parts.append(cut.feed([b""], np.array([True])).words)
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_every_different_word_has_a_symbol_of_its_own():
    alphabet = "ab"
    every = [
        "".join(letters) for n in range(1, 15) for letters in itertools.product(alphabet, repeat=n)
    ]
    every += [alphabet[0] * n for n in range(20, 300)]
    found = Words().feed([" ".join(every).encode()], np.array([True])).words
    assert len(np.unique(found)) == len(every)


@pytest.mark.parametrize("apart", [False, True])
def test_token_files_are_counted_by_document(tmp_path: Path, apart):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 4, int(n)) for n in rng.integers(0, 300, 50)]
    stream = [np.append(d, 9) for d in documents]
    path = tmp_path / "a.bin"
    write_tokens(path, stream, vocab=10, end_of_document=9)
    lengths = (1, 2, 3, 5, 40)
    found = counted([path], **{"windows" if apart else "tokens": lengths})
    tuples = [tuple(d.tolist()) for d in documents]
    for n in lengths:
        tally = found.tallies[f"{'window' if apart else 'tokens'}:{n}"]
        assert tally.sample.distinct == len(distinct(tuples, n, apart=apart))
        expected = sum(len(d) // n for d in tuples) if apart else occurrences(tuples, n)
        assert tally.occurrences == expected
    assert found.tallies["documents"].sample.distinct == len({d for d in tuples if d})


def test_a_tokenizer_counts_bytes_of_text(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_text("abab\n")
    found = counted([path], tokens=(1, 2), tokenizer="bytes")
    assert found.tallies["tokens:1"].sample.distinct == 3
    assert found.tallies["tokens:2"].sample.distinct == 3
    assert found.tallies["tokens:2"].occurrences == 4


def test_a_shard_at_a_time_or_all_at_once_is_the_same(tmp_path: Path, texts):
    for i, text in enumerate(texts):
        (tmp_path / f"{i:02d}.txt").write_text(text)
    files = tuple(enumerate(corpus_files([str(tmp_path)])))
    config = CountConfig(words=(1, 3, 8), keep=1000)  # few enough to be sampled
    whole = scan(Shard(0, files, config, 0))
    parts = [scan(Shard(i, files[i::3], config, 0)) for i in range(3)]
    merged = Counted()
    for part in (parts[2], parts[0], parts[1]):
        merged.merge(part)
    assert not whole.tallies["words:8"].sample.exact
    for name, tally in whole.tallies.items():
        other = merged.tallies[name]
        np.testing.assert_array_equal(tally.steps, other.steps)
        assert tally.sample.shift == other.sample.shift
        np.testing.assert_array_equal(tally.sample.keys, other.sample.keys)
        np.testing.assert_array_equal(tally.sample.priorities, other.sample.priorities)


def _keys(batch, name: str) -> np.ndarray:
    found = getattr(batch, name)
    return found if name == "words" else found.keys


def test_text_jsonl_and_parquet_count_alike(tmp_path: Path, texts):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i:02d}.txt").write_bytes(text.encode())
    rows, table = tmp_path / "a.jsonl", tmp_path / "a.parquet"
    rows.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    parquet.write_table(pyarrow.table({"body": texts}), table)
    found = [counted([path], words=(1, 4), text_key="body") for path in (folder, rows, table)]
    for name in ("documents", "lines", "words:1", "words:4"):
        tallies = [one.tallies[name] for one in found]
        assert len({tally.occurrences for tally in tallies}) == 1
        for tally in tallies[1:]:
            np.testing.assert_array_equal(
                np.unique(tally.sample.keys), np.unique(tallies[0].sample.keys)
            )
    assert found[0].empty_documents + 1 == found[1].empty_documents  # a file of 0 bytes is none
    assert found[1].empty_documents == found[2].empty_documents


@pytest.mark.usefixtures("counting_kernel")
def test_the_thresholds_of_other_shards_change_nothing_in_the_union(tmp_path: Path):
    random = np.random.default_rng(0)
    files = []
    for name in ("a.bin", "b.bin"):
        write_tokens(tmp_path / name, [random.integers(0, 500, 30_000)], vocab=500)
        files += corpus_files([str(tmp_path / name)])
    config = CountConfig(tokens=(1, 2, 8), keep=4000)
    parts = [scan(Shard(i, ((i, file),), config, 0)) for i, file in enumerate(files)]
    shifts = {name: tally.sample.shift for name, tally in parts[0].tallies.items()}
    assert shifts["tokens:8"] > 2
    begun = scan(Shard(1, ((1, files[1]),), config, 0, shifts))
    unions = []
    for second in (parts[1], begun):
        union = scan(Shard(0, ((0, files[0]),), config, 0))
        union.merge(second)
        unions.append(union)
    for name, tally in unions[0].tallies.items():
        other = unions[1].tallies[name]
        for part in ("shift", "keys", "priorities", "least"):
            np.testing.assert_array_equal(getattr(tally.sample, part), getattr(other.sample, part))
        np.testing.assert_array_equal(tally.steps, other.steps)
