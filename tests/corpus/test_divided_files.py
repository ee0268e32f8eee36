"""One large file in parts: the same figures as in one piece."""

import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from halfulp.corpus import count as counting
from halfulp.corpus import lines as lines_module
from halfulp.corpus.config import CountConfig
from halfulp.corpus.count import count, shards_of
from halfulp.corpus.files import corpus_files
from halfulp.corpus.lines import lines_in
from halfulp.corpus.scan import Counted
from halfulp.corpus.sketching import sketch_corpus
from halfulp.corpus.stats import stats_of
from halfulp.data.corpus import SourceFile
from halfulp.data.tokens import write_tokens
from halfulp.errors import DataError, NothingLeftError

WHOLE = 1 << 25


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """230 KB with a byte order mark, blank lines, long lines, and no line break at its end."""
    chance = random.Random(0)
    lines = [
        " ".join(str(int(chance.paretovariate(0.8)) % 3000) for _ in range(chance.randrange(40)))
        for _ in range(4000)
    ]
    lines[700] = "x" * 30_000
    lines[1500] = "y " * 15_000
    lines[2000:2100] = ["", "   "] * 50
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff".encode() + "\n".join([*lines, "Größe 誤差 the end"]).encode())
    return path


def counted(monkeypatch, path: Path, config: CountConfig, shard_bytes: int) -> Counted:
    monkeypatch.setattr(counting, "SHARD_BYTES", shard_bytes)
    return count(corpus_files([str(path)]), config, jobs=1)


def assert_alike(one: Counted, other: Counted, *, units: bool = True) -> None:
    assert one.tallies.keys() == other.tallies.keys()
    for name, tally in one.tallies.items():
        mine, theirs = tally.sample, other.tallies[name].sample
        assert mine.shift == theirs.shift
        assert tally.occurrences == other.tallies[name].occurrences
        np.testing.assert_array_equal(np.unique(mine.keys), np.unique(theirs.keys))
        if units:
            np.testing.assert_array_equal(tally.steps, other.tallies[name].steps)
            np.testing.assert_array_equal(mine.keys, theirs.keys)
            np.testing.assert_array_equal(mine.priorities, theirs.priorities)
    assert one.text_bytes == other.text_bytes
    assert one.empty_documents == other.empty_documents
    assert one.notes == other.notes


def growths(path: Path, config: CountConfig, found: Counted) -> dict:
    return stats_of([str(path)], corpus_files([str(path)]), config, found).counts


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("shard_bytes", [1500, 20_000])
def test_a_text_in_parts(monkeypatch, text, split, shard_bytes):
    config = CountConfig(words=(1, 2, 8, 300), keep=20_000, split=split)
    whole = counted(monkeypatch, text, config, WHOLE)
    parts = counted(monkeypatch, text, config, shard_bytes)
    assert len(shards_of(corpus_files([str(text)]), config)) > 8
    assert_alike(whole, parts)
    assert not whole.tallies["words:8"].sample.exact
    assert growths(text, config, whole) == growths(text, config, parts)
    assert parts.tallies["documents"].occurrences == 1


def test_sketches_of_a_text_in_parts(monkeypatch, text):
    config = CountConfig(words=(1, 300), tokens=(1, 9), tokenizer="bytes")
    sketches = []
    for shard_bytes in (WHOLE, 5000):
        monkeypatch.setattr(counting, "SHARD_BYTES", shard_bytes)
        sketches.append(sketch_corpus(corpus_files([str(text)]), config, jobs=1).sketches)
    for name, sketch in sketches[0].items():
        other = sketches[1][name]
        assert sketch.amounts == other.amounts
        assert sketch.hll.to_bytes() == other.hll.to_bytes()
        assert sketch.theta.to_bytes() == other.theta.to_bytes()


def test_a_tokenized_text_is_cut_between_full_lines(monkeypatch, text):
    config = CountConfig(tokens=(1, 5, 40), words=(2,), tokenizer="bytes")
    whole = counted(monkeypatch, text, config, WHOLE)
    assert_alike(whole, counted(monkeypatch, text, config, 4000), units=False)


def test_windows_of_text_need_all_that_comes_before(monkeypatch, text):
    monkeypatch.setattr(counting, "SHARD_BYTES", 1500)
    config = CountConfig(windows=(8,), tokenizer="bytes")
    assert len(shards_of(corpus_files([str(text)]), config)) == 1


