"""`halfulp sharpness` as it is typed: what it prints and writes, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, logging

from halfulp.cli import main
from halfulp.sharpness.report import SharpnessReport

logging.disable_progress_bar()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=257, n_embd=32, n_layer=2, n_head=2, n_inner=64, n_positions=96,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder / "whole")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    model.save_pretrained(folder / "nan")
    (folder / "text.txt").write_text("every rounding has a size, a place and a price. " * 90)
    (folder / "short.txt").write_text("too short")
    return folder


def run(capsys, monkeypatch, home: Path, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.chdir(home)
    code = 0
    try:
        main(["sharpness", *arguments])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


QUICK = ("--data", "text.txt", "--tokens", "192", "--draws", "4", "--force")


def test_tables_and_figures(capsys, monkeypatch, home):
    code, out, _ = run(
        capsys, monkeypatch, home, "whole", *QUICK, "--per-layer", "--json", "found.json"
    )
    assert code == 0
    lines = out.splitlines()
    assert sum(line.startswith("layers.1.qk ") for line in lines) == 1
    lines = [line for line in lines if not line.startswith("note: ")]
    table = lines[1 : lines.index("")]
    names = ["block", "emb", "qk", "vo", "ffn", "norm", "pos", "bias"]
    assert [line.split()[0] for line in table] == names
    report = SharpnessReport.load(home / "found.json")
    assert (report.draws, report.estimator) == (4, "gnb")
    assert f"order: {report.order()}" in out
    assert f"{report.by_type['ffn'].sharpness:.3g}" in out


def test_formats_are_forecast_measured_and_priced(capsys, monkeypatch, home):
    options = ("--formats", "e4m3,int4@1x32:current", "--html", "page.html", "--json", "all.json")
    code, out, _ = run(capsys, monkeypatch, home, "whole", *QUICK, *options)
    assert code == 0
    rows = [
        line.split("  ") for line in out.splitlines() if line.startswith(("ffn ", "qk ", "all "))
    ]
    assert sum("e4m3" in " ".join(row) for row in rows) == 3
    priced = {row[0]: row[-1].strip() != "–" for row in rows if "e4m3" in " ".join(row)}
    assert priced == {"ffn": True, "qk": False, "all": False}  # qk shares a fused projection
    assert "fewest bits within 0.005 nats" in out
    page = (home / "page.html").read_text(encoding="utf-8")
    assert "int4@1x32:current" in page
    assert "KL by check" in page
    figures = json.loads((home / "all.json").read_text(encoding="utf-8"))
    assert {row["block"] for row in figures["rounding"]["rows"]} >= {"qk", "ffn", "all"}
    assert all(row["kl"] > 0 for row in figures["kl_by_check"] if row["block"] in ("emb", "ffn"))
    assert figures["lr_ratios"]["paper"]["vo"] == 4
    assert SharpnessReport.load(home / "all.json").draws == 4


def test_what_a_reader_must_know_of_few_texts_and_experts(capsys, monkeypatch, home):
    """Draws of the same text, formats that change nothing, and experts that hints place."""
    config = AutoConfig.for_model(
        "mixtral", vocab_size=257, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        max_position_embeddings=96, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(home / "experts")
    hints = ("--hint", "*.mlp.gate.weight=router:fp32", "--hint", "*.experts.*=ffn:fp32")
    options = (*QUICK, "--rel-se", "0.2", "--formats", "fp32")
    code, out, err = run(capsys, monkeypatch, home, "experts", *options, *hints)
    assert code == 0, err
    assert "The model has routers" in out
    assert "nearest: nothing to correlate" in out
    assert "nan" not in out
    options = ("--data", "text.txt", "--draws", "20", "--tokens", "1000")
    _, out, _ = run(capsys, monkeypatch, home, "whole", *options, "--estimator", "fisher")
    assert "is enough for" not in out  # each of its draws has a text of its own
    _, out, _ = run(capsys, monkeypatch, home, "whole", *options)
    assert "of the 20 draws" in out


def test_a_run_shows_how_far_its_last_update_could_go(capsys, monkeypatch, home):
    from halfulp.train.config import load_config
    from halfulp.train.loop import train

    options = {
        "model": {"preset": "gpt2-tiny"},
        "data": {"source": [str(home / "text.txt")], "tokenizer": "bytes", "length": 32},
        "train": {"steps": 4, "rows": 2, "eval_every": 0, "count_every": 0},
        "run": {"out": str(home / "run")},
    }
    train(load_config(options), force=True)
    code, out, _ = run(
        capsys, monkeypatch, home, "run", "--draws", "2", "--tokens", "128", "--force"
    )
    assert code == 0
    assert "critical step along the last update: " in out
    assert "the run's last rate was 0.0001\n" in out  # a tenth of 1e-3


def test_a_wanted_error_decides_the_draws(capsys, monkeypatch, home):
    code, _, _ = run(
        capsys, monkeypatch, home, "whole", *QUICK, "--rel-se", "0.08", "--json", "precise.json"
    )
    report = SharpnessReport.load(home / "precise.json")
    assert code == 0
    assert report.draws > 4
    assert max(report.by_type[t].rel_se for t in ("emb", "qk", "vo", "ffn", "norm")) <= 0.08


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("nosuch", (), "neither a run directory"),
        ("nan", (), "holds inf or NaN"),
        ("whole", ("--tokens", "64"), "--tokens 64 is too few"),
        ("whole", ("--seed", "99999999999999999999"), "64 bits"),
        ("whole", ("--budget", "1e-3"), "belongs to --formats"),
        ("whole", ("--draws", "1"), "whole number from 2"),
        ("whole", ("--estimator", "hessian"), "hutchinson"),
        ("whole", ("--rel-se", "0"), "(0, 1)"),
        ("whole", ("--hint", "x"), "GLOB="),
        ("whole", ("--hint", "nothing=ffn"), "hint"),
        ("whole", ("--tokens", "3"), "too few"),
        ("whole", ("--formats", "bf17"), "Nearest"),
        ("whole", ("--formats", ","), "empty"),
        ("whole", ("--formats", "e4m3", "--budget", "0"), "above 0"),
        ("whole", ("--json", "nowhere/x.json"), "directory"),
    ],
)
def test_wrong_input_exits_with_2(capsys, monkeypatch, home, model, options, said):
    code, _, err = run(capsys, monkeypatch, home, model, *QUICK, *options)
    assert (code, said in err) == (2, True), err
    assert "Traceback" not in err


def test_nothing_is_overwritten(capsys, monkeypatch, home):
    (home / "mine.json").write_text("{}")
    code, _, err = run(capsys, monkeypatch, home, "whole", "--json", "mine.json")
    assert (code, "--force" in err) == (2, True)
    assert (home / "mine.json").read_text() == "{}"
