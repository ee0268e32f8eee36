import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers

from halfulp.data import DataConfig, documents, open_data
from halfulp.data.tokenizer import END, Bytes, load_tokenizer, train_bpe
from halfulp.errors import DataError

WORDS = "the quick brown fox jumps over the lazy dog and runs away from the slow bear "
TEXT = "".join(f"{WORDS[i % 40 :]}{i}\n" for i in range(300))


def test_bytes_are_utf8():
    ids = Bytes().encode(["aé"])[0]
    assert ids.tolist() == [97, 0xC3, 0xA9]
    assert (Bytes().vocab, Bytes().end) == (257, 256)


def test_bpe_has_the_size_asked_for_and_round_trips(tmp_path):
    path = tmp_path / "t.json"
    path.write_bytes(train_bpe([TEXT], 300))
    tokenizer = load_tokenizer(path)
    assert tokenizer.vocab == 300
    text = f"the dog {END} Grüße \n\n 3"
    ids = tokenizer.encode([text])[0]
    assert tokenizer.end not in ids  # a name inside a text is plain text
    assert tokenizer.inner.decode(ids.tolist(), skip_special_tokens=False) == text
    assert len(tokenizer.encode([TEXT])[0]) < 0.7 * len(TEXT)


def test_bpe_is_the_same_in_another_process():
    code = (
        "import hashlib\nfrom halfulp.data.tokenizer import train_bpe\n"
        f"print(hashlib.sha256(train_bpe([{TEXT!r}], 290)).hexdigest())"
    )
    found = {
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {hashlib.sha256(train_bpe([TEXT], 290)).hexdigest()}


def test_bpe_learns_from_a_word_of_any_length_in_time():
    """Whole, this word takes 4 minutes and one of a whole piece hours."""
    letters = np.random.default_rng(0).choice(list("ACGT"), 120_000)
    begin = time.monotonic()
    content = train_bpe(["".join(letters)], 300)
    assert time.monotonic() - begin < 20
    assert json.loads(content)["pre_tokenizer"]["type"] == "ByteLevel"


def test_bpe_larger_than_the_text_allows_says_what_it_allows():
    with pytest.raises(DataError, match=r"Ask for 'bpe:2[0-9][0-9]' or fewer"):
        train_bpe(["abab"], 4096)


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", " "), TEXT.replace("\n", "\r\n\n  ")])
def test_pieces_of_a_long_document_give_the_tokens_of_the_whole(tmp_path, monkeypatch, text):
    source, tokenizer = tmp_path / "a.txt", tmp_path / "t.json"
    source.write_bytes(text.encode())
    tokenizer.write_bytes(train_bpe([text], 280))
    monkeypatch.setattr(documents, "PIECE", 1000)
    config = DataConfig(source=(str(source),), tokenizer=str(tokenizer))
    data = open_data(config, tmp_path / "cache")
    whole = load_tokenizer(tokenizer).encode([text])[0]
    found = np.concatenate([data.train[:], data.val[:]])
    assert found[:-1].tolist() == whole.tolist()


def test_a_text_without_spaces_is_cut_anywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 1000)
    (tmp_path / "a.txt").write_text("é" * 5001)
    data = open_data(DataConfig(source=(str(tmp_path / "a.txt"),)), tmp_path / "cache")
    assert len(data.train) + len(data.val) == 10003


def test_bpe_is_trained_on_the_training_documents_only(tmp_path):
    rows = [f"{c * 40} " * 30 for c in "abcdefghijklmnopqrstuvwxyz"]
    folder = tmp_path / "text"
    folder.mkdir()
    for i, row in enumerate(rows):
        (folder / f"{i:02}.txt").write_text(row)
    config = DataConfig(source=(str(folder),), tokenizer="bpe:285", val_fraction=0.1)
    data = open_data(config, tmp_path / "cache")
    tokenizer = load_tokenizer(next((tmp_path / "cache" / "tokenizers").iterdir()))
    plain = [len(ids) == len(row) for ids, row in zip(tokenizer.encode(rows), rows, strict=True)]
    held = int(data.describe()["split"].split()[2])
    assert sum(plain) == held > 0


def test_a_users_tokenizer(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe([TEXT], 270))
    (tmp_path / "a.txt").write_text(TEXT)
    config = DataConfig(source=(str(tmp_path / "a.txt"),), tokenizer=str(tmp_path))
    found = open_data(config, tmp_path / "cache").describe()
    assert found["tokenizer"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["vocab"] == 270


def test_a_tokenizer_without_an_end_says_what_it_looked_for(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    inner.add_special_tokens(["<stop>"])
    inner.save(str(tmp_path / "t.json"))
    with pytest.raises(DataError, match=r"</s>.*its added tokens are <stop>"):
        load_tokenizer(tmp_path / "t.json")


def test_truncation_and_padding_of_the_file_are_not_obeyed(tmp_path):
    inner = tokenizers.Tokenizer.from_str(train_bpe([TEXT], 270).decode())
    inner.enable_truncation(4)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "t.json"))
    first, second = load_tokenizer(tmp_path / "t.json").encode(["qqqqqqqqqq", "q"])
    assert (len(first), len(second)) == (10, 1)


def test_a_bad_tokenizer_is_named(tmp_path):
    with pytest.raises(DataError, match=r"'bytes', 'bpe:N' or a file.*nearest path"):
        load_tokenizer(tmp_path / "byte")
    (tmp_path / "t.json").write_text('{"model": 3}')
    with pytest.raises(DataError, match=r"t\.json is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "t.json")
