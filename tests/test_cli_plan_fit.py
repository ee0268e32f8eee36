import json
import sys
from pathlib import Path

import numpy as np
import pytest

from halfulp.cli import main
from halfulp.plan.fit_file import read_fit

sys.path.append(str(Path(__file__).parent / "plan"))
from lawful_runs import grid, truth


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of one command."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


@pytest.fixture
def table(tmp_path: Path) -> str:
    runs = grid(0.003)
    rows = zip(runs.parameters, runs.tokens, runs.loss_nats, strict=True)
    path = tmp_path / "runs.csv"
    path.write_text("N,D,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in rows))
    return str(path)


def test_fit_says_the_law_its_band_and_what_to_run_next(capsys, table, tmp_path):
    json_, plot = tmp_path / "fit.json", tmp_path / "fit.svg"
    code, out, _ = run(
        capsys, "plan", "fit", table, "--bootstrap", "40", "--json", str(json_),
        "--plot", str(plot),
    )  # fmt: skip
    assert code == 0
    for words in ("42 runs", "80 % of 40 resamples", "run next: N = ", "largest runs, predicted"):
        assert words in out
    figures = read_fit(json_)
    assert abs(figures["coefficients"]["alpha"] - truth().alpha) < 0.06
    assert len(figures["draws"]) == 40
    assert figures["bands"]["run_at_10x"]["low"] < figures["bands"]["loss_at_10x"]["low"]
    assert plot.read_text().count("<svg") == 1


def test_a_fit_is_a_law_of_the_planner(capsys, table, tmp_path):
    json_ = tmp_path / "fit.json"
    assert run(capsys, "plan", "fit", table, "--bootstrap", "40", "-o", str(json_))[0] == 0
    code, out, err = run(capsys, "plan", "--flops", "1e19", "--law", str(json_))
    assert (code, "fit" in out) == (0, True), err


def test_fit_without_resamples_has_no_band(capsys, table):
    code, out, _ = run(capsys, "plan", "fit", table, "--bootstrap", "0")
    assert (code, "80 %" in out, "run next" in out) == (0, False, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--bootstrap", "5"), "20 or more"),
        (("--bootstrap", "20", "--seed", "-1"), "Give 0 or more"),
        (("--bootstrap", "0", "--next-flops", "1e19"), "--next-flops needs resamples"),
        (("--bootstrap", "20", "--next-flops", "1"), "smallest useful run"),
        (("--bootstrap", "20", "--next-flops", "inf"), "cannot be paid"),
        (("--precision", "bf16"), "no run has the precision"),
        (("--plot", "nowhere/f.svg"), "cannot be written"),
    ],
)
def test_what_cannot_be_answered_is_exit_code_2(capsys, table, options, message):
    code, _, err = run(capsys, "plan", "fit", table, *options)
    assert (code, message in err) == (2, True), err


def test_the_table_of_runs_is_never_written(capsys, table):
    before = Path(table).read_bytes()
    code, _, err = run(capsys, "plan", "fit", table, "--bootstrap", "0", "-o", table, "--force")
    assert (code, Path(table).read_bytes()) == (2, before)
    assert "is read by this command" in err


def test_files_are_not_replaced(capsys, table, tmp_path):
    kept = tmp_path / "fit.json"
    kept.write_text("mine")
    assert run(capsys, "plan", "fit", table, "--json", str(kept))[0] == 2
    assert kept.read_text() == "mine"


def test_few_runs_are_fitted_with_the_error_on_the_largest_unknown(capsys, tmp_path):
    chosen = np.isin(np.arange(42), [0, 3, 10, 17, 21, 33, 41])
    runs = grid(0.001).where(chosen)
    rows = zip(runs.parameters, runs.tokens, runs.loss_nats, strict=True)
    path = tmp_path / "few.csv"
    path.write_text("N,D,loss\n" + "".join(f"{n},{d},{loss}\n" for n, d, loss in rows))
    code, out, err = run(capsys, "plan", "fit", str(path), "--bootstrap", "0")
    assert code == 0, err
    assert "7 runs" in out


def test_sparsity_is_measured_and_written(capsys, tmp_path):
    json_ = tmp_path / "sparsity.json"
    code, out, err = run(
        capsys, "plan", "sparsity", "llama-tiny", "--tokens", "256", "--draws", "2",
        "--json", str(json_),
    )  # fmt: skip
    assert code == 0, err
    assert "random weights of seed 0: a trained model differs" in out
    figures = json.loads(json_.read_text())
    assert figures["tokens"] == 2 * 127
    assert {row["rule"] for row in figures["rows"]} == {"magnitude", "sharpness"}
    assert sum(figures["parameters"].values()) == 131_520


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("nowhere",), "neither a run directory"),
        (("llama-tiny", "--budget", "0"), "leaves no room"),
        (("llama-tiny", "--tokens", "5"), "too few"),
        (("llama-tiny", "--draws", "1"), "draws"),
    ],
)
def test_sparsity_refuses_what_cannot_be_measured(capsys, options, message):
    code, _, err = run(capsys, "plan", "sparsity", *options)
    assert (code, message in err) == (2, True), err
