import hashlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest

from halfulp.data import DataConfig, open_data
from halfulp.data.token_files import read_token_file
from halfulp.data.tokens import TokenSource, token_dtype, write_tokens
from halfulp.errors import DataError

TOKENS = (np.arange(5000) * 7919 % 1000).astype("<u2")


def open_bin(*paths: Path, **config):
    sources = tuple(map(str, paths))
    return open_data(DataConfig(source=sources, **config), paths[0].parent / ".cache")


def everything(data) -> list[int]:
    return [*data.train[:].tolist(), *data.val[:].tolist()]


def write_megatron(stem: Path, documents: list[list[list[int]]], code: int = 8) -> Path:
    """Documents are lists of sequences."""
    dtype = np.dtype({1: "u1", 4: "<i4", 8: "<u2"}[code])
    sequences = [np.array(s, dtype) for document in documents for s in document]
    lengths = np.array([len(s) for s in sequences], "<i4")
    pointers = (np.cumsum([0, *lengths])[:-1] * dtype.itemsize).astype("<i8")
    marks = np.cumsum([0, *[len(d) for d in documents]]).astype("<i8")
    head = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(lengths), len(marks))
    stem.with_suffix(".idx").write_bytes(
        head + lengths.tobytes() + pointers.tobytes() + marks.tobytes()
    )
    stem.with_suffix(".bin").write_bytes(b"".join(s.tobytes() for s in sequences))
    return stem.with_suffix(".bin")


def test_a_written_file_is_read_back(tmp_path):
    path = tmp_path / "t.bin"
    meta = write_tokens(
        path, [TOKENS[:100], TOKENS[100:]], vocab=1000, tokenizer="hash", end_of_document=999
    )
    assert path.read_bytes() == TOKENS.tobytes()
    assert meta["sha256"] == hashlib.sha256(TOKENS.tobytes()).hexdigest()
    data = open_bin(path)
    assert everything(data) == TOKENS.tolist()
    assert (data.vocab, len(data.val)) == (1000, 250)
    said = data.describe()
    assert said["split"].startswith("by position: the last 5.00%")
    assert said["tokenizer"]["sha256"] == "hash"
    assert "uint16" in said["token_files"][0]


def test_large_vocabularies_are_written_as_uint32(tmp_path):
    write_tokens(tmp_path / "t.bin", [np.array([0, 99_999, 5])], vocab=100_000)
    assert read_token_file(tmp_path / "t.bin").tokens.tolist() == [0, 99_999, 5]
    assert token_dtype(65536) == np.uint16
    assert token_dtype(65537) == np.uint32


def test_a_bare_file_needs_a_vocabulary_and_says_its_type(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(TOKENS.tobytes())
    (tmp_path / "meta.pkl").write_bytes(b"")
    with pytest.raises(DataError, match=r"largest token is 999.*pickle.*t\.bin\.json"):
        open_bin(path)
    data = open_bin(path, vocab=1000)
    assert everything(data) == TOKENS.tolist()
    assert "taken for uint16" in data.describe()["token_files"][0]
    with pytest.raises(DataError, match=r"the token 999 at position \d+, outside .* 999\."):
        open_bin(path, vocab=999)
    (tmp_path / "meta.json").write_text('{"dtype": "uint16", "vocab_size": 1001}')
    assert open_bin(path).vocab == 1001


def test_a_folder_of_shards_is_one_stream(tmp_path):
    for i, part in enumerate(np.array_split(TOKENS, 3)):
        write_tokens(tmp_path / f"s{i}.bin", [part], vocab=1000)
    data = open_bin(tmp_path)
    assert everything(data) == TOKENS.tolist()
    windows = data.batch("train", 0, rows=data.windows("train", 10), length=10, seed=0)
    assert sorted(map(tuple, windows.tolist())) == sorted(
        tuple(TOKENS[i : i + 11].tolist()) for i in range(0, len(data.train) - 10, 10)
    )
    write_tokens(tmp_path / "s9.bin", [TOKENS], vocab=1200)
    with pytest.raises(DataError, match="different vocabularies"):
        open_bin(tmp_path)


@pytest.mark.parametrize(("version", "dtype", "vocab"), [(1, "<u2", 50257), (7, "<u4", 128256)])
def test_the_header_of_modded_nanogpt(tmp_path, version, dtype, vocab):
    path = tmp_path / "t.bin"
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(TOKENS)
    body = TOKENS.astype(dtype).tobytes()
    path.write_bytes(header.tobytes() + body)
    data = open_bin(path)
    assert everything(data) == TOKENS.tolist()
    assert data.vocab == vocab
    path.write_bytes(header.tobytes() + body[:-8])
    with pytest.raises(DataError, match="announces 5000 tokens"):
        open_bin(path)
    header[1] = 3
    path.write_bytes(header.tobytes() + body)
    with pytest.raises(DataError, match="version 3"):
        open_bin(path)


@pytest.mark.parametrize("code", [1, 4, 8])
def test_megatron_documents_are_held_out_whole(tmp_path, code):
    documents = [[[d] * 5, [d] * (1 + d % 7)] for d in range(200)]
    path = write_megatron(tmp_path / "m", documents, code)
    data = open_bin(path, vocab=256, val_fraction=0.1)
    train, val = data.train[:].tolist(), data.val[:].tolist()
    assert not set(train) & set(val)
    assert sorted(train + val) == sorted(t for d in documents for s in d for t in s)
    assert train == sorted(train)
    assert 0.05 < len(val) / (len(train) + len(val)) < 0.3
    assert data.digest == open_bin(path.with_suffix(".idx"), vocab=256, val_fraction=0.1).digest
    with pytest.raises(DataError, match=r"does not say its vocabulary; its largest token is 199"):
        open_bin(path)


def test_broken_megatron_indices(tmp_path):
    path = write_megatron(tmp_path / "m", [[[1, 2]], [[3]]])
    index = path.with_suffix(".idx")
    good = index.read_bytes()
    for content, says in [
        (b"NOTINDEX" + good[8:], r"no Megatron index: it begins with b'NOTINDEX"),
        (good[:20], "has 20 bytes, and what it announces needs 34"),
        (good[:-4], "cut off or multimodal"),
        (good[:17] + b"\x07" + good[18:], "dtype code 7"),
        (good[:34] + struct.pack("<ii", 2, 2) + good[42:], "announces 4"),
        (good[:42] + struct.pack("<qq", 4, 0) + good[58:], "do not follow one another"),
        (good[:-8] + struct.pack("<q", 1), "do not cover its sequences"),
    ]:
        index.write_bytes(content)
        with pytest.raises(DataError, match=says) as caught:
            read_token_file(path)
        assert "m.idx" in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=r"m\.bin does not exist"):
        read_token_file(index)


