"""A sweep on worker processes: it comes to the same, whatever happens to them or to the driver."""

import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweeps
from sweeps import design_of, facts_of

from halfulp.sweep.run import run_design
from halfulp.sweep.store import open_store, read_sweep

HERE = Path(__file__).parent


def run_with(function, monkeypatch, design, path, **options):
    monkeypatch.setattr("halfulp.sweep.run.run_cell", function)
    told: list[dict] = []
    table = run_design(design, path, on_event=told.append, **options)
    return table, [e for e in told if e["event"] == "retry"]


def test_a_run_whose_worker_is_killed_goes_on_where_it_was(whole, tmp_path, monkeypatch):
    """Two at a time come to what one after another does, bit by bit."""
    table, retries = run_with(
        sweeps.killed_once, monkeypatch, whole.design, tmp_path / "sweep", jobs=2
    )
    assert facts_of(table.results) == facts_of(whole.results)
    (retry,) = retries
    assert retry["message"] == "its process was killed by SIGKILL"
    starts = Path(table.path, "runs", retry["id"], "events.jsonl").read_text().splitlines()
    steps = [line for line in starts if '"event": "step"' in line]
    assert len(steps) == 4
    assert sum('"event": "start"' in line for line in starts) == 2  # it was gone on with


@pytest.fixture
def imagined(corpus, tmp_path, monkeypatch):
    """The same with runs that nobody has trained."""
    with monkeypatch.context() as patch:
        patch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
        patch.setattr("halfulp.sweep.run.run_cell", sweeps.imagined)
        return run_design(design_of(corpus), tmp_path / "imagined/sweep")


def test_a_run_that_hangs_is_ended_and_tried_again(imagined, tmp_path, monkeypatch):
    path = tmp_path / "sweep"
    table, retries = run_with(
        sweeps.hangs_once, monkeypatch, imagined.design, path, jobs=2, timeout_s=1.0
    )
    assert facts_of(table.results) == facts_of(imagined.results)
    (retry,) = retries
    assert retry["message"] == f"no step for 1 s; its stack is in {retry['id']}.stalled.1.txt"
    assert "in _hold" in (path / "runs" / f"{retry['id']}.stalled.1.txt").read_text()


def test_a_run_that_is_stopped_from_outside_is_ended_and_tried_again(
    imagined, tmp_path, monkeypatch
):
    """SIGSTOP, a debugger: the worker cannot end itself, so the driver does."""
    monkeypatch.setattr("halfulp.sweep.alive.GRACE_S", 0.5)
    path = tmp_path / "sweep"
    table, retries = run_with(
        sweeps.stops_once, monkeypatch, imagined.design, path, jobs=2, timeout_s=0.5
    )
    assert facts_of(table.results) == facts_of(imagined.results)
    (retry,) = retries
    assert retry["message"].startswith("no step for 0.5 s: its process was stopped")
    assert not list((path / "runs").glob("*.alive"))


def test_the_first_step_may_take_longer_than_the_timeout(imagined, tmp_path, monkeypatch):
    """Imports, the model and the compiler come before it."""
    table, retries = run_with(
        sweeps.starts_slowly, monkeypatch, imagined.design, tmp_path / "sweep", timeout_s=0.5
    )
    assert retries == []
    assert facts_of(table.results) == facts_of(imagined.results)


@pytest.mark.parametrize(
    ("function", "status"), [("hangs", "stalled"), ("stops", "stalled"), ("dies", "died")]
)
def test_a_run_that_cannot_be_done_is_lost_and_the_rest_is_not(
    imagined, tmp_path, monkeypatch, function, status
):
    monkeypatch.setattr("halfulp.sweep.alive.GRACE_S", 0.2)
    path, design = tmp_path / "sweep", imagined.design
    table, retries = run_with(
        getattr(sweeps, function), monkeypatch, design, path, jobs=2, timeout_s=0.5
    )
    lost = {r.id for r in table.results if r.lost}
    assert lost == {c.id for c in design.cells() if (c.recipe, c.lr) == ("te_current", 1e-2)}
    assert {r.status for r in table.results} == {"finished", status}
    assert sorted(r["id"] for r in retries) == sorted(lost)
    assert len(table.results) == 8
    monkeypatch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
    again, _ = run_with(sweeps.imagined, monkeypatch, design, path)
    assert facts_of(again.results) == facts_of(imagined.results)
    assert facts_of(read_sweep(path).results) == facts_of(imagined.results)


