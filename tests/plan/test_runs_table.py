import json
from pathlib import Path

import numpy as np
import pytest
from lawful_runs import grid

from halfulp import toml
from halfulp.errors import PlanError
from halfulp.plan.fit import fit
from halfulp.plan.fit_file import content, fit_file, read_fit
from halfulp.plan.run_directories import read_runs
from halfulp.plan.runs_table import Row, read_csv, runs_of


def _write(path: Path, header: str, rows, mark: str = ",") -> Path:
    lines = [header, *(mark.join(map(str, row)) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _grid_rows():
    runs = grid(0.003)
    return list(zip(runs.parameters, runs.tokens, runs.loss_nats, strict=True))


@pytest.mark.parametrize(
    ("header", "mark"),
    [("N,D,loss", ","), ("params;tokens;loss_nats", ";"), (" Parameters\tTokens\tLoss", "\t")],
)
def test_tables_are_read_whatever_their_marks_and_names(tmp_path, header, mark):
    path = _write(tmp_path / "runs.csv", header, _grid_rows(), mark)
    runs, wanted = read_runs([path]), grid(0.003)
    np.testing.assert_array_equal(runs.parameters, wanted.parameters)
    np.testing.assert_array_equal(runs.loss_nats, wanted.loss_nats)
    assert runs.names[0] == "line 2"
    assert runs.notes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("N,loss\n1,2\n", "no column for tokens"),
        ("", "no column for parameters, tokens, loss_nats"),
        ("N,D,loss\n7B,1e9,3\n", "line 2: N = '7B' is no number"),
        ("N,D,loss\n1e6,1e9,3\n1e6,,3\n", "line 3: D = '' is no number"),
        ("N,D,loss\n1e6,1e9,3,14\n", "line 2 has more cells than the header"),
        ("N,params,D,loss\n1,1,1,1\n", "two columns for parameters"),
        ("N,D,loss,C\n1e6,1e9,3,6e9\n", "line 2: C = 6e\\+09 is 1e-06 times 6 N D"),
        ("N,D,loss,bits\n1e6,1e9,3,8\n1e6,1e9,3,16\n", "2 precisions \\(8: 1, 16: 1\\)"),
        ("N,D,loss\n", "no finished run"),
    ],
)
def test_a_bad_table_is_named(tmp_path, text, message):
    path = tmp_path / "runs.csv"
    path.write_text(text)
    with pytest.raises(PlanError, match=message):
        read_runs([path])


