import numpy as np
import pytest

from halfulp.data import DataConfig, open_data
from halfulp.data.split import document_ranges, first_tokens, held_out
from halfulp.errors import DataError


def write_documents(folder, count=60, length=400):
    folder.mkdir()
    for i in range(count):
        (folder / f"{i:03}.txt").write_text(f"{i:03} " * (length // 4))
    return str(folder)


def documents_of(tokens) -> set[bytes]:
    return {
        np.asarray(part).astype(np.uint8).tobytes()
        for part in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
    }


def test_no_document_is_on_both_sides(tmp_path):
    config = DataConfig(source=(write_documents(tmp_path / "t"),), val_fraction=0.2)
    data = open_data(config, tmp_path / "c")
    train, val = documents_of(data.train[:]), documents_of(data.val[:])
    assert not train & val
    assert len(train) + len(val) == 60
    assert 6 <= len(val) <= 36
    assert data.describe()["split"].startswith(f"by document: {len(val)} of 60")


def test_the_seed_chooses_and_the_rest_does_not(tmp_path):
    source = (write_documents(tmp_path / "t"),)

    def held(**config):
        data = open_data(DataConfig(source=source, val_fraction=0.2, **config), tmp_path / "c")
        return data.val[:].tolist(), data.digest

    assert held() == held(text_key="other")
    assert held(seed=1) != held()
    assert held(max_tokens=100)[0] == held()[0]
    assert held(max_tokens=100)[1] != held()[1]


def test_max_tokens_keeps_the_first_training_tokens(tmp_path):
    source = (write_documents(tmp_path / "t"),)
    whole = open_data(DataConfig(source=source), tmp_path / "c")
    short = open_data(DataConfig(source=source, max_tokens=777), tmp_path / "c")
    assert short.train[:].tolist() == whole.train[:777].tolist()
    assert short.describe()["train_tokens"] == 777


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.5])
@pytest.mark.parametrize("documents", [50, 1000])
def test_the_share_is_kept(fraction, documents):
    rng = np.random.RandomState(documents)
    keys = rng.randint(0, 2**63, documents).astype(np.uint64)
    sizes = rng.lognormal(5, 1.5, documents).astype(np.int64) + 1
    for seed in range(20):
        chosen = held_out(keys, sizes, fraction, seed)
        if chosen is not None:
            share = sizes[chosen].sum() / sizes.sum()
            assert fraction / 2 <= share <= 3 * fraction
            assert share < 1
        else:
            assert documents == 50


def test_duplicates_stay_together():
    keys = np.repeat(np.arange(500, dtype=np.uint64), 3)
    chosen = held_out(keys, np.full(1500, 10), 0.1, 0)
    assert chosen is not None
    assert len(set(keys[chosen]) & set(keys[~chosen])) == 0
    assert 100 < chosen.sum() < 300


def test_the_split_is_frozen():
    """A change here changes the held-out text of every run ever made."""
    chosen = held_out(np.arange(40, dtype=np.uint64), np.full(40, 100), 0.2, 7)
    assert chosen is not None
    assert np.flatnonzero(chosen).tolist() == [7, 10, 20, 21, 22, 26, 31, 34]


def test_one_gigantic_document_is_split_by_position(tmp_path):
    (tmp_path / "a.txt").write_text("word " * 2000)
    data = open_data(DataConfig(source=(str(tmp_path / "a.txt"),)), tmp_path / "c")
    assert (len(data.train), len(data.val)) == (9500, 501)
    assert "by position: the last 5.00%" in data.describe()["split"]
    assert [*data.train[:], *data.val[:]] == [*b"word " * 2000, 256]


def test_too_little_text_says_how_much_is_needed(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 500)
    data = open_data(DataConfig(source=(str(tmp_path / "a.txt"),)), tmp_path / "c")
    with pytest.raises(DataError, match=r"val split has 26 tokens.*length 64 needs 65.*Give more"):
        data.batch("val", 0, rows=1, length=64, seed=0)
    with pytest.raises(DataError, match=r"train split has 475 tokens.*needs 513"):
        data.windows("train", 512)
    (tmp_path / "a.txt").write_text("xy")
    with pytest.raises(DataError, match="leave 1 held-out tokens"):
        open_data(DataConfig(source=(str(tmp_path / "a.txt"),)), tmp_path / "c")


def test_ranges():
    ends = np.array([3, 5, 5, 9])
    chosen = np.array([True, False, True, True])
    assert document_ranges(ends, chosen).tolist() == [[0, 3], [5, 9]]
    ranges = np.array([[0, 3], [5, 9], [20, 30]])
    for count in [*range(1, 20), 2**63 - 1]:
        kept = first_tokens(ranges, count)
        flat = np.concatenate([np.arange(a, b) for a, b in kept]).tolist()
        assert flat == [*range(3), *range(5, 9), *range(20, 30)][:count]
