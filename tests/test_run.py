import json
import math
import resource
import socket
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from halfulp import toml
from halfulp.errors import ConfigError, RunError
from halfulp.run import Run

CONFIG = {"model": {"preset": "tiny"}, "train": {"lr": 1e-05, "seed": 0, "betas": (0.9, 0.95)}}


def create(path: Path, **options) -> Run:
    return Run.create(path, CONFIG, command=["halfulp", "train"], **options)


def steps(run: Run) -> list[int]:
    return [event["step"] for event in run.events("step")]


@pytest.fixture
def run(tmp_path):
    with create(tmp_path / "run") as run:
        yield run


def test_toml_comes_back_as_it_went():
    table = {
        "text": 'quote " slash \\ tab \t del \x7f null \x00 é 🙂',
        "numbers": [1, -2, 1e-300, 1e16, 0.1, math.inf, True],
        "empty": {},
        "deep": {"a key": {"b": [{"c": 1, "d": {}}, []]}},
        "last": "after a table",
    }
    assert tomllib.loads(toml.dumps(table)) == table


def test_toml_leaves_out_none_and_refuses_the_unspellable():
    assert toml.dumps({"a": None, "b": 1}) == "b = 1\n"
    with pytest.raises(ConfigError, match=r"train\.x = <object"):
        toml.dumps({"train": {"x": object()}})


def test_created_run_holds_what_was_asked_and_where(run):
    assert run.config() == {**CONFIG, "train": {**CONFIG["train"], "betas": [0.9, 0.95]}}
    facts = run.environment()
    assert facts["command"] == ["halfulp", "train"]
    assert facts["torch"] == torch.__version__
    assert facts["kernel"] in ("c", "torch")
    assert len(facts["config_sha256"]) == 64