@pytest.mark.parametrize("marks", ["token", "index", "none"])
def test_a_token_file_in_parts(monkeypatch, tmp_path, marks):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, int(n)) for n in rng.geometric(1 / 400, 300)]
    documents[10:10] = [np.empty(0, np.int64)] * 3 + [rng.integers(0, 50, 9000)]
    path = tmp_path / "a.bin"
    if marks == "index":
        _write_megatron(path, documents)
    else:
        end = 50 if marks == "token" else None
        stream = [np.append(d, 50) for d in documents] if marks == "token" else documents
        write_tokens(path, stream, vocab=51, end_of_document=end)
    config = CountConfig(tokens=(1, 3, 70), windows=(7, 16), keep=20_000)
    whole = counted(monkeypatch, path, config, WHOLE)
    for shard_bytes in (4000, 20_000):
        parts = counted(monkeypatch, path, config, shard_bytes)
        assert len(shards_of(corpus_files([str(path)]), config)) > 8
        # Where documents are marked by a token, a part knows where one begins, not its number.
        assert_alike(whole, parts, units=marks != "token")
        assert parts.tallies["documents"].occurrences == (
            1 if marks == "none" else sum(1 for d in documents if len(d))
        )


def _write_megatron(path: Path, documents: list[np.ndarray]) -> None:
    lengths = np.array([len(d) for d in documents], "<i4")
    pointers = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * 2
    head = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([8])
    head += np.array([len(documents), len(documents) + 1], "<u8").tobytes()
    marks = np.arange(len(documents) + 1, dtype="<i8")
    path.with_suffix(".idx").write_bytes(
        head + lengths.tobytes() + pointers.astype("<i8").tobytes() + marks.tobytes()
    )
    np.concatenate(documents).astype("<u2").tofile(path)


def test_a_parquet_file_in_parts(monkeypatch, tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [f"{i % 90} of {i // 7} and {i % 13}" for i in range(5000)]
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"number": list(range(5000)), "text": rows})
    parquet.write_table(table, path, row_group_size=150)
    config = CountConfig(words=(1, 3), keep=2000)
    whole = counted(monkeypatch, path, config, WHOLE)
    assert_alike(whole, counted(monkeypatch, path, config, 3000))
    assert whole.tallies["documents"].occurrences == 5000


def test_a_jsonl_file_in_parts(monkeypatch, tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [json.dumps({"text": f"{i % 90} of {i // 7}" * (1 + i % 200)}) for i in range(300)]
    path.write_text("\n".join(rows))
    config = CountConfig(words=(1, 3))
    whole = counted(monkeypatch, path, config, WHOLE)
    for shard_bytes in (1000, 20_000):
        assert_alike(whole, counted(monkeypatch, path, config, shard_bytes), units=False)


def test_the_lines_of_parts_are_all_lines_once(monkeypatch, tmp_path):
    monkeypatch.setattr(lines_module, "BLOCK", 7)
    path = tmp_path / "a.txt"
    data = b"\n\nab\nc\n\n  d\ne f\n" + b"g" * 40 + b"\nh\ni\n \nj\nk" * 2
    path.write_bytes(data)
    for clean in (False, True):
        for size in (1, 2, 3, 5, 8, 13, 21, 34, 55):
            edges = [*range(0, len(data), size), len(data)]
            spans = [
                lines_in(SourceFile("text", path, "a", a, b), clean=clean)
                for a, b in pairwise(edges)
            ]
            spans = [(a, b) for a, b in spans if a < b]
            assert b"".join(data[a:b] for a, b in spans) == data
            for a, _ in spans[1:]:
                assert data[a - 1 : a] == b"\n"
                assert not clean or not (data[a - 2 : a - 1] + data[a : a + 1]).isspace()


def test_a_part_that_is_no_text_is_left_out_and_named(monkeypatch, text):
    config = CountConfig(words=(1,))
    data = bytearray(text.read_bytes())
    data[70_000] = 0
    text.write_bytes(data)
    found = counted(monkeypatch, text, config, 30_000)
    ((place, why),) = found.notes.skipped.items()
    assert place.startswith(f"{text}, bytes 60,")
    assert "NUL" in why
    assert 0.8 * len(data) < found.text_bytes < 0.9 * len(data)
    text.write_text("no text\n" * 30_000, encoding="utf-16")
    with pytest.raises(NothingLeftError, match=r"are no text.*bytes 0 to.*begins like UTF-16"):
        counted(monkeypatch, text, config, 50_000)


def test_a_text_that_was_stopped_in_the_middle_is_resumed(monkeypatch, text, tmp_path):
    config = CountConfig(words=(1, 300), keep=20_000, split=True)
    whole = counted(monkeypatch, text, config, 20_000)
    progress, real, stop = tmp_path / "progress.npz", counting.scan, [5]

    def failing(shard, watch=None):
        if shard.index in stop:
            raise DataError("no more")
        return real(shard, watch)

    monkeypatch.setattr(counting, "scan", failing)
    files = corpus_files([str(text)])
    with pytest.raises(DataError, match="no more"):
        count(files, config, jobs=1, progress_file=progress)
    stop.clear()
    assert_alike(whole, count(files, config, jobs=1, progress_file=progress, resume=True))
    assert not progress.exists()
