"""When a run counts as hanging: by its own timer, and by the driver's look."""

import os

import pytest

from halfulp.sweep import alive
from halfulp.sweep.alive import GRACE_S, START_S, Watch, beat_file, patience, stack_file


@pytest.fixture
def now(monkeypatch) -> list[float]:
    found = [100.0]
    monkeypatch.setattr("halfulp.sweep.alive.time.monotonic", lambda: found[0])
    return found


@pytest.fixture
def watch(tmp_path) -> Watch:
    found = Watch(tmp_path, 20.0)
    found.begin("a")
    return found


def beat(runs, stamp: int) -> None:
    beat_file(runs, "a").touch()
    os.utime(beat_file(runs, "a"), ns=(stamp, stamp))


def test_the_first_step_may_take_ten_minutes_and_longer_where_the_timeout_is():
    assert START_S == 600
    assert patience(20, started=False) == START_S
    assert patience(2 * START_S, started=False) == 2 * START_S
    assert patience(20, started=True) == 20


def test_a_run_without_a_first_step_is_late_after_the_start_and_the_grace(now, watch):
    now[0] += START_S + GRACE_S
    assert not watch.late("a")
    assert watch.why("a") == ""
    now[0] += 0.1
    assert watch.late("a")
    assert watch.why("a").startswith("no first step for 600 s: its process was stopped")


def test_a_run_is_late_when_its_beat_stands_still(now, watch, tmp_path):
    for stamp in (10**9, 5, 10**18):  # a clock that is set back is still a beat
        beat(tmp_path, stamp)
        assert not watch.late("a")
        now[0] += 20 + GRACE_S
        assert not watch.late("a")
    now[0] += 0.1
    assert watch.late("a")
    assert watch.why("a").startswith("no step for 20 s: its process was stopped")


def test_a_second_try_begins_afresh(now, watch, tmp_path):
    beat(tmp_path, 10**9)
    watch.late("a")
    now[0] += 1000
    assert watch.late("a")
    stack_file(tmp_path, "a").write_text("File …")
    watch.begin("a")
    assert not watch.late("a")
    assert watch.why("a") == ""  # whatever the first try has left
    now[0] += START_S
    assert not watch.late("a")


def test_the_stack_that_a_worker_has_left_comes_first(watch, tmp_path):
    stack_file(tmp_path, "a").write_text("")
    assert watch.why("a") == ""
    stack_file(tmp_path, "a").write_text("File …")
    assert watch.why("a") == "no first step for 600 s; its stack is in a.stalled.1.txt"
    watch.begin("a")
    stack_file(tmp_path, "a").write_text("another")
    assert watch.why("a").endswith("its stack is in a.stalled.2.txt")
    assert (tmp_path / "a.stalled.1.txt").read_text() == "File …"  # the message is still true


def test_the_timer_of_the_worker_counts_from_the_first_step(now, tmp_path, monkeypatch):
    wound: list[float] = []
    monkeypatch.setattr(
        "halfulp.sweep.alive.faulthandler.dump_traceback_later", lambda s, **_: wound.append(s)
    )
    with alive.watched(tmp_path, "a", 20.0) as told:
        told({"event": "start"})
        now[0] += 2
        told({"event": "data"})
        assert set(wound) == {START_S}
        assert not beat_file(tmp_path, "a").exists()
        told({"event": "step"})  # the first one at once
        assert wound[-1] == 20
        assert beat_file(tmp_path, "a").exists()
        count = len(wound)
        told({"event": "step"})  # the next ones at most once a second
        assert len(wound) == count
        now[0] += 1.1
        told({"event": "eval"})
        assert wound[count:] == [20]
    assert not list(tmp_path.iterdir())


def test_a_run_that_raises_leaves_no_files(tmp_path):
    def broken() -> None:
        with alive.watched(tmp_path, "a", 20.0) as told:
            told({"event": "step"})
            raise ValueError("not finite")

    with pytest.raises(ValueError, match="not finite"):
        broken()
    assert not list(tmp_path.iterdir())
