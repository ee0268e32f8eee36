import hashlib
import os
import subprocess
import sys

import pytest
import torch

from halfulp.data import Data, DataConfig, open_data
from halfulp.data.sampling import epoch_order, windows_in
from halfulp.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        (folder / f"{i:02}.txt").write_text("".join(f"{i}:{j} " for j in range(100)))
    return open_data(DataConfig(source=(str(folder),), val_fraction=0.1), folder / ".cache")


def test_a_batch_is_int64_windows_that_start_at_multiples_of_the_length(data):
    batch = data.batch("train", 3, rows=4, length=32, seed=0)
    assert batch.dtype == torch.int64
    assert batch.shape == (4, 33)
    whole = data.train[:].tolist()
    starts = {tuple(whole[i : i + 33]) for i in range(0, len(whole) - 32, 32)}
    assert {tuple(row) for row in batch.tolist()} <= starts
    batch[0, 0] = 1  # a copy, not the file


@pytest.mark.parametrize("split", ["train", "val"])
def test_every_epoch_visits_every_window_once(data, split):
    windows = data.windows(split, 32)
    source = getattr(data, split)[:].tolist()
    expected = sorted(source[i * 32 : i * 32 + 33] for i in range(windows))
    epochs = [
        data.batch(split, epoch, rows=windows, length=32, seed=5).tolist() for epoch in range(3)
    ]
    assert [sorted(epoch) for epoch in epochs] == [expected] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_batch_does_not_depend_on_history_or_on_the_rows_of_others(data):
    late = data.batch("train", 700, rows=6, length=16, seed=1)
    for index in (0, 699, 3, 10_000):
        data.batch("train", index, rows=6, length=16, seed=1)
    epoch_order.cache_clear()
    assert torch.equal(late, data.batch("train", 700, rows=6, length=16, seed=1))
    halves = [data.batch("train", i, rows=3, length=16, seed=1) for i in (1400, 1401)]
    assert torch.equal(late, torch.cat(halves))


def test_the_seed_changes_the_order(data):
    one, two = (data.batch("train", 0, rows=8, length=16, seed=seed) for seed in (1, 2))
    assert not torch.equal(one, two)


def test_the_order_is_frozen():
    """A change here changes what every run ever made has read."""
    assert epoch_order(0, 0, 10).tolist() == [7, 9, 3, 2, 1, 0, 8, 6, 5, 4]
    assert epoch_order(1, 2, 10).tolist() == [4, 7, 8, 5, 3, 1, 6, 9, 0, 2]


@pytest.mark.parametrize(
    ("tokens", "length", "windows"), [(0, 4, 0), (4, 4, 0), (5, 4, 1), (8, 4, 1), (9, 4, 2)]
)
def test_windows_in(tokens, length, windows):
    assert windows_in(tokens, length) == windows


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"split": "test"}, "no split 'test'"),
        ({"index": -1}, "index starts at 0"),
        ({"rows": 0}, "rows at 1"),
        ({"length": 0}, "length 0"),
    ],
)
def test_senseless_requests_are_refused(data, change, says):
    asked = {"split": "train", "index": 0, "rows": 2, "length": 8, "seed": 0} | change
    with pytest.raises(DataError, match=says):
        data.batch(asked.pop("split"), asked.pop("index"), **asked)


def test_stdlib_gives_the_same_batches_in_every_process(tmp_path):
    code = (
        "import hashlib, sys\nfrom halfulp.data import DataConfig, open_data\n"
        "data = open_data(DataConfig(), sys.argv[1])\n"
        "batch = data.batch('train', 123, rows=4, length=128, seed=3)\n"
        "print(data.vocab, data.digest, hashlib.sha256(batch.numpy().tobytes()).hexdigest())"
    )
    found = [
        subprocess.run(
            [sys.executable, "-W", "error", "-c", code, str(tmp_path / cache)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for cache, seed in (("one", "1"), ("two", "2"))
    ]
    data = open_data(DataConfig(), tmp_path / "one")
    batch = data.batch("train", 123, rows=4, length=128, seed=3)
    own = ["257", data.digest, hashlib.sha256(batch.numpy().tobytes()).hexdigest()]
    assert found == [own] * 2
    said = data.describe()
    assert said["documents"] > 300
    assert said["tokens"] == said["train_tokens"] + said["val_tokens"]
    assert said["tokens"] == said["bytes"] + said["documents"]