def test_events_come_back_with_non_finite_numbers_and_scalars(run):
    run.write("step", step=1, loss_nats=math.nan, rows=[{"amax": math.inf}], path=Path("a/b"))
    run.write("eval", step=1, loss_nats=torch.tensor(2.5), tokens=np.int64(7))
    run.write("eval", step=2, loss_nats=torch.tensor(-math.inf))
    first, second, third = run.events()
    assert math.isnan(first["loss_nats"])
    assert first["rows"] == [{"amax": math.inf}]
    assert first["path"] == "a/b"
    assert (second["loss_nats"], second["tokens"]) == (2.5, 7)
    assert third["loss_nats"] == -math.inf
    assert [event["step"] for event in run.events("eval")] == [1, 2]
    for line in (run.path / "events.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_an_event_that_json_cannot_spell_is_refused_and_leaves_no_trace(run):
    with pytest.raises(RunError, match="set"):
        run.write("step", step=1, what={1, 2})
    assert list(run.events()) == []


def test_existing_directory_is_refused(tmp_path, run):
    with pytest.raises(RunError, match="exists and is not empty"):
        create(run.path)
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        create(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty").close()


def test_force_replaces_a_run_and_nothing_else(tmp_path, run):
    run.write("step", step=1)
    (run.path / "checkpoints" / "step-1").mkdir(parents=True)
    with create(run.path, force=True) as fresh:
        assert list(fresh.events()) == []
        assert not (fresh.path / "checkpoints").exists()
    (run.path / "thesis.tex").write_text("ten years")
    with pytest.raises(RunError, match=r"thesis\.tex"):
        create(run.path, force=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "report.html").write_text("")
    with pytest.raises(RunError, match=r"no run, but holds report\.html"):
        create(tmp_path / "other", force=True)
    assert (run.path / "thesis.tex").exists()
    assert (tmp_path / "other" / "report.html").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.toml").write_text("# written by hand")
    with pytest.raises(RunError, match=r"no run, but holds config\.toml"):
        create(tmp_path / "mine", force=True)
    assert (tmp_path / "mine" / "config.toml").exists()


def test_torn_last_line_is_passed_over_then_cut_and_kept(run):
    run.write("step", step=1)
    run.close()
    file = run.path / "events.jsonl"
    with open(file, "ab") as lines:
        lines.write(b'{"event": "step", "st')
    again = Run.open(run.path)
    assert steps(again) == [1]
    with again:
        again.write("step", step=2)
    assert steps(again) == [1, 2]
    assert (run.path / "events.torn").read_text() == '{"event": "step", "st\n'


def test_torn_line_that_is_whole_but_for_its_break_is_completed(run):
    run.write("step", step=1)
    run.close()
    file = run.path / "events.jsonl"
    file.write_bytes(file.read_bytes().rstrip(b"\n"))
    with Run.open(run.path) as again:
        assert steps(again) == [1]
        again.write("step", step=2)
        assert steps(again) == [1, 2]
    assert not (run.path / "events.torn").exists()


@pytest.mark.parametrize("size", [0, 65535, 65536, 65537, 200_000])
def test_torn_line_of_any_length_is_cut_at_the_last_break(run, size):
    run.write("step", step=1)
    run.close()
    whole = (run.path / "events.jsonl").read_bytes()
    (run.path / "events.jsonl").write_bytes(whole + b"x" * size)
    with Run.open(run.path) as again:
        again.write("end", step=1)
    assert (run.path / "events.jsonl").read_bytes().startswith(whole + b'{"event": "end"')


def test_corrupt_line_elsewhere_names_line_and_cure(run):
    run.write("step", step=1)
    with open(run.path / "events.jsonl", "ab") as lines:
        lines.write(b"garbage\n")
    run.write("step", step=2)
    with pytest.raises(RunError, match=r"line 2 .*garbage.*sed -i 2d"):
        list(run.events())


def test_truncate_moves_later_events_aside(run):
    run.write("start", step=0)
    for step in range(1, 6):
        run.write("step", step=step, loss_nats=math.nan if step == 4 else 1.0)
    assert run.truncate(3) == 2
    assert steps(run) == [1, 2, 3]
    run.write("step", step=4, loss_nats=2.0)
    assert steps(run) == [1, 2, 3, 4]
    dropped = (run.path / "events.dropped.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in dropped] == [4, 5]
    assert run.truncate(10) == 0


def test_truncate_keeps_what_came_before_it_went_back(run):
    """The steps of a run that was rolled back from 4 to 2, and resumed at its step 3."""
    for step in (1, 2, 3, 4):
        run.write("step", step=step)
    run.write("guard", step=5, to=2)
    run.write("step", step=3)
    written = run.written
    assert written == 6
    for step in (4, 5):
        run.write("step", step=step)
    with Run.open(run.path, writer=False) as reader:
        assert reader.written == 0
    assert run.truncate(3, kept=written) == 2
    assert [e["step"] for e in run.events()] == [1, 2, 3, 4, 5, 3]
    assert run.written == 6
    # Without knowing where it was, all of the first later step and what follows goes.
    assert run.truncate(3) == 3
    assert steps(run) == [1, 2, 3]


def test_what_came_at_the_step_itself_stays(run):
    run.write("checkpoint", step=2)
    run.write("end", step=2)
    run.write("start", step=2)
    run.write("step", step=3)
    assert run.truncate(2) == 1
    assert [e["event"] for e in run.events()] == ["checkpoint", "end", "start"]


def test_a_run_that_cannot_be_written_is_an_answer(tmp_path):
    create(tmp_path / "run").close()
    (tmp_path / "run/events.jsonl").unlink()
    (tmp_path / "run/events.jsonl").mkdir()
    with pytest.raises(RunError, match="run cannot be written to: Is a directory"):
        Run.open(tmp_path / "run").write("step", step=1)


def test_a_full_disk_is_an_answer(run):
    run.write("start", step=0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2048, hard))
    try:
        with pytest.raises(RunError, match=r"cannot write to .*events\.jsonl.*--resume"):
            run.write("step", step=1, text="x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run.close()
    with Run.open(run.path) as again:
        again.write("step", step=1)
        assert [e["step"] for e in again.events()] == [0, 1]


def test_summary_merges_and_checkpoints_are_the_complete_ones(run):
    assert run.summary() == {}
    run.summarize(steps=5, loss_nats=math.nan)
    run.summarize(steps=6)
    assert run.summary()["steps"] == 6
    assert math.isnan(run.summary()["loss_nats"])
    for name, complete in [("step-10", 1), ("step-00000009", 1), ("step-11", 0), ("step-x", 1)]:
        (run.path / "checkpoints" / name).mkdir(parents=True)
        if complete:
            (run.path / "checkpoints" / name / "state.json").write_text("{}")
    assert [path.name for path in run.checkpoints()] == ["step-00000009", "step-10"]
    assert not list(run.path.glob("*.part"))


def test_a_handle_that_may_not_write_writes_nothing(tmp_path, run):
    other = Run.open(run.path, writer=False)
    other.write("step", step=1)
    other.summarize(steps=1)
    assert other.truncate(0) == 0
    other.close()
    assert list(run.events()) == []
    assert run.summary() == {}
    create(tmp_path / "rank1", writer=False)
    assert not (tmp_path / "rank1").exists()


def test_opening_what_is_no_run_says_so(tmp_path):
    with pytest.raises(RunError, match=r"has no config\.toml"):
        Run.open(tmp_path)
    with pytest.raises(RunError, match="does not exist"):
        Run.open(tmp_path / "nowhere")


HOLD = """
import sys
from halfulp.run import Run
run = Run.open(sys.argv[1])
run.write("step", step=1)
print("writing", flush=True)
sys.stdin.read()
"""


def test_second_writer_is_refused_until_the_first_is_gone(run):
    run.close()
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run.path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with first:
        assert first.stdout is not None
        assert first.stdout.readline() == "writing\n"
        second = Run.open(run.path)
        assert steps(second) == [1]
        with pytest.raises(RunError, match=f"process {first.pid}"):
            second.write("step", step=2)
        with pytest.raises(RunError, match=f"process {first.pid}"):
            create(run.path, force=True)
        first.kill()
    second.write("step", step=2)
    assert steps(second) == [1, 2]
    second.close()
    assert not (run.path / "writer.lock").exists()


RACE = """
import sys, time
from pathlib import Path
from halfulp import lock
from halfulp.errors import RunError
print("ready", flush=True)
won, begin = [], float(sys.stdin.readline())
for i, folder in enumerate(sys.argv[1:]):
    time.sleep(max(0.0, begin + 0.02 * i - time.time()))
    try:
        lock.acquire(Path(folder) / "writer.lock")
        won.append(i)
    except RunError:
        pass
print(won, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("left", ["", '{"pid": 1, "host": "%s", "began": "-1"}'])
def test_of_processes_that_come_at_once_one_becomes_the_writer(tmp_path, left):
    """After a kill all of them find the lock of a dead process."""
    folders = [tmp_path / str(i) for i in range(20)]
    for folder in folders:
        folder.mkdir()
        if left:
            (folder / "writer.lock").write_text(left % socket.gethostname())
    call = [sys.executable, "-c", RACE, *map(str, folders)]
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    racers: list[Any] = [subprocess.Popen(call, **pipes) for _ in range(3)]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    begin = time.time() + 0.1
    for racer in racers:
        racer.stdin.write(f"{begin}\n")
        racer.stdin.flush()
    won = [json.loads(racer.stdout.readline()) for racer in racers]  # all are alive until then
    for racer in racers:
        racer.communicate()
    assert sorted(i for each in won for i in each) == list(range(20))


def test_a_configuration_is_not_replaced_by_that_of_a_slower_process(tmp_path, monkeypatch):
    """Both have seen an empty directory; then one of them has begun, and has even finished."""

    def as_before(path, **options):
        monkeypatch.undo()
        create(path).close()
        return False

    monkeypatch.setattr("halfulp.run_files.check_room", as_before)
    with pytest.raises(RunError, match="exists and is not empty"):
        Run.create(tmp_path / "run", {"train": {"lr": 3.0}}, command=[])
    assert Run.open(tmp_path / "run").config()["train"]["lr"] == 1e-05
    assert not (tmp_path / "run" / "writer.lock").exists()


def test_reused_process_id_and_broken_lock_are_stale_but_another_host_is_not(run):
    run.close()
    file = run.path / "writer.lock"
    heir = {"pid": 1, "host": socket.gethostname(), "began": "-1"}
    for text in (json.dumps(heir), "", "[]"):
        file.write_text(text)
        run.write("step", step=1)
        run.close()
    file.write_text(json.dumps({**heir, "host": "elsewhere"}))
    with pytest.raises(RunError, match="elsewhere"):
        run.write("step", step=1)


def test_reader_beside_a_writer_never_sees_half_a_line(run):
    def write():
        for step in range(1, 401):
            run.write("step", step=step, text="x" * 500)

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while writer.is_alive():
        seen.append(steps(Run.open(run.path, writer=False)))
    writer.join()
    assert all(s == list(range(1, len(s) + 1)) for s in seen)
    assert len(steps(run)) == 400


def test_what_a_process_leaves_that_is_killed_as_it_begins_may_be_replaced(tmp_path):
    path = tmp_path / "run"
    create(path).close()
    for name in ("environment.json", "events.jsonl"):
        (path / name).unlink(missing_ok=True)
    assert (path / "config.toml").exists()
    with pytest.raises(RunError, match=r"no run, but holds config\.toml"):
        create(path, force=True)
    (path / "writer.lock").write_text("0 gone")
    create(path, force=True).close()
    assert (path / "environment.json").exists()


@pytest.mark.parametrize("left", ["config.toml.part", "summary.json.part", "writer.lock.123"])
def test_what_a_killed_process_leaves_does_not_block_the_directory(tmp_path, left):
    """It may be killed between the writing of a file and its renaming."""
    path = tmp_path / "run"
    if left == "config.toml.part":  # killed before it had begun: as good as empty
        path.mkdir()
    else:
        create(path).close()
    (path / left).write_text("half of")
    with create(path, force=left != "config.toml.part") as run:
        run.write("step", step=1)
    assert steps(Run.open(path)) == [1]
    assert not (path / left).exists()
    (path / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"holds notes\.txt"):
        create(path, force=True)
