"""A sweep on worker processes: it comes to the same, whatever happens to them or to the driver."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweeps
from sweeps import design_of, facts_of

from halfulp.errors import RunError
from halfulp.sweep.run import run_design
from halfulp.sweep.store import read_sweep

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """A sweep that nothing disturbed, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
        return run_design(design_of(corpus), tmp_path_factory.mktemp("whole") / "sweep")


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


def test_a_run_that_hangs_is_ended_and_tried_again(whole, tmp_path, monkeypatch):
    table, retries = run_with(
        sweeps.hangs_once, monkeypatch, whole.design, tmp_path / "sweep", jobs=2, timeout_s=8.0
    )
    assert facts_of(table.results) == facts_of(whole.results)
    assert [r["message"] for r in retries] == [
        f"no step for 8 s; its stack is in {retries[0]['id']}.stalled.txt"
    ]


@pytest.mark.parametrize(("function", "status"), [("hangs", "stalled"), ("dies", "died")])
def test_a_run_that_cannot_be_done_is_lost_and_the_rest_is_not(
    whole, tmp_path, monkeypatch, function, status
):
    path = tmp_path / "sweep"
    table, retries = run_with(
        getattr(sweeps, function), monkeypatch, whole.design, path, jobs=2, timeout_s=4.0
    )
    lost = {r.id: r for r in table.results if r.lost}
    assert {(r.recipe, r.lr) for r in lost.values()} == {("te_current", 1e-2)}
    assert {r.status for r in lost.values()} == {status}
    assert sorted(r["id"] for r in retries) == sorted(lost)
    assert len(table.results) == 8
    if status == "stalled":
        stack = (path / "runs" / f"{min(lost)}.stalled.txt").read_text()
        assert "in _hold" in stack
    again, _ = run_with(sweeps.run_cell, monkeypatch, whole.design, path, jobs=1)
    assert facts_of(again.results) == facts_of(whole.results)


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


def command(corpus: Path, path: Path, *more: str) -> list[str]:
    config = sweeps.config_of(corpus).to_dict()
    sets = [
        f"{section}.{key}={value}"
        for section, keys in (
            ("model", ("hidden", "layers")),
            ("data", ("length", "val_fraction")),
            ("train", ("steps", "rows", "eval_every", "eval_batches", "count_every")),
            ("sharpness", ("every",)),
        )
        for key in keys
        for value in [config[section][key]]
    ]
    words = ["--recipe", "fp32,te_current", "--lr", "1e-3,1e-2", "--seeds", "2", "-j", "1"]
    sets += [f"data.source=['{corpus}']", "model.preset=llama-tiny", "train.device=cpu"]
    options = [word for pair in sets for word in ("--set", pair)]
    options += ["--set", "train.checkpoint_every=2"]
    return [sys.executable, "-m", "halfulp", "sweep", *words, "-o", str(path), *options, *more]


def test_ctrl_c_leaves_a_sweep_that_goes_on(corpus, whole, tmp_path):
    path = tmp_path / "sweep"
    with subprocess.Popen(
        command(corpus, path), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        wait_for_results(path, 1, process)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"halfulp sweep --resume {path}" in said
    assert errors == ""
    assert not (path / "writer.lock").exists()
    assert len(read_sweep(path).results) >= 1
    assert facts_of(run_design(whole.design, path).results) == facts_of(whole.results)


def test_a_full_disk_stops_the_command_with_a_cure(corpus, whole, tmp_path):
    """No file may grow past a size that the sweep's own log reaches after some runs."""
    path = tmp_path / "sweep"

    def limit() -> None:
        # A result is about 700 bytes; checkpoints and caches are larger, so only the driver's
        # limit is set: workers raise theirs again.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))

    run_design(whole.design, path, time_s=1e-9)  # makes the directory, and runs nothing
    done = subprocess.run(
        [sys.executable, "-c", _LIMITED.format(here=str(HERE), corpus=str(corpus), path=str(path))],
        stderr=subprocess.PIPE, text=True, preexec_fn=limit, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot write to" in done.stderr
    assert f"halfulp sweep --resume {path}" in done.stderr
    kept = read_sweep(path)
    assert 0 < len(kept.results) < 8
    assert facts_of(kept.results).items() <= facts_of(whole.results).items()
    assert facts_of(run_design(whole.design, path).results) == facts_of(whole.results)


_LIMITED = """
import signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sys.path[:0] = [{here!r}]
import sweeps
import halfulp.sweep.run as run
run.run_cell = sweeps.unlimited
from halfulp.cli import main
main(["sweep", "--resume", {path!r}, "-j", "1"])
"""


def test_two_drivers_do_not_write_one_directory(corpus, whole, tmp_path):
    path = tmp_path / "sweep"
    with driver(corpus, path) as process:
        wait_for_results(path, 1, process)
        with pytest.raises(RunError, match=f"is being written by process {process.pid}"):
            run_design(whole.design, path)
        process.kill()
    assert os.listdir(path / "runs")
