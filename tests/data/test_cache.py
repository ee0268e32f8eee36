import json
import logging
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfulp.data import DataConfig, cache, open_data
from halfulp.errors import DataError


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(50):
        (folder / f"{i:02}.txt").write_text(f"document {i} says hello hello hello\n" * 20)
    return folder


def open_bpe(source: Path, **config):
    asked = DataConfig(source=(str(source),), tokenizer="bpe:270", **config)
    return open_data(asked, source.parent / "cache")


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def grown(folder: Path, age: float = 10) -> None:
    """Make files look older than the two seconds that the cache distrusts."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - age, time.time() - age))


def test_the_second_opening_writes_nothing(source, tmp_path):
    first = open_bpe(source)
    before = stamps(tmp_path / "cache")
    names = {path.suffix for path in before}
    assert {".bin", ".json", ".npz"} <= names
    assert open_bpe(source).digest == first.digest
    assert stamps(tmp_path / "cache") == before
    assert not [path for path in before if path.suffix == ".tmp"]


def test_the_sidecar_says_what_the_file_is(source, tmp_path):
    data = open_bpe(source)
    path = next((tmp_path / "cache" / "tokens").glob("*.bin"))
    meta = json.loads(path.with_name(path.name + ".json").read_text())
    assert meta["dtype"] == "uint16"
    assert meta["documents"] == 50
    assert meta["tokenizer"] == data.describe()["tokenizer"]["sha256"]
    again = open_data(DataConfig(source=(str(path),)), tmp_path / "other")
    assert len(again.train) + len(again.val) == len(data.train) + len(data.val)


def test_changed_text_is_noticed(source):
    first = open_bpe(source)
    file = source / "07.txt"
    file.write_text(file.read_text().replace("hello", "jello"))
    assert open_bpe(source).digest != first.digest


def test_unchanged_files_are_not_read_again(source, tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_SETTLED_SECONDS", -1)
    first = open_bpe(source)
    with monkeypatch.context() as patch:
        patch.setattr("halfulp.data.text_corpus.file_sha256", lambda path: 1 / 0)
        assert open_bpe(source).digest == first.digest
    file = source / "07.txt"
    file.write_text(file.read_text().replace("hello", "jello"))
    assert open_bpe(source).digest != first.digest


def test_freshly_written_files_are_not_remembered(source, tmp_path):
    open_bpe(source)
    grown(source)  # changes the inode's own time, which is still fresh
    open_bpe(source)
    assert not (tmp_path / "cache" / "seen").exists()


@pytest.mark.parametrize("kind", [".bin", ".npz", ".bin.json"])
@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_damaged_tokens_are_made_again(source, tmp_path, caplog, kind, damage):
    first = open_bpe(source)
    tokens = first.train[:].tolist()
    path = next(p for p in (tmp_path / "cache" / "tokens").iterdir() if p.name.endswith(kind))
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:-10])
    with caplog.at_level(logging.WARNING):
        second = open_bpe(source)
    assert (second.digest, second.train[:].tolist()) == (first.digest, tokens)
    assert bool(caplog.messages) == ((kind, damage) != (".npz", "gone"))
    assert path.stat().st_size == len(content)


def test_a_damaged_scan_and_tokenizer_are_made_again(source, tmp_path, caplog):
    first = open_bpe(source)
    for folder in ("documents", "tokenizers"):
        path = next((tmp_path / "cache" / folder).iterdir())
        path.write_bytes(path.read_bytes()[:-10])
    with caplog.at_level(logging.WARNING):
        assert open_bpe(source).digest == first.digest
    assert len(caplog.messages) == 2


def test_processes_may_race(source, tmp_path):
    code = (
        "import sys\nfrom halfulp.data import DataConfig, open_data\n"
        "config = DataConfig(source=(sys.argv[1],), tokenizer='bpe:270')\n"
        "data = open_data(config, sys.argv[2])\n"
        "print(data.digest, int(data.train[:].sum()))"
    )
    racers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", code, str(source), str(tmp_path / "cache")],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    found = {racer.communicate()[0].strip() for racer in racers}
    data = open_bpe(source)
    assert found == {f"{data.digest} {int(data.train[:].sum())}"}
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(TypeError), cache.replacing(path) as file:
        file.writelines([b"new", None])  # pyright: ignore
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_cache_that_cannot_be_written_is_named(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"cannot be written.*choose another cache folder"):
        open_bpe(source)
