import json
import os
import shutil
import socket
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import design_of

from halfulp import lock
from halfulp.errors import ConfigError, RunError
from halfulp.run import Run
from halfulp.sweep.result import Result
from halfulp.sweep.store import check_place, is_sweep, open_store, read_sweep


@pytest.fixture
def design(corpus):
    return design_of(corpus)


def begin(path: Path, design, **options):
    store, stored = open_store(path, design, command=["test"], **options)
    store.close()
    return store, stored


def results_of(design) -> list[Result]:
    return [
        Result(id=c.id, recipe=c.recipe, lr=c.lr, seed=c.seed, data=c.data, status="finished")
        for c in design.cells()
    ]


@pytest.fixture
def filled(tmp_path, design) -> Path:
    """A sweep with four results."""
    store, _ = open_store(tmp_path / "sweep", design, command=["test"])
    for result in results_of(design)[:4]:
        store.add(result)
    store.close()
    return tmp_path / "sweep"


def test_the_design_is_written_before_anything_runs(tmp_path, design):
    _, stored = begin(tmp_path / "sweep", design)
    assert stored.results == () == stored.damaged
    again = read_sweep(tmp_path / "sweep")
    assert again.design == design
    assert again.missing() == design.cells()
    assert is_sweep(tmp_path / "sweep")
    assert not is_sweep(tmp_path)


def test_results_come_back_as_they_went(tmp_path, design):
    store, _ = open_store(tmp_path / "sweep", design, command=["test"])
    full = replace(
        results_of(design)[0],
        loss_nats=2.5, sharpness=float("inf"), steps=8, spikes={"6σ/128": 0.25},
        message='a "reason"\nof two lines',
    )  # fmt: skip
    store.add(full)
    store.close()
    (found,) = read_sweep(tmp_path / "sweep").results
    for key, value in full.to_dict().items():
        assert getattr(found, key) == value or value != value


def test_a_result_frees_the_room_of_its_checkpoints(tmp_path, design):
    store, _ = open_store(tmp_path / "sweep", design, command=["test"])
    first, second = results_of(design)[:2]
    for result in (first, second):
        (store.runs / result.id / "checkpoints/step-00000004").mkdir(parents=True)
        (store.runs / result.id / "events.jsonl").touch()
    store.add(first)
    store.close()
    assert os.listdir(store.runs / first.id) == ["events.jsonl"]
    assert (store.runs / second.id / "checkpoints/step-00000004").is_dir()


def test_of_two_results_of_a_run_the_later_counts(filled, design):
    lost = replace(results_of(design)[0], status="died")
    store, _ = open_store(filled, design, command=["test"])
    store.add(lost)
    store.close()
    assert [r.status for r in read_sweep(filled).results].count("died") == 1
    assert len(read_sweep(filled).results) == 4


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: "{" + line, "is not a JSON object"),
        (lambda line: line[:40], "is not a JSON object"),
        (lambda line: "\0" * 40, "is not a JSON object"),
        (lambda line: "[1, 2]", "is not a JSON object"),
        (lambda line: changed(line, status="well"), "no such status: 'well'"),
        (lambda line: changed(line, loss_nats="low"), "loss_nats is 'low'"),
        (lambda line: changed(line, steps=1.5), "steps is 1.5"),
        (lambda line: changed(line, steps=True), "steps is True"),
        (lambda line: changed(line, spikes=None), "spikes is None"),
        (lambda line: changed(line, spikes={"olmo2": "x"}), "spikes is {'olmo2': 'x'}"),
        (lambda line: changed(line, loss_nats=-5.0), "loss_nats is -5.0"),
        (lambda line: changed(line, wall_seconds=-1), "wall_seconds is -1"),
        (lambda line: changed(line, lr=5.0), "is no run of the design"),
        (lambda line: changed(line, id="fp32"), "fp32 in .* is no run of the design"),
        (lambda line: line.replace('"recipe"', '"recip"'), "cannot be read"),
    ],
)
def test_a_damaged_result_is_named_and_its_run_counts_as_not_done(filled, design, damage, said):
    lines = (filled / "events.jsonl").read_text().splitlines()
    spoiled = next(i for i, line in enumerate(lines) if '"result"' in line)
    lost = json.loads(lines[spoiled])["id"]
    lines[spoiled] = damage(lines[spoiled])
    (filled / "events.jsonl").write_text("\n".join(lines) + "\n")
    stored = read_sweep(filled)
    assert len(stored.results) == 3
    assert lost in {cell.id for cell in stored.missing()}
    (line,) = stored.damaged
    with pytest.raises(AssertionError, match=said):
        raise AssertionError(line)


def changed(line: str, **fields) -> str:
    return json.dumps(json.loads(line) | fields)