def test_a_binary_table_is_named(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xff\xfe\x00N")
    with pytest.raises(PlanError, match="cannot be read"):
        read_csv(path)


def test_one_precision_is_chosen(tmp_path):
    rows = [(*row, bits) for row in _grid_rows() for bits in (8, 16)]
    path = _write(tmp_path / "runs.csv", "N,D,loss,bits", rows)
    runs = read_runs([path], precision="16")
    assert len(runs) == 42
    assert "42 runs of other precisions" in runs.notes[0]
    with pytest.raises(PlanError, match="no run has the precision '4'"):
        read_runs([path], precision="4")


def test_of_several_learning_rates_the_best_counts_with_all_its_seeds():
    losses = {"1e-3": (3.0, 3.2), "2e-3": (3.05, 3.07), "4e-3": (9.0,)}
    rows = [
        Row(name=f"{lr}-{i}", parameters=1e6, tokens=1e7, loss_nats=loss, rate=(lr, ""))
        for lr, found in losses.items()
        for i, loss in enumerate(found)
    ]
    runs = runs_of(rows)
    assert runs.names == ("2e-3-0", "2e-3-1")
    assert "3 rows are left out" in runs.notes[0]


def _run_directory(path: Path, n: float, d: float, loss: float, **changes) -> Path:
    path.mkdir(parents=True)
    data = {"tokens": 100, "val_tokens": 10, "vocab": 257, "tokenizer": {"sha256": "abc"}}
    summary = {"parameters": n, "tokens": d, "loss_nats": loss, "recipe": "fp32", "data": data}
    summary |= {"reason": "finished", "diverged": False} | changes
    (path / "config.toml").write_text(toml.dumps({"train": {"lr": 0.001, "rows": 8}}))
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def test_run_directories_are_read_and_failures_are_named(tmp_path):
    for i, (n, d, loss) in enumerate(_grid_rows()):
        _run_directory(tmp_path / "runs" / f"{i:02}", n, d, loss)
    _run_directory(tmp_path / "runs" / "98", 1e8, 1e9, 9.0, diverged=True)
    _run_directory(tmp_path / "runs" / "99", 1e8, 1e9, 3.0, reason="interrupted")
    runs = read_runs([tmp_path / "runs"])
    assert len(runs) == 42
    assert runs.notes == ("1 runs not finished: 99.", "1 runs diverged: 98.")
    assert fit(runs).law == fit(grid(0.003)).law


def test_losses_on_different_text_are_not_mixed(tmp_path):
    for i, (n, d, loss) in enumerate(_grid_rows()[:8]):
        data = {"tokens": 100 + i // 4, "val_tokens": 10, "vocab": 257}
        _run_directory(tmp_path / f"{i}", n, d, loss, data=data)
    with pytest.raises(PlanError, match="2 different texts"):
        read_runs([tmp_path])


def test_nothing_to_read_is_said(tmp_path):
    with pytest.raises(PlanError, match="no run directory and no sweep"):
        read_runs([tmp_path])
    with pytest.raises(PlanError, match="does not exist"):
        read_runs([tmp_path / "nowhere"])
    _run_directory(tmp_path / "a", 1e6, 1e7, 3.0, reason="interrupted")
    with pytest.raises(PlanError, match="1 runs not finished: a"):
        read_runs([tmp_path])


def test_a_sweep_is_read(tmp_path):
    from halfulp.sweep.design import make_design
    from halfulp.sweep.result import Result
    from halfulp.sweep.store import open_store
    from halfulp.train.config import load_config

    config = load_config({"model": {"preset": "llama-tiny"}})
    design = make_design(config, recipes=["fp32", "te_current"], lrs=[1e-3, 1e-2], seeds=2)
    store, _ = open_store(tmp_path / "sweep", design, command=["test"])
    for i, cell in enumerate(design.cells()[:-1]):
        store.add(
            Result(
                id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
                status="finished" if i else "nonfinite", parameters=1000 + 0 * i, tokens=5000,
                loss_nats=3.0 + cell.lr + 0.001 * i,
            )
        )  # fmt: skip
    store.close()
    runs = read_runs([tmp_path / "sweep"], precision="te_current")
    assert runs.parameters.tolist() == [1000, 1000]  # two seeds at the better rate
    assert any("1 runs not finished" in note for note in runs.notes)
    assert any("1 runs diverged" in note for note in runs.notes)


def test_a_fit_file_comes_back_as_it_was_written(tmp_path):
    table = _write(tmp_path / "runs.csv", "N,D,loss", _grid_rows())
    found = fit_file(table, draws=20)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(found))
    assert read_fit(path) == found
    assert (len(found["draws"]), found["runs"], found["source"]) == (20, 42, "runs.csv")
    assert found["ranges"]["N"] == [1e7, 1e9]
    assert content(fit(read_runs([table])), None, source="x")["draws"] == []


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("coefficients"),
        lambda c: c["coefficients"].update(E=-1.0),
        lambda c: c["coefficients"].update(alpha="0.3"),
        lambda c: c["draws"].append([1.0, 2.0]),
        lambda c: c.update(kind="plan"),
        lambda c: c["ranges"].update(N=[1.0]),
    ],
)
def test_another_file_is_no_fit(tmp_path, change):
    found = content(fit(grid(0.003)), None, source="runs.csv")
    change(found)
    path = tmp_path / "fit.json"
    path.write_text(json.dumps(found))
    with pytest.raises(PlanError, match="is no fit of"):
        read_fit(path)
    with pytest.raises(PlanError, match=r"does not exist\. Make it with"):
        read_fit(tmp_path / "missing.json")