def test_a_size_that_is_no_multiple_of_the_type(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(b"\1\0\2")
    with pytest.raises(DataError, match="3 bytes of tokens, which is no multiple of 2"):
        open_bin(path, vocab=9)


def test_sidecars_that_are_wrong(tmp_path):
    path, sidecar = tmp_path / "t.bin", tmp_path / "t.bin.json"
    good = write_tokens(path, [TOKENS], vocab=1000)
    for change, says in [
        ({"dtype": "float32"}, "dtype 'float32'"),
        ({"vocab": None}, "vocab None"),
        ({"tokens": 4999}, "holds 5000 tokens, and t.bin.json says 4999"),
        ({"sha256": "0" * 64}, "damaged or was replaced"),
        ({"vocab": 10}, "outside the vocabulary of 10"),
        ({"vocab": True}, "vocab True"),
        ({"vocab": 2**70}, f"vocab {2**70}"),
        ({"dtype": ["uint16"]}, r"dtype \['uint16'\]"),
        ({"documents": "many"}, "'documents' 'many', and a whole number is needed"),
        ({"tokenizer": [1]}, r"'tokenizer' \[1\]"),
    ]:
        sidecar.write_text(json.dumps(good | change))
        with pytest.raises(DataError, match=says):
            open_bin(path)
    sidecar.write_text("{")
    with pytest.raises(DataError, match="is not a JSON object"):
        open_bin(path)


def test_negative_tokens(tmp_path):
    path = tmp_path / "t.bin"
    path.write_bytes(np.array([1, -2], "<i4").tobytes())
    path.with_name("t.bin.json").write_text('{"dtype": "int32", "vocab": 9}')
    with pytest.raises(DataError, match="negative token -2"):
        open_bin(path)


def test_a_tokenizer_is_not_taken_with_token_files(tmp_path):
    write_tokens(tmp_path / "t.bin", [TOKENS], vocab=1000)
    with pytest.raises(DataError, match="tokenized already"):
        open_bin(tmp_path / "t.bin", tokenizer="bpe:500")


def test_a_compressed_token_file_is_refused(tmp_path):
    (tmp_path / "t.bin.gz").write_bytes(b"x")
    with pytest.raises(DataError, match="Decompress it"):
        open_bin(tmp_path / "t.bin.gz", vocab=9)


def test_token_source_slices_like_the_array_it_stands_for():
    rng = np.random.RandomState(0)
    arrays = [rng.randint(0, 99, n).astype(np.uint16) for n in (7, 0, 1, 30, 12)]
    ranges = np.array([[0, 3], [5, 9], [9, 9], [20, 50]])
    source = TokenSource(arrays, ranges)
    whole = np.concatenate([np.concatenate(arrays)[a:b] for a, b in ranges])
    assert len(source) == len(whole)
    assert source.dtype == np.uint16
    for start in range(len(whole) + 2):
        for stop in range(start, len(whole) + 3):
            np.testing.assert_array_equal(source[start:stop], whole[start:stop])
    np.testing.assert_array_equal(source[-5:], whole[-5:])
    with pytest.raises(IndexError, match="steps of 1"):
        source[::2]
