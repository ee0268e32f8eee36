import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from halfulp.data import DataConfig, open_data
from halfulp.data.corpus import kind_of, list_files
from halfulp.data.documents import read_documents
from halfulp.errors import DataError, MissingExtraError


def texts(path: Path, key: str = "text") -> list[str]:
    found, held = [], ""
    for file in list_files([str(path)]).files:
        for piece in read_documents(file, key):
            held += piece.text
            if piece.last:
                found.append(held)
                held = ""
    assert held == ""
    return found


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_stdlib_is_sorted_and_without_tests():
    files = list_files(["stdlib"]).files
    names = [file.name for file in files]
    assert names == sorted(names)
    assert len(names) > 300
    assert {"json/decoder.py", "argparse.py"} <= set(names)
    unwanted = {"site-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}
    assert not any(unwanted & set(name.split("/")) for name in names)


def test_a_folder_is_read_recursively_in_order(tmp_path):
    write(tmp_path / "b.md", "B")
    write(tmp_path / "a" / "z.py", "Z\r\n")
    write(tmp_path / "a" / "c.jsonl", '{"text": "C1"}\n\n{"text": "C2"}\n')
    write(tmp_path / ".git" / "x.txt", "hidden")
    write(tmp_path / ".hidden.txt", "hidden")
    write(tmp_path / "a" / "picture.png", b"\x89PNG\r\n\0\0")
    assert texts(tmp_path) == ["C1", "C2", "Z\r\n", "B"]
    assert list_files([str(tmp_path)]).skipped == (str(tmp_path / "a" / "picture.png"),)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.txt", "text"), ("README", "text"), ("a.txt.gz", "text"), ("a.jsonl", "jsonl"),
        ("a.ndjson.gz", "jsonl"), ("c4.json.gz", "jsonl"), ("a.json", "text"),
        ("a.JSONL.zst", "jsonl"), ("a.parquet", "parquet"), ("a.bin", "tokens"),
        ("a.idx", "tokens"),
    ],
)  # fmt: skip
def test_kind_of(name, kind):
    assert kind_of(Path(name)) == kind


def test_compressed_text_is_that_of_the_plain_file(tmp_path):
    plain = "line é\n" * 60_000
    write(tmp_path / "a.txt", plain)
    write(tmp_path / "b.txt.gz", gzip.compress(plain.encode()))
    assert texts(tmp_path / "a.txt") == texts(tmp_path / "b.txt.gz") == [plain]


def test_zstd_reads_frames_in_a_row_and_notices_a_cut(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    first, second = (
        zstandard.compress(json.dumps({"text": t}).encode() + b"\n") for t in ("A" * 9999, "B")
    )
    path = write(tmp_path / "a.jsonl.zst", first + second)
    assert texts(path) == ["A" * 9999, "B"]
    write(path, first + second[:-3])
    with pytest.raises(DataError, match=r"a\.jsonl\.zst is broken or cut off.*after line 1"):
        texts(path)
    write(path, b"no zstd at all")
    with pytest.raises(DataError, match="broken or cut off"):
        texts(path)


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.zst", "x")
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"halfulp\[data\]"):
        texts(path)


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"body": ["eins", "zwei"], "n": [1, 2]}), path)
    assert texts(path, "body") == ["eins", "zwei"]
    with pytest.raises(DataError, match="no column 'text'; its columns are 'body', 'n'"):
        texts(path)
    with pytest.raises(DataError, match=r"'n'.*holds int64"):
        texts(path, "n")
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    parquet.write_table(twice, path)
    with pytest.raises(DataError, match=r"a\.parquet has several columns 'text'"):
        texts(path)
    ends, latin = np.array([0, 1, 3], "<i4"), pyarrow.py_buffer(b"a\xfcb")
    bad = pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, pyarrow.py_buffer(ends), latin])
    parquet.write_table(pyarrow.table({"text": bad}), path)
    with pytest.raises(DataError, match=r"a\.parquet after row 0 is not UTF-8: byte 0 is 0xfc"):
        texts(path)
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(DataError, match=r"a\.parquet row 2 is a NoneType"):
        texts(path)
    write(path, path.read_bytes()[:-20])
    with pytest.raises(DataError, match="broken or cut-off Parquet"):
        texts(path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "cut', r"line 2 is not a JSON value"),
        ("[1, 2]", r"line 2 holds a list"),
        ('{"body": "x", "id": 1}', r"line 2 has no key 'text'; its keys are 'body', 'id'"),
        ('{"text": 7}', r"'text' at .*a\.jsonl line 2 is a int"),
        ('{"text": null}', r"line 2 is a NoneType"),
        ('{"text": "\\ud800"}', r"line 2 holds half of a surrogate pair at character 0"),
        (b'{"text": "\xff"}', r"line 2 is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, says):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path / "a.jsonl", b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=says):
        texts(path)


def test_a_cut_gzip_names_the_line(tmp_path):
    rows = b"".join(b'{"text": "%d"}\n' % i for i in range(50))
    path = write(tmp_path / "a.jsonl.gz", gzip.compress(rows) + gzip.compress(rows)[:-9])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is broken or cut off.*after line"):
        texts(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"abc\0def", r"byte 3 is 0x00 \(binary file\)"),
        (b"caf\xe9 au lait", "byte 3 is 0xe9"),
        (b"x" * (1 << 20) + b"\xff", "byte 1048576 is 0xff"),
        (b"x" * ((1 << 20) - 1) + "é".encode() + b"\xff", "byte 1048577 is 0xff"),
        (b"good \xc3", "byte 5 is 0xc3"),
        ("Grüße".encode("utf-16"), "iconv -f UTF-16"),
        (b"", "is empty"),
    ],
)
def test_a_file_that_is_not_text_is_named_with_the_byte(tmp_path, content, says):
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(DataError, match=says) as caught:
        texts(path)
    assert str(path) in str(caught.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"\xef\xbb\xbfabc")) == ["abc"]


def test_a_missing_path_names_the_nearest(tmp_path):
    write(tmp_path / "data" / "train.jsonl", "x")
    with pytest.raises(DataError, match=r"nearest path is .*data/train\.jsonl"):
        list_files([str(tmp_path / "data" / "trian.jsonl")])
    with pytest.raises(DataError, match=r"nearest path is .*data\."):
        list_files([str(tmp_path / "date" / "deeper" / "x.txt")])


def test_a_folder_without_text_is_refused(tmp_path):
    write(tmp_path / "a.png", b"\0")
    with pytest.raises(DataError, match=r"holds no text \(1 binary files\)"):
        list_files([str(tmp_path)])
    write(tmp_path / "empty" / "__init__.py", "")
    with pytest.raises(DataError, match="all of them empty"):
        open_data(DataConfig(source=(str(tmp_path / "empty"),)), tmp_path / "cache")


def test_text_and_token_files_do_not_mix(tmp_path):
    write(tmp_path / "a.txt", "x")
    write(tmp_path / "a.bin", b"\0\0")
    with pytest.raises(DataError, match="mix token files"):
        list_files([str(tmp_path)])
    with pytest.raises(DataError, match=r"data\.vocab is 99.*is text"):
        open_data(DataConfig(source=(str(tmp_path / "a.txt"),), vocab=99), tmp_path / "cache")
