"""`halfulp sweep` as it is typed: what it refuses, and that it says why."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from halfulp.cli import main
from halfulp.sweep.one_run import Task, Trained
from halfulp.sweep.result import Result
from halfulp.sweep.store import read_sweep
from halfulp.tasks import Outcome

GRID = {"--recipe": "fp32,te_current", "--lr": "1e-3,1e-2", "--seeds": "2"}


def imagined(function: Callable, next_task: Callable, **_: Any) -> Iterator[Outcome]:
    """As run_tasks, but nothing is trained."""
    while (task := next_task()) is not None:
        yield Outcome(task, Trained(_result(task), {}))


def _result(task: Task) -> Result:
    cell = task.cell
    return Result(
        id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
        status="finished", loss_nats=cell.lr,
    )  # fmt: skip


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    chance = random.Random(0)
    for i in range(8):
        (folder / f"{i}.txt").write_text(" ".join(chance.choice("abcd") for _ in range(900)))
    return folder


@pytest.fixture
def home(tmp_path, texts, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("halfulp.sweep.run.run_tasks", imagined)
    (tmp_path / "run.toml").write_text(
        f"[data]\nsource = ['{texts}']\nlength = 16\n[train]\nsteps = 4\ndevice = 'cpu'\n"
    )
    (tmp_path / "broken.toml").write_text("= [")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("all of it")
    return tmp_path


def run(capsys, *words: str, **options: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `halfulp sweep run.toml` on GRID with other `options`."""
    given = GRID | {f"--{name}": value for name, value in options.items()}
    grid = [word for pair in given.items() for word in pair if pair[1] is not None]
    return said(capsys, "run.toml", *grid, *words)


def said(capsys, *words: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["sweep", *words])
    caught = capsys.readouterr()
    return int(end.value.code or 0), caught.out, caught.err


