import random

import pytest
import torch
from safetensors.torch import load_file

from halfulp.errors import ConfigError
from halfulp.run import Run
from halfulp.train.config import load_config
from halfulp.train.cursor import Cursor, cursor_at_start
from halfulp.train.loop import train
from halfulp.train.open import Start, open_session
from halfulp.train.parallel import open_world
from halfulp.train.sharpness import measure_gnb
from halfulp.train.step import batch_of, run_step


def taken(cursor: Cursor, count: int) -> list[int]:
    """The positions of the next steps."""
    found = []
    for _ in range(count):
        found.append(cursor.position)
        cursor.advance()
    return found


def test_batches_come_one_after_another_but_for_the_skipped_ones():
    assert taken(cursor_at_start(()), 4) == [0, 1, 2, 3]
    assert taken(cursor_at_start((0, 1, 4)), 4) == [2, 3, 5, 6]


@pytest.mark.parametrize("seed", range(5))
def test_equals_a_set_of_positions(seed):
    chance, cursor, without = random.Random(seed), Cursor(), set[int]()
    for _ in range(8):
        first = chance.randrange(-5, 60)
        last = first + chance.randrange(-2, 12)
        positions = set(range(max(0, first), last + 1))
        assert cursor.skip(first, last) == len(positions - without)
        without |= positions
    assert [p for p in range(80) if cursor.is_skipped(p)] == sorted(without)
    allowed = [p for p in range(200) if p not in without]
    cursor.settle()
    assert [cursor.ahead(k) for k in range(5)] == allowed[:5]
    again = Cursor()
    again.load(cursor.state())
    assert again == cursor
    assert taken(again, 30) == allowed[:30]


def test_long_lists_are_no_slower_than_short_ones():
    cursor = cursor_at_start(range(0, 200_000, 2))
    assert len(cursor.skipped) == 100_000
    assert taken(cursor, 3) == [1, 3, 5]
    assert cursor_at_start(range(100_000)).skipped == [(0, 99_999)]


def test_going_back_does_not_bring_skipped_batches_back():
    cursor = Cursor(position=9)
    cursor.skip(7, 9)
    cursor.settle()
    assert cursor.position == 10
    cursor.position = 5
    assert taken(cursor, 4) == [5, 6, 10, 11]


def test_a_run_that_skips_is_one_whose_corpus_lacks_the_batch(make_config):
    """Every place that looks at batches sees the same ones: steps, looks ahead, sharpness."""
    config = make_config(train={"skip": [1, 2], "accumulate": 2})
    plain = make_config("plain", train={"accumulate": 2})

    def batches(config, ahead):
        with (
            open_world(config.train) as world,
            open_session(config, world, Start(command=("test",)), None) as s,
        ):
            return [torch.stack([batch_of(s, m, ahead=a) for m in (0, 1)]) for a in ahead]

    found = batches(config, (0, 1, 2))
    expected = batches(plain, (0, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_sharpness_is_measured_on_the_batch_that_comes_next(make_config, monkeypatch):
    from halfulp.train import sharpness

    seen: list[torch.Tensor] = []
    take = sharpness.batch_of
    monkeypatch.setattr(
        sharpness, "batch_of", lambda s, m, **how: seen.append(take(s, m, **how)) or seen[-1]
    )
    config = make_config(train={"skip": [1, 3]})
    with (
        open_world(config.train) as world,
        open_session(config, world, Start(command=("test",)), None) as s,
    ):
        run_step(s, interrupted=False)
        s.step += 1
        s.cursor.advance()
        measure_gnb(s, draws=3, key=0)
        data, train_ = s.data, config.train
        wanted = [data.batch("train", i, rows=train_.rows, length=32, seed=0) for i in (2, 4, 5)]
    assert len(seen) == 3
    assert all(torch.equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_skipping_changes_the_run_and_not_its_length(make_config):
    plain = train(make_config("plain"))
    skips = train(make_config("skips", train={"skip": [5]}))
    losses = [
        [e["loss_nats"] for e in Run.open(run.path, writer=False).events("step")]
        for run in (plain, skips)
    ]
    assert losses[0][:5] == losses[1][:5]
    assert losses[0][5] != losses[1][5]
    assert plain.tokens == skips.tokens
    a, b = (
        load_file(r.path / "checkpoints/step-00000012/model.safetensors") for r in (plain, skips)
    )
    assert not all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        ([3, -1], "train.skip = -1 is no batch: they are counted from 0"),
        (list(range(11)), "train.skip names 11 batches, more than the 10 that the run trains on"),
    ],
)
def test_positions_that_cannot_be_meant_are_refused(skip, message):
    with pytest.raises(ConfigError, match=message):
        load_config({"train": {"skip": skip, "steps": 10}})