_DRIVER = """
import sys
sys.path[:0] = [{here!r}]
import sweeps
from pathlib import Path
from halfulp.sweep.run import run_design
import halfulp.sweep.run as run
run.run_cell = sweeps.{function}
run_design(sweeps.design_of(Path({corpus!r})), Path({path!r}), jobs=1)
"""


def driver(corpus: Path, path: Path, function: str = "slow") -> subprocess.Popen:
    code = _DRIVER.format(here=str(HERE), function=function, corpus=str(corpus), path=str(path))
    return subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)


def wait_for_results(path: Path, count: int, process: subprocess.Popen) -> None:
    end = time.monotonic() + 120
    while True:
        file = path / "events.jsonl"
        if file.exists() and file.read_text().count('"event": "result"') >= count:
            return
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def workers_of(pid: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], stdout=subprocess.PIPE)
    return [int(word) for word in found.stdout.split()]


def test_a_driver_that_is_killed_leaves_no_worker_and_loses_no_result(corpus, whole, tmp_path):
    path = tmp_path / "sweep"
    with driver(corpus, path) as process:
        wait_for_results(path, 2, process)
        workers = [pid for pid in workers_of(process.pid) if pid != process.pid]
        process.kill()
    assert workers
    end = time.monotonic() + 20
    while any(alive(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.02)
    before = read_sweep(path).results
    assert 2 <= len(before) < 8
    assert facts_of(before).items() <= facts_of(whole.results).items()
    assert facts_of(run_design(whole.design, path).results) == facts_of(whole.results)


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


_COMMAND = """
import signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path[:0] = [{here!r}]
import sweeps
import halfulp.sweep.run as run
run.run_cell = sweeps.{function}
from halfulp.cli import main
main(["sweep", "--resume", {path!r}, "-j", "1"])
"""


def command(imagined, path: Path, function: str, **options) -> subprocess.Popen:
    """`halfulp sweep --resume` on a sweep of which nothing has run."""
    store, _ = open_store(path, imagined.design, command=["test"])
    store.close()
    code = _COMMAND.format(here=str(HERE), function=function, path=str(path))
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_ctrl_c_leaves_a_sweep_that_goes_on(imagined, tmp_path, monkeypatch):
    path = tmp_path / "sweep"
    with command(imagined, path, "slow_imagined") as process:
        wait_for_results(path, 2, process)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert f"halfulp sweep --resume {path}" in said
    assert errors == ""
    _goes_on(imagined, path, monkeypatch)


def test_a_full_disk_stops_the_command_with_a_cure(imagined, tmp_path, monkeypatch):
    """No file may grow past a size that the sweep's log reaches after some results."""
    path = tmp_path / "sweep"
    limits = (2500, resource.RLIM_INFINITY)
    with command(
        imagined,
        path,
        "imagined",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits),
    ) as process:
        _, errors = process.communicate(timeout=3000)
    assert process.returncode == 2, errors
    assert "cannot write to" in errors
    assert f"halfulp sweep --resume {path}" in errors
    assert "Traceback" not in errors
    _goes_on(imagined, path, monkeypatch)


def _goes_on(imagined, path: Path, monkeypatch) -> None:
    """Part of the results is there, and the rest comes."""
    assert not (path / "writer.lock").exists()
    kept = facts_of(read_sweep(path).results)
    assert 0 < len(kept) < 8
    assert kept.items() <= facts_of(imagined.results).items()
    monkeypatch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
    table, _ = run_with(sweeps.imagined, monkeypatch, imagined.design, path)
    assert facts_of(table.results) == facts_of(imagined.results)