def test_a_torn_last_line_is_a_result_that_was_not_written(filled, design):
    """The process was killed while it wrote."""
    text = (filled / "events.jsonl").read_text()
    (filled / "events.jsonl").write_text(text[:-30])
    assert len(read_sweep(filled).results) == 3
    store, stored = open_store(filled, design, command=["test"])
    assert len(stored.results) == 3
    assert stored.damaged == ()
    store.add(results_of(design)[3])
    store.close()
    assert len(read_sweep(filled).results) == 4
    assert (filled / "events.torn").read_text().startswith('{"event": "result"')


def test_another_design_is_refused_with_what_differs(filled, corpus):
    other = design_of(corpus, seeds=3)
    with pytest.raises(RunError, match=r"another sweep, with 4 results: it differs in seeds\."):
        open_store(filled, other, command=["test"])
    changed = replace(other, config=replace(other.config, data=replace(other.config.data, seed=5)))
    with pytest.raises(RunError, match=r"differs in seeds, data\.seed"):
        open_store(filled, changed, command=["test"])
    assert len(read_sweep(filled).results) == 4
    assert not (filled / "writer.lock").exists()


def test_force_replaces_a_sweep_and_nothing_else(filled, corpus, tmp_path):
    (filled / "runs/a").mkdir(parents=True)
    _, stored = begin(filled, design_of(corpus, seeds=3), force=True)
    assert stored.results == ()
    assert not (filled / "runs").exists()
    (filled / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match=r"not deleted by force: it holds notes\.txt"):
        begin(filled, design_of(corpus), force=True)
    assert (filled / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("force", [False, True])
def test_a_directory_of_something_else_is_left_as_it_is(tmp_path, design, force):
    run = tmp_path / "run"
    Run.create(run, design.config.to_dict(), command=["test"]).close()
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "thesis.tex").write_text("all of it")
    file = tmp_path / "file"
    file.write_text("a file")
    for path in (run, folder, file):
        before = sorted(p.relative_to(path) for p in path.rglob("*"))
        with pytest.raises(RunError, match=str(path)):
            begin(path, design, force=force)
        assert sorted(p.relative_to(path) for p in path.rglob("*")) == before


def test_a_run_is_no_sweep(tmp_path, design):
    Run.create(tmp_path / "run", design.config.to_dict(), command=["test"]).close()
    with pytest.raises(RunError, match="is a run and no sweep"):
        read_sweep(tmp_path / "run")
    with pytest.raises(RunError, match="does not exist"):
        read_sweep(tmp_path / "nothing")


def test_a_damaged_config_is_named_and_not_replaced(filled, design):
    whole = (filled / "config.toml").read_text()
    (filled / "config.toml").write_text(whole[: len(whole) // 2] + "= [")
    with pytest.raises(RunError, match=r"cannot read .*config\.toml"):
        read_sweep(filled)
    with pytest.raises(RunError):
        begin(filled, design)
    (filled / "config.toml").write_text("[sweep]\nrecipes = 3\n")
    with pytest.raises(ConfigError, match=r"not the config\.toml of a sweep"):
        read_sweep(filled)
    (filled / "config.toml").write_text(whole)
    assert len(read_sweep(filled).results) == 4


def test_there_is_one_driver_at_a_time(filled, design):
    with subprocess.Popen(["sleep", "60"]) as other:
        facts = {"pid": other.pid, "host": socket.gethostname(), "began": lock._began(other.pid)}
        (filled / "writer.lock").write_text(json.dumps(facts))
        for force in (False, True):
            with pytest.raises(RunError, match=f"is being written by process {other.pid}"):
                begin(filled, design, force=force)
        assert len(read_sweep(filled).results) == 4  # reading needs no lock
        other.kill()
    _, stored = begin(filled, design)
    assert len(stored.results) == 4


def test_a_sweep_goes_on_after_its_directory_was_moved(filled, design, tmp_path):
    moved = tmp_path / "elsewhere/sweep"
    shutil.copytree(filled, moved)
    _, stored = begin(moved, design)
    assert len(stored.results) == 4


def test_a_place_that_may_not_be_entered_is_named(design, tmp_path, monkeypatch):
    """As any user but root finds it: nothing below can be looked at."""

    def denied(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "sweep").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", denied)
        assert not is_sweep(tmp_path / "sweep")
        with pytest.raises(RunError, match="does not exist"):
            read_sweep(tmp_path / "sweep")
        check_place(tmp_path / "sweep", design)  # to be made, which says why it cannot
    monkeypatch.setattr("os.listdir", denied)
    with pytest.raises(RunError, match="sweep cannot be read: Permission denied"):
        check_place(tmp_path / "sweep", design)
