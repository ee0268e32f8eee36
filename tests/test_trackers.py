import importlib
import math
import subprocess
import sys
from pathlib import Path

import pytest

from halfulp.errors import MissingExtraError, RunError
from halfulp.run import Run
from halfulp.trackers import open_trackers, scalars

GEMMS = [
    {"block": "layers.0.ffn", "operand": "wgrad.g", "n": 100, "saturated": 0, "underflow": 40},
    {"block": "layers.0.ffn", "operand": "dgrad.g", "n": 100, "saturated": 5, "underflow": 10},
    {"block": "head", "operand": "dgrad.g", "n": 0, "saturated": 0, "underflow": 0},
]
OPTIMIZER = [{"block": "layers.0.qk", "lost_updates": 3, "asked": 4, "n": 4}]


def test_scalars_are_the_finite_numbers():
    event = {"event": "step", "time": 5.0, "step": 3, "loss_nats": 2.0, "lr": math.nan, "ok": True}
    assert scalars(event) == {"step/loss_nats": 2.0}


def test_counters_become_the_largest_share_per_block():
    event = {"event": "counters", "time": 5.0, "step": 3, "gemms": GEMMS, "optimizer": OPTIMIZER}
    assert scalars(event) == {
        "counters/saturated/layers.0.ffn": 0.05,
        "counters/underflow/layers.0.ffn": 0.4,
        "counters/lost_updates/layers.0.qk": 0.75,
    }


def test_unknown_tracker_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"'wandb' does not exist.*tensorboard"):
        open_trackers(["wandb"], tmp_path)


@pytest.mark.parametrize("name", ["tensorboard", "trackio"])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"halfulp\[track\]"):
        open_trackers([name], tmp_path)


def write_run(run: Run) -> None:
    run.write("start", step=0, world=1)
    for step in range(1, 4):
        run.write("step", step=step, loss_nats=float(step))
    run.write("step", step=4, loss_nats=math.nan)
    run.write("counters", step=3, gemms=GEMMS, optimizer=OPTIMIZER)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_back_what_was_written(tmp_path):
    pytest.importorskip("tensorboard")
    with Run.create(tmp_path / "run", {}, command=[]) as run:
        run.trackers.extend(open_trackers(["tensorboard"], run.path))
        write_run(run)
    accumulate = importlib.import_module(
        "tensorboard.backend.event_processing.event_accumulator"
    ).EventAccumulator
    events = accumulate(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    curve = [(point.step, point.value) for point in events.Scalars("step/loss_nats")]
    assert curve == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert events.Scalars("counters/lost_updates/layers.0.qk")[0].value == 0.75


# trackio reads TRACKIO_DIR when it is imported, so the test needs a process of its own.
TRACKIO = """
import sys
sys.path.insert(0, sys.argv[2])
from test_trackers import write_run
from halfulp.run import Run
from halfulp.trackers import open_trackers
with Run.create(sys.argv[1], {}, command=[]) as run:
    run.trackers.extend(open_trackers(["trackio"], run.path))
    write_run(run)
from trackio.sqlite_storage import SQLiteStorage
rows = SQLiteStorage.get_logs("halfulp", "run")
print([(row["step"], row["step/loss_nats"]) for row in rows if "step/loss_nats" in row])
"""


def test_trackio_reads_back_what_was_written(tmp_path, monkeypatch):
    pytest.importorskip("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = subprocess.run(
        [sys.executable, "-c", TRACKIO, str(tmp_path / "run"), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[(1, 1.0), (2, 2.0), (3, 3.0)]"


def test_trackio_does_not_upload(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_SPACE_ID", "somebody/space")
    with pytest.raises(RunError, match="TRACKIO_SPACE_ID"):
        open_trackers(["trackio"], tmp_path)
