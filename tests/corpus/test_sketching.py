"""Sketches of files: the same bytes however the corpus is sharded, on processes and on Ray."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from halfulp.corpus import count
from halfulp.corpus.config import CountConfig
from halfulp.corpus.counter import Counter
from halfulp.corpus.files import corpus_files
from halfulp.corpus.sketch_file import merge
from halfulp.corpus.sketching import Sketched, sketch_corpus
from halfulp.corpus.theta import LG_CAPACITY
from halfulp.errors import NothingLeftError

CONFIG = CountConfig(words=(1, 3), tokens=(4,), windows=(8,), tokenizer="bytes")
NAMES = ["words:1", "words:3", "tokens:4", "window:8"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """30 files of 20 to 3000 random words of a vocabulary of 500."""
    random = np.random.default_rng(0)
    for i in range(30):
        words = random.zipf(1.4, random.integers(20, 3000)) % 500
        (tmp_path / f"{i:02}.txt").write_text(" ".join(f"w{word}" for word in words))
    return tmp_path


@pytest.fixture
def many_shards(monkeypatch) -> None:
    monkeypatch.setattr(count, "SHARD_BYTES", 20_000)


def everything(found: Sketched) -> dict[str, tuple]:
    return {
        name: (sketch.hll.to_bytes(), sketch.theta.to_bytes(), sketch.amounts, sketch.definition)
        for name, sketch in found.sketches.items()
    }


def test_a_sketch_counts_what_is_in_the_files(folder):
    found = sketch_corpus(corpus_files([str(folder)]), CONFIG, jobs=1)
    texts = [path.read_bytes() for path in sorted(folder.iterdir())]
    counter = Counter((4,), lg_k=14, lg_capacity=LG_CAPACITY)
    for text in texts:
        counter.update(np.frombuffer(text, np.uint8))
    assert list(found.sketches) == NAMES
    of_bytes = found.sketches["tokens:4"]
    assert of_bytes.hll.to_bytes() == counter.sketches[4].to_bytes()
    assert of_bytes.theta.to_bytes() == counter.samples[4].to_bytes()
    assert of_bytes.amounts.symbols == of_bytes.amounts.text_bytes == sum(map(len, texts))
    words = {word for text in texts for word in text.split()}
    assert found.sketches["words:1"].theta.estimate() == len(words)
    assert found.sketches["words:1"].definition.normalizer


def test_shards_in_processes_and_by_hand_give_the_same_bytes(folder, many_shards):
    files = corpus_files([str(folder)])
    assert len(count.shards_of(files, CONFIG)) > 3
    whole = sketch_corpus(files, CONFIG, jobs=1)
    told = []
    pool = sketch_corpus(files, CONFIG, jobs=2, tell=lambda *at: told.append(at))
    assert everything(pool) == everything(whole)
    for name in NAMES:
        assert pool.sketches[name].checkpoints == whole.sketches[name].checkpoints
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in folder.iterdir())
    halves = [sketch_corpus(files[at::2], CONFIG, jobs=1) for at in (1, 0)]
    for name, sketch in whole.sketches.items():
        united = merge([half.sketches[name] for half in halves])
        assert united.hll.to_bytes() == sketch.hll.to_bytes()
        assert united.theta.to_bytes() == sketch.theta.to_bytes()
        assert united.amounts == sketch.amounts


@pytest.mark.slow
def test_ray_gives_the_same_bytes(folder, many_shards, monkeypatch):
    """Starts a Ray cluster of its own."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    files = corpus_files([str(folder)])
    whole = sketch_corpus(files, CONFIG, jobs=1)
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        cluster = sketch_corpus(files, CONFIG, ray="auto")
    finally:
        ray.shutdown()
    assert everything(cluster) == everything(whole)


def test_checkpoints_ascend_by_root_two_and_end_at_the_corpus(folder, many_shards):
    found = sketch_corpus(corpus_files([str(folder)]), CONFIG, jobs=1).sketches["words:3"]
    at = [mark for mark, _ in found.checkpoints]
    assert len(at) >= 3
    assert at[-1] == found.amounts.occurrences
    assert all(b >= 1.41 * a for a, b in pairwise(at[:-1]))
    assert found.checkpoints[-1][1] == found.hll.estimate()


def test_an_empty_file_has_no_sequences(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    found = sketch_corpus(corpus_files([str(tmp_path)]), CONFIG, jobs=1)
    assert {name: s.amounts.occurrences for name, s in found.sketches.items()} == dict.fromkeys(
        NAMES, 0
    )


def test_no_text_at_all_is_an_error_of_its_own(tmp_path):
    (tmp_path / "junk.txt").write_bytes(b"\0" * 4000)
    with pytest.raises(NothingLeftError, match=r"nothing is left.*junk\.txt"):
        sketch_corpus(corpus_files([str(tmp_path)]), CONFIG, jobs=1)
