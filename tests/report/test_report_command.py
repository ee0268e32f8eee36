"""`halfulp report` on sweeps: what it prints and writes, and what it refuses."""

import json
import shutil

import judged_sweeps as sweeps
import pytest
import synthetic

from halfulp.cli import main

MONEY = [
    *("--gpu", "H200", "--price", "2.5-7", "--gpu-hours", "12000"),
    *("--speedup", "te_current=1.35", "--tokens", "2e12"),
]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    made = sweeps.design(["bf16_amp", "te_current", "fp8_unscaled"])
    folder = tmp_path_factory.mktemp("command")
    return sweeps.write(folder / "grid", made, sweeps.results(made))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return synthetic.write_run(tmp_path_factory.mktemp("runs") / "one", "fp32")


def call(capsys, *words: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stopped:
        main(["report", *map(str, words)])
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_verdicts_are_printed_and_figures_written(sweep, tmp_path, capsys):
    page, figures = tmp_path / "s.html", tmp_path / "s.json"
    code, out, _ = call(capsys, sweep, "-o", page, "--json", figures, *MONEY)
    assert code == 0
    assert out.splitlines()[0].startswith("te_current: could not tell, ")
    assert out.splitlines()[1].startswith("fp8_unscaled: fail, ")
    found = json.loads(figures.read_text(), parse_constant=lambda word: pytest.fail(word))
    assert found["runs"] == {"planned": 45, "done": 45}
    assert found["rows"][0]["recipe"] == "bf16_amp"
    losses = [o["result"]["loss_nats"] for p in found["rows"][2]["points"] for o in p["outcomes"]]
    assert losses.count("NaN") == 6  # fp8_unscaled diverges at two rates
    assert found["money"]["costs"][1]["ratio"]["value"] == pytest.approx(1 / 1.35, rel=0.02)
    assert "What it costs until one run has succeeded" in page.read_text()


def test_damaged_results_are_said_before_the_verdict(sweep, tmp_path, capsys):
    spoiled = shutil.copytree(sweep, tmp_path / "spoiled")
    with open(spoiled / "events.jsonl", "a", encoding="utf-8") as events:
        events.write("{ damaged\n")
    code, out, _ = call(capsys, spoiled, "-o", tmp_path / "s.html", "--executive")
    assert code == 0
    assert out.startswith("damaged: ")
    assert "is not a JSON object" in out.splitlines()[0]


def test_the_executive_page_names_the_command(sweep, tmp_path, capsys):
    page = tmp_path / "e.html"
    code, *_ = call(capsys, sweep, "-o", page, "--executive", "--language", "ja", *MONEY)
    assert code == 0
    assert 'lang="ja"' in page.read_text()


GUARD = ["guard.spikes_per_hour=0.01", "guard.rollback_hours=9", "guard.rescue=0.5"]


@pytest.mark.parametrize(
    "given",
    [
        ["prior_octaves=60"],
        ["proxy_fraction=0.3"],
        ["search_seeds=30"],
        ["success_prior=[0.5,40]"],
        ["extra_tokens.te_current=0.5"],
        ["adoption_usd=30000"],
        GUARD,
    ],
)
def test_every_assumption_changes_the_bill_and_is_named_on_both_pages(
    sweep, tmp_path, capsys, given
):
    said = [word for pair in given for word in ("--assume", pair)]
    ratios = []
    for name, more in (("a", []), ("b", said)):
        file = tmp_path / f"{name}.json"
        code, *_ = call(
            capsys, sweep, "-o", tmp_path / f"{name}.html", "--json", file, *MONEY, *more
        )
        assert code == 0
        costs = json.loads(file.read_text())["money"]["costs"]
        ratios.append(next(c["ratio"] for c in costs if c["recipe"] == "te_current"))
    assert ratios[0] != ratios[1]
    page = tmp_path / "e.html"
    assert call(capsys, sweep, "-o", page, "--executive", *MONEY, *said)[0] == 0
    for pair in given:
        name, _, value = pair.partition("=")
        assert f"{name} = {value}" in (tmp_path / "b.html").read_text()
        assert f"{name} = {value}" in page.read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--price", "cheap"], "--price 'cheap' is not understood"),
        (["--gpu", "H20000"], "H20000"),
        (["--speedup", "te_curent=1.3"], "Nearest: te_current"),
        (["--speedup", "-1"], "speed"),
        (["--gpu-hours", "0"], "gpu_hours"),
        (["--bar", "0"], "bar"),
        (["--assume", "proxy"], "Write NAME=VALUE"),
        (["--assume", "proxy_fraction="], "is not understood"),
        (["--assume", "proxy_fractio=1"], "Nearest: proxy_fraction"),
        (["--assume", "proxy_fraction=cheap"], "is not understood"),
        (["--assume", "proxy_fraction=true"], "has no number"),
        (["--assume", "proxy_fraction=-1"], "proxy_fraction = -1 has no meaning"),
        (["--assume", "prior_octaves=nan"], "prior_octaves = nan has no meaning"),
        (["--assume", "search_seeds=1.5"], "seeds are counted"),
        (["--assume", "success_prior=3"], "with two numbers"),
        (["--assume", "success_prior=[0,1]"], "is no Beta distribution"),
        (["--assume", "extra_tokens=0.1"], "Nearest: extra_tokens.RECIPE"),
        (["--assume", "extra_tokens.te_curent=0.1"], "Nearest: te_current"),
        (["--assume", "extra_tokens.te_current=-1"], "is no share"),
        (["--assume", "guard.rescue=0.5"], "guard.spikes_per_hour and guard.rollback_hours too"),
        (["--assume", "guard.rescu=0.5"], "Nearest: guard.rescue"),
        (["--assume", "adoption_usd=100"], "Give the GPU-hours of the reference"),
        (["--assume", "search_seeds=2", "--assume", "search_seeds=3"], "is given twice"),
        (["--language", "ja"], "--language belongs to --executive"),
        (["--executive", "--language", "fr"], "en and ja"),
    ],
)
def test_what_has_no_meaning_is_refused_and_nothing_is_written(
    sweep, tmp_path, capsys, options, said
):
    page = tmp_path / "no.html"
    code, _, error = call(capsys, sweep, "-o", page, *options)
    assert code == 2
    assert said in error
    assert not page.exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--gpu", "H200"],
        ["--tokens", "1e9"],
        ["--assume", "search_seeds=2"],
        ["--executive"],
        ["--json", "x.json"],
    ],
)
def test_options_of_a_sweep_are_not_ignored_for_runs(run, tmp_path, capsys, options):
    code, _, error = call(capsys, run, "-o", tmp_path / "r.html", *options)
    assert code == 2
    assert f"{options[0]}: only the report of a sweep takes that" in error


def test_a_sweep_does_not_go_with_others(sweep, run, tmp_path, capsys):
    code, _, error = call(capsys, sweep, run, "-o", tmp_path / "r.html")
    assert code == 2
    assert "one sweep, or on runs" in error


def test_the_bar_counts_for_runs_too(run, tmp_path, capsys):
    code, out, _ = call(capsys, run, "-o", tmp_path / "r.html", "--bar", "0.02")
    assert code == 0
    assert "report:" in out
    assert "0.02" in (tmp_path / "r.html").read_text()


def test_nothing_is_replaced_without_force(sweep, tmp_path, capsys):
    page = tmp_path / "s.html"
    page.write_text("mine")
    code, _, err = call(capsys, sweep, "-o", page)
    assert code == 2
    assert "--force" in err
    assert page.read_text() == "mine"
    assert call(capsys, sweep, "-o", page, "--force")[0] == 0
    assert page.read_text() != "mine"