def test_a_sweep_runs_goes_on_and_shows_its_status(home, capsys):
    code, out, err = run(capsys)
    assert (code, err) == (0, "")
    assert "8 of 8 runs done: sweep" in out
    assert "halfulp report sweep" in out
    assert len(read_sweep(home / "sweep").results) == 8
    for words in (["--resume", "sweep"], []):
        code, out, _ = said(capsys, *words) if words else run(capsys)
        assert (code, out.splitlines()[0]) == (0, "8 runs, 8 done")
    code, out, _ = said(capsys, "status", "sweep")
    assert code == 0
    assert "8 of 8 runs done" in out
    assert [line.split()[:3] for line in out.splitlines()[1:3]] != []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"recipe": None}, "--recipe is missing"),
        ({"recipe": "fp32"}, "two recipes or more"),
        ({"recipe": ","}, "--recipe is empty. Give for example bf16_amp,te_current"),
        ({"recipe": "fp32,fp33"}, "no recipe is called 'fp33'"),
        ({"recipe": "fp32,broken.toml"}, "broken.toml cannot be read"),
        ({"recipe": "fp32,none.toml"}, "none.toml cannot be read"),
        ({"recipe": "fp32,bf16_amp:x+te_current"}, "does not say where it ends"),
        ({"lr": None}, "--lr is missing"),
        ({"lr": "1e-3"}, "two learning rates or more"),
        ({"lr": "1e-3:1e-1"}, "--lr '1e-3:1e-1' is not understood"),
        ({"lr": "1e-1:1e-3:5"}, "the first must be below the last"),
        ({"lr": "1e-3:1e-1:1"}, "there must be two or more"),
        ({"lr": "0:1:5"}, "--lr '0:1:5' is not understood"),
        ({"lr": "1e-3:inf:5"}, "--lr '1e-3:inf:5' is not understood"),
        ({"lr": ""}, "--lr is empty. Give for example 1e-3,1e-2"),
        ({"lr": "1e-3,nan"}, "learning rate nan"),
        ({"time": ""}, "--time '' is not understood"),
        ({"ray": ""}, "--ray is empty"),
        ({"seeds": "0,1", "set": "train.seed=7"}, "--set train.seed has no effect"),
        ({"data": "a=texts", "set": "data.source=['b']"}, "Use --data"),
        ({"set": "guard.rollbacks=3"}, "--set guard.rollbacks has no effect on a sweep. Use"),
        ({"lr": "-1e-3,1e-3"}, "learning rate -0.001"),
        ({"seeds": "1"}, "two seeds or more"),
        ({"seeds": ""}, "--seeds '' is not understood"),
        ({"seeds": "two"}, "--seeds 'two' is not understood"),
        ({"seeds": "0,-1"}, "the seed -1 cannot be used"),
        ({"reference": "mxfp8"}, "is none of the recipes"),
        ({"data": "none"}, "none does not exist"),
        ({"data": "=texts"}, "it has no name"),
        ({"data": "a="}, "--data is empty"),
        ({"time": "30"}, "--time '30' is not understood"),
        ({"time": "0s"}, "--time '0s' is not understood"),
        ({"timeout": "soon"}, "--timeout 'soon' is not understood"),
        ({"jobs": "-1"}, "jobs = -1"),
        ({"jobs": "x"}, "Invalid value for '--jobs'"),
        ({"out": "full"}, "exists and is not empty"),
        ({"out": "run.toml"}, "is a file"),
        ({"set": "train.stepz=3"}, "unknown key 'stepz'"),
        ({"set": "train.lr=3"}, "--set train.lr has no effect on a sweep. Use --lr"),
        ({"set": "guard.on=true"}, "Use --guard"),
        ({"set": "policy.recipe=mxfp8"}, "Use --recipe"),
        ({"set": "run.out=x"}, "Use --out"),
        ({"set": "data.length=100000"}, "shorten the window"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_cure(home, capsys, options, why):
    code, out, err = run(capsys, **options)
    assert code == 2
    assert why in err
    assert "Traceback" not in err
    assert out == ""
    assert not (home / "sweep").exists()  # the corrected command needs no --force
    assert (home / "full/thesis.tex").read_text() == "all of it"


def test_what_a_run_has_of_its_own_is_said_to_be_left_out(home, capsys):
    """A file as `halfulp train` takes it; rate, recipe and seed have options that replace them."""
    file = home / "run.toml"
    file.write_text(
        f"{file.read_text()}lr = 3e-3\nseed = 4\n[policy]\nrecipe = 'mxfp8'\n"
        "schedule = [{until = 0.5, recipe = 'bf16_amp'}]\n[guard]\non = true\nrollbacks = 3\n"
    )
    code, out, _ = run(capsys)
    assert code == 0
    left_out = [line for line in out.splitlines() if "of run.toml is left out" in line]
    names = [line.split()[0] for line in left_out]
    assert names == ["guard.on", "guard.rollbacks", "policy.schedule"]
    assert read_sweep(home / "sweep").design.seeds == (4, 5)
    _, out, _ = run(capsys, "--guard", out="other", seeds="0,1")
    assert "policy.schedule of run.toml is left out: a sweep has --recipe" in out
    assert "guard" not in out


def test_two_data_sets_of_one_name_are_refused(home, texts, capsys):
    code, _, err = run(capsys, "--data", f"a={texts}", "--data", "a=stdlib")
    assert code == 2
    assert "--data 'a=stdlib' cannot be used: the name 'a' is taken" in err


@pytest.mark.parametrize("status", ["died", "refused"])
def test_it_says_whether_anything_is_left_to_run(home, capsys, monkeypatch, status):
    def once(function, next_task, **_):
        for outcome in imagined(function, next_task):
            result = outcome.value.result
            if (result.recipe, result.lr, result.seed) == ("te_current", 1e-2, 1):
                result = replace(result, status=status, message="because")
            yield Outcome(outcome.task, Trained(result, {}))

    monkeypatch.setattr("halfulp.sweep.run.run_tasks", once)
    code, out, _ = run(capsys)
    assert code == 0
    assert ("8 of 8 runs done (1 lost)" in out) == (status == "died")
    assert ("go on with: halfulp sweep --resume sweep" in out) == (status == "died")


def test_runs_of_a_refused_recipe_are_said_to_be_left_out(home, capsys, monkeypatch):
    def refused(function, next_task, **_):
        for outcome in imagined(function, next_task):
            result = outcome.value.result
            if result.recipe == "te_current":
                result = replace(result, status="refused", message="because")
            yield Outcome(outcome.task, Trained(result, {}))

    monkeypatch.setattr("halfulp.sweep.run.run_tasks", refused)
    _, out, _ = run(capsys)
    assert "5 of 8 runs done (3 left out: recipe refused): sweep" in out
    assert "go on with" not in out
    _, out, _ = said(capsys, "status", "sweep")
    assert "5 of 8 runs done, 3 left out: recipe refused" in out


def test_force_does_not_replace_what_is_no_sweep(home, capsys):
    code, _, err = run(capsys, "--force", out="full")
    assert code == 2
    assert "not empty" in err
    assert (home / "full/thesis.tex").exists()


def test_another_sweep_is_replaced_only_by_force(home, capsys):
    assert run(capsys)[0] == 0
    code, _, err = run(capsys, seeds="3")
    assert code == 2
    assert "holds another sweep, with 8 results: it differs in seeds" in err
    code, out, _ = run(capsys, "--force", seeds="3")
    assert code == 0
    assert "12 of 12 runs done" in out


@pytest.mark.parametrize(
    "words", [["run.toml"], ["--seeds", "3"], ["--out", "x"], ["--force"], ["--guard"]]
)
def test_resume_takes_no_other_design(home, capsys, words):
    assert run(capsys)[0] == 0
    code, _, err = said(capsys, "--resume", "sweep", *words)
    assert code == 2
    assert "--resume goes on with the sweep's own design" in err


@pytest.mark.parametrize("command", ["status", "--resume"])
@pytest.mark.parametrize(
    ("path", "why"),
    [("none", "does not exist"), ("full", "has no config.toml"), ("run.toml", "Give a run")],
)
def test_a_path_without_a_sweep_is_named(home, capsys, command, path, why):
    code, _, err = said(capsys, command, path)
    assert code == 2
    assert path in err
    assert why in err


def test_damaged_results_are_shown(home, capsys):
    assert run(capsys)[0] == 0
    log = home / "sweep/events.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([*lines[:-1], lines[-1][:50], ""]))
    code, out, _ = said(capsys, "status", "sweep")
    assert code == 0
    assert "damaged: " in out
    assert "7 of 8 runs done" in out
    code, out, _ = said(capsys, "--resume", "sweep")
    assert code == 0
    assert "damaged: " in out
    assert "8 of 8 runs done" in out


def test_a_design_that_was_damaged_is_named(home, capsys):
    assert run(capsys)[0] == 0
    (home / "sweep/config.toml").write_text("[sweep]\n")
    for words in (["status", "sweep"], ["--resume", "sweep"]):
        code, _, err = said(capsys, *words)
        assert code == 2
        assert "not the config.toml of a sweep" in err


@pytest.mark.parametrize(
    ("text", "count", "second"),
    [("1e-4:1e-1:4", 4, 1e-3), ("1e-3,5e-3", 2, 5e-3), ("1e-4:1e-2:5", 5, 10**-3.5)],
)
def test_rates_are_evenly_spaced_in_their_logarithm(text, count, second):
    from halfulp.cli.sweep import rates

    found = rates(text)
    assert len(found) == count
    assert found[1] == pytest.approx(second, rel=1e-3)
    assert found == sorted(found)


def test_help_says_where_the_options_are(capsys):
    code, out, _ = said(capsys, "--help")
    assert code == 0
    assert "halfulp sweep run --help" in out
