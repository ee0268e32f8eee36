import pytest

from halfulp.errors import ConfigError
from halfulp.guard import ring as ring_module
from halfulp.guard.ring import Ring, Snapshot, available_bytes, check_memory


def filled(until: int, *, every: int = 50, kept: int = 4, quiet: bool = True) -> Ring:
    """The ring after `until` quiet steps."""
    ring = Ring(every, kept)
    ring.put(Snapshot(0, {}, {}))
    for step in range(1, until + 1):
        if quiet:
            ring.settle(step)
        if ring.due(step):
            ring.put(Snapshot(step, {}, {}))
    return ring


def steps(ring: Ring) -> list[int]:
    return [s.step for s in ring.snapshots]


def before(ring: Ring, step: int) -> int | None:
    """Step of the snapshot to go back to."""
    found = ring.before(step)
    return found.step if found else None


def test_the_newest_are_kept_and_older_ones_far_apart():
    assert steps(filled(100)) == [0, 50, 100]
    assert steps(filled(800)) == [0, 600, 650, 700, 750, 800]
    for until in range(1000, 3001, 50):
        oldest, second, *newest = steps(filled(until))
        assert 250 <= until - oldest <= 800
        assert until - second == 200
        assert newest == [until - 150, until - 100, until - 50, until]


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_there_are_never_more_than_it_says(kept):
    ring, largest = Ring(10, kept), 0
    ring.put(Snapshot(0, {}, {}))
    for step in range(1, 3000):
        ring.settle(step)
        if ring.due(step):
            ring.put(Snapshot(step, {}, {}))
        largest = max(largest, len(ring.snapshots))
    assert kept < largest <= ring.most


def test_a_snapshot_is_good_after_as_many_quiet_steps_as_lie_between_two():
    ring = filled(149)
    assert [(s.step, s.good) for s in ring.snapshots] == [(0, True), (50, True), (100, False)]
    ring.settle(150)
    assert all(s.good for s in ring.snapshots)


def test_the_last_good_one_is_never_evicted():
    ring = filled(0)
    for step in range(50, 2001, 50):  # never quiet
        ring.put(Snapshot(step, {}, {}))
    assert steps(ring) == [0, 1850, 1900, 1950, 2000]
    assert before(ring, 1990) == 0


def test_an_incident_takes_what_may_hold_its_beginning():
    ring = filled(130)
    ring.disturb()
    assert steps(ring) == [0, 50]


@pytest.mark.parametrize(("step", "found"), [(149, 100), (100, 100), (99, 50), (-80, 0)])
def test_the_newest_good_one_before_a_step_or_the_oldest(step, found):
    assert before(filled(160), step) == found


def test_going_back_forgets_what_came_after():
    ring = filled(160)
    ring.forget_after(100)
    assert steps(ring) == [0, 50, 100]
    assert not ring.due(100)
    assert ring.due(150)


def test_nothing_to_go_back_to():
    assert before(Ring(), 5) is None


def test_a_ring_that_does_not_fit_says_how_much_it_needs_and_how_many_would_fit(monkeypatch):
    monkeypatch.setattr(ring_module, "available_bytes", lambda: 13 * 2**30)
    check_memory(2**30, 7, "guard.snapshots")
    check_memory(2**29, 7, "guard.snapshots", processes=3)
    with pytest.raises(ConfigError) as error:
        check_memory(2 * 2**30, 7, "guard.snapshots")
    said = str(error.value)
    assert "7 snapshots needs 14.00 GiB of memory (2.00 GiB each) and 13.00 GiB are free" in said
    assert "Give guard.snapshots = 3" in said
    check_memory(2 * 2**30, Ring(kept=3).most, "guard.snapshots")
    with pytest.raises(ConfigError, match=r"needs 28\.00 GiB.*without the guard"):
        check_memory(2**31, 7, "guard.snapshots", processes=2)


def test_a_system_that_does_not_say_is_not_refused(monkeypatch):
    def absent() -> str:
        raise OSError

    assert available_bytes(absent) is None
    assert available_bytes(lambda: "MemFree: 5 kB\nMemAvailable:   2048 kB\n") == 2 * 2**20
    monkeypatch.setattr(ring_module, "available_bytes", lambda: None)
    check_memory(2**60, 7, "guard.snapshots")
