"""`halfulp check` as it is typed: models on disk in every state, and its exit codes."""

import json
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, logging

from halfulp.cli import main
from halfulp.policy import Policy

logging.disable_progress_bar()
WEIGHT = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen2", vocab_size=257, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=64, max_position_embeddings=96,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in ("whole", "broken", "nan", "int8", "missing"):
        model.save_pretrained(folder / name)
    model.save_pretrained(folder / "sharded", max_shard_size="30KB")
    model.save_pretrained(folder / "lost", max_shard_size="30KB")
    model.to(torch.bfloat16).save_pretrained(folder / "bf16")
    file = folder / "broken" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    sorted((folder / "lost").glob("*.safetensors"))[1].unlink()
    for name in ("nan", "int8", "missing"):
        file = folder / name / "model.safetensors"
        tensors = load_file(file)
        if name == "nan":
            tensors[WEIGHT][0, 0] = float("nan")
        elif name == "int8":
            tensors[WEIGHT] = tensors[WEIGHT].to(torch.int8)
        else:
            del tensors[WEIGHT]
        save_file(tensors, file, metadata={"format": "pt"})
    text = "every rounding has a size, a place and a price. "
    (folder / "text.txt").write_text(text * 60)
    (folder / "short.txt").write_text(text)
    return folder


def run(capsys, monkeypatch, home: Path, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.chdir(home)
    with pytest.raises(SystemExit) as end:
        main(["check", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


QUICK = ("--data", "text.txt", "--formats", "bf16,e4m3", "--force", "--tokens", "192")


@pytest.mark.parametrize("model", ["whole", "sharded", "bf16"])
def test_a_directory_is_judged(capsys, monkeypatch, home, model):
    code, out, _ = run(
        capsys, monkeypatch, home, model, *QUICK, "--target", "bf16", "--json", f"{model}.json"
    )
    assert code == 0
    assert "pass: bf16 costs" in out
    assert ("note: The checkpoint is bf16" in out) == (model == "bf16")
    figures = json.loads((home / f"{model}.json").read_text())
    assert figures["uniform"]["bf16"]["measured_kl"] < figures["uniform"]["e4m3"]["measured_kl"]
    policy = Policy.from_table(tomllib.loads((home / "policy.toml").read_text()))
    assert policy.rules


@pytest.mark.parametrize(
    ("model", "code", "said"),
    [
        ("broken", 64, "cannot be loaded"),
        ("lost", 64, "model-00002"),
        ("missing", 64, "up_proj"),
        ("nan", 3, "layers.1.mlp.up_proj"),
        ("int8", 3, "quantized already"),
        ("nosuch", 64, "neither a run directory"),
    ],
)
def test_a_broken_one_is_named(capsys, monkeypatch, home, model, code, said):
    found, _, err = run(capsys, monkeypatch, home, model, *QUICK)
    assert (found, said in err, "Traceback" in err) == (code, True, False)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--tokens", "5"), "too few"),
        (("--tokens", "abc"), "--tokens"),
        (("--formats", "bf17"), "Nearest"),
        (("--budget", "-1"), "positive"),
        (("--lr", "0"), "positive"),
        (("--probes", "0"), "1 or more"),
        (("--target", "te_curent"), "te_current"),
        (("--hardware", "hoper"), "hopper"),
        (("--pin", "x"), "GLOB="),
        (("--attn", "flash"), "eager"),
        (("--html", "nowhere/page.html"), "directory"),
        (("--json", "policy.toml"), "three names"),
    ],
)
def test_wrong_input_exits_with_64(capsys, monkeypatch, home, options, said):
    code, _, err = run(capsys, monkeypatch, home, "whole", *QUICK, *options)
    assert (code, said in err) == (64, True), err


def test_short_text_is_answered(capsys, monkeypatch, home):
    code, _, err = run(capsys, monkeypatch, home, "whole", "--data", "short.txt", "--force")
    assert (code, "129 tokens" in err) == (64, True)


def test_over_the_budget_exits_with_2(capsys, monkeypatch, home):
    target = ("--target", "te_current", "--budget", "1e-9")
    code, out, _ = run(capsys, monkeypatch, home, "whole", *QUICK, *target)
    assert code == 2
    assert "fail: te_current" in out


def test_nothing_is_replaced_without_force(capsys, monkeypatch, home):
    (home / "policy.toml").write_text("mine")
    code, _, err = run(capsys, monkeypatch, home, "whole", "--data", "text.txt")
    assert (code, "--force" in err, (home / "policy.toml").read_text()) == (64, True, "mine")
    assert "--policy" in err


def test_one_site_is_explained_and_the_page_written(capsys, monkeypatch, home):
    more = ("--explain", f"weight:{WEIGHT}", "--html", "page.html")
    code, out, _ = run(capsys, monkeypatch, home, "whole", *QUICK, *more)
    assert code == 0
    assert "KL per head" in out
    assert "<html" in (home / "page.html").read_text()
