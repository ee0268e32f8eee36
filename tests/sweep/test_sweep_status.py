"""`status_of`: what is done, running, failed and left, read from the directory alone."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import design_of, imagined

from halfulp import lock
from halfulp.errors import RunError
from halfulp.run import Run
from halfulp.sweep.design import Cell
from halfulp.sweep.one_run import Task
from halfulp.sweep.status import seconds_left, status_of
from halfulp.sweep.store import open_store


def _task(path: Path, cell: Cell) -> Task:
    return Task(path, {}, "", cell, data="", timeout_s=1.0)


def begun(path: Path, corpus: Path, done: int, **changes: object):
    """A sweep of 8 runs of which `done` have results of 10 s; the design's cells."""
    design = design_of(corpus)
    store, _ = open_store(path, design, command=["test"])
    for i, cell in enumerate(design.cells()[:done]):
        result = imagined(_task(path, cell)).result
        assert result is not None
        store.add(replace(result, wall_seconds=10.0, **(changes if i == 0 else {})))
    store.close()
    return design.cells()


def test_a_sweep_at_its_start_has_no_estimate(tmp_path, corpus):
    begun(tmp_path / "s", corpus, 0)
    found = status_of(tmp_path / "s")
    assert (found.done, found.cells, found.running) == (0, 8, ())
    assert math.isnan(found.seconds_left)
    assert all(math.isnan(row.best_nats) and row.cells == 4 for row in found.rows)


def test_half_of_it_done_leaves_as_long_again(tmp_path, corpus):
    begun(tmp_path / "s", corpus, 4)
    found = status_of(tmp_path / "s")
    assert found.seconds_left == pytest.approx(40.0)
    assert sum(row.finished for row in found.rows) == 4


def test_a_whole_sweep_has_nothing_left(tmp_path, corpus):
    begun(tmp_path / "s", corpus, 8)
    found = status_of(tmp_path / "s")
    assert found.seconds_left == 0.0
    assert {row.recipe: row.best_lr for row in found.rows} == {"fp32": 1e-3, "te_current": 1e-3}
    assert found.rows[0].best_nats == pytest.approx(1 + 1e-3 + 0.05 + 4)  # mean of two seeds


@pytest.mark.parametrize(("status", "where"), [("nonfinite", "failed"), ("died", "lost")])
def test_what_did_not_finish_is_counted_apart(tmp_path, corpus, status, where):
    begun(tmp_path / "s", corpus, 3, status=status)
    row = status_of(tmp_path / "s").rows[0]
    assert {"failed": row.failed, "lost": row.lost}[where] == 1
    assert row.failed + row.lost == 1


def test_a_run_is_running_while_its_writer_lives(tmp_path, corpus):
    path = tmp_path / "s"
    cells = begun(path, corpus, 2)
    run = Run.create(path / "runs" / cells[2].id, {}, command=["test"])
    run.write("step", step=3, loss_nats=2.5)
    (running,) = status_of(path).running
    assert (running.id, running.step, running.steps, running.loss_nats) == (cells[2].id, 3, 4, 2.5)
    run.close()
    assert status_of(path).running == ()


def test_what_a_dead_process_left_is_not_running(tmp_path, corpus):
    path = tmp_path / "s"
    cells = begun(path, corpus, 2)
    folder = path / "runs" / cells[2].id
    Run.create(folder, {}, command=["test"]).close()
    script = "import sys; from pathlib import Path; from halfulp import lock; "
    script += "lock.acquire(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", script, str(folder / "writer.lock")], check=True)
    assert (folder / "writer.lock").exists()
    assert not lock.held(folder / "writer.lock")
    assert status_of(path).running == ()


def test_two_at_a_time_take_half_as_long(corpus):
    design = design_of(corpus)
    first, *rest = design.cells()
    result = imagined(_task(Path(), first)).result
    assert result is not None
    done = [replace(result, wall_seconds=6.0)]
    assert seconds_left(done, rest, 1) == 2 * seconds_left(done, rest, 2) == pytest.approx(42.0)


def test_a_run_is_no_sweep(tmp_path):
    Run.create(tmp_path / "r", {}, command=["test"]).close()
    with pytest.raises(RunError, match="no sweep"):
        status_of(tmp_path / "r")
