import dataclasses
import tomllib
from pathlib import Path

import pytest

from halfulp import toml
from halfulp.errors import ConfigError
from halfulp.train.config import Stage, TrainConfig, load_config


def test_a_file_gives_what_it_says_and_defaults_elsewhere(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text('[train]\nlr = 1\nbetas = [0.8, 0.9]\n[policy]\nfile = "p.toml"\n')
    config = load_config(file, {"train": {"steps": 7}, "policy": {"recipe": "nvfp4", "file": ""}})
    assert config.train.lr == 1.0
    assert isinstance(config.train.lr, float)
    assert config.train.betas == (0.8, 0.9)
    assert config.train.steps == 7
    assert (config.policy.recipe, config.policy.file) == ("nvfp4", "")
    assert config.train.rows == TrainConfig().train.rows
    assert config.data.source == ("stdlib",)


def test_the_resolved_configuration_survives_toml():
    raw = {
        "policy": {"recipe": "nvfp4", "schedule": [{"until": 0.2, "recipe": "bf16_amp"}]},
        "model": {"hints": {"*.wide": "ffn"}},
        "data": {"source": ["a", "b"], "length": 32},
        "run": {"trackers": ["trackio"]},
    }
    config = load_config(raw)
    assert config.policy.schedule == (Stage(until=0.2, recipe="bf16_amp"),)
    assert load_config(tomllib.loads(toml.dumps(config.to_dict()))) == config


def test_the_digest_names_what_decides_the_run_only():
    config = load_config({})
    elsewhere = load_config({"run": {"out": "x"}})
    other = load_config({"train": {"seed": 1}})
    assert config.digest() == elsewhere.digest() != other.digest()


def test_the_corpus_does_not_depend_on_the_sequence_length():
    short, long = (load_config({"data": {"length": n}}).data for n in (8, 16))
    assert short.corpus() == long.corpus()
    assert not hasattr(short.corpus(), "length")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"train": {"stesp": 1}}, r"unknown key 'stesp' in section \[train\].*mean 'steps'"),
        ({"trian": {}}, "unknown key 'trian' in the top level.*mean 'train'"),
        ({"train": 3}, r"train must be a table, got 3"),
        ({"train": {"lr": "1e-3"}}, "train.lr must be a number, got '1e-3'"),
        ({"train": {"steps": 1.5}}, "train.steps must be a whole number"),
        ({"train": {"steps": True}}, "train.steps must be a whole number"),
        ({"train": {"compile": 1}}, "train.compile must be true or false"),
        ({"train": {"betas": [0.9]}}, "train.betas must be a list of 2 values"),
        ({"train": {"steps": 0}}, "train.steps = 0 is too small"),
        ({"train": {"seed": 2**64}}, "train.seed = 18446744073709551616 needs more than 64 bits"),
        ({"data": {"max_tokens": 2**63}}, "needs more than 64 bits"),
        ({"train": {"threads": 5000}}, "train.threads = 5000 is more than 1024"),
        ({"train": {"keep": 0}}, "train.keep = 0 is too small"),
        ({"train": {"lr": 0.0}}, "train.lr = 0 cannot be used. Give a finite number above 0"),
        ({"train": {"lr": float("inf")}}, "train.lr = inf cannot be used. Give a finite number"),
        ({"train": {"lr": float("nan")}}, "train.lr = nan cannot be used"),
        ({"train": {"clip": -1.0}}, "train.clip = -1 cannot be used"),
        ({"train": {"betas": [0.9, 1.0]}}, "train.betas = 1 cannot be used"),
        ({"train": {"schedule": "cosin"}}, "Did you mean 'cosine'"),
        ({"train": {"parallel": "fsdp"}}, "Did you mean 'fsdp2'"),
        ({"train": {"warmup": 20.0, "steps": 10}}, "longer than the run of 10 steps"),
        ({"data": {"length": 0}}, "data.length = 0 is too small"),
        ({"data": {"val_fraction": 0.9}}, "data.val_fraction"),
        ({"sharpness": {"every": 0, "draws": 3}}, "sharpness.draws has no effect"),
        (
            {
                "blockwise": {"ratios": "paper", "floor": "scaled"},
                "train": {"schedule": "constant"},
            },
            "has no floor",
        ),
        ({"run": {"trackers": ["wandb"]}}, "run.trackers = 'wandb' does not exist"),
        ({"policy": {"recipe": "a", "file": "b"}}, "both given"),
        ({"policy": {"schedule": [{"until": 0.5}]}}, r"schedule\[0\] needs a recipe or a file"),
        ({"policy": {"schedule": [{"recipe": "a"}]}}, r"policy.schedule\[0\].*until"),
        ({"policy": {"schedule": [{"until": 1.0, "recipe": "a"}]}}, "before step 1000"),
        ({"policy": {"schedule": [{"until": 1e-9, "recipe": "a"}]}}, "after step 0"),
        ({"policy": {"schedule": [{"until": float("inf"), "recipe": "a"}]}}, "after step 0"),
        (
            {"policy": {"schedule": [{"until": u, "recipe": "a"} for u in (0.5, 0.4)]}},
            "after step 500",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_cure(raw, message):
    with pytest.raises(ConfigError, match=message):
        load_config(raw)


def test_a_value_in_the_place_of_a_section_is_not_replaced_in_silence():
    with pytest.raises(ConfigError, match=r"train must be a table, got 3. Write it as \[train\]"):
        load_config({"train": 3}, {"train": {"steps": 2}})


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Path):
    (tmp_path / "run.toml").write_text("\ufeff[train]\nsteps = 7\n", encoding="utf-8")
    assert load_config(tmp_path / "run.toml").train.steps == 7


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*absent\.toml"):
        load_config(tmp_path / "absent.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_config(broken)


def test_every_section_is_frozen():
    config = load_config({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.lr = 1.0  # pyright: ignore[reportAttributeAccessIssue]


def test_relative_paths_are_anchored_and_names_are_not(tmp_path: Path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "llama-tiny").mkdir()
    monkeypatch.chdir(tmp_path)
    raw = {"data": {"source": ["stdlib", "x"], "tokenizer": "t.json"}, "policy": {"file": "p"}}
    config = load_config(raw, {"model": {"preset": "mine"}})
    assert config.data.source == ("stdlib", str(tmp_path / "x"))
    assert config.data.tokenizer == str(tmp_path / "t.json")
    assert config.policy.file == str(tmp_path / "p")
    assert config.model.preset == str(tmp_path / "mine")
    assert load_config({"model": {"preset": "llama-tiny"}}).model.preset == "llama-tiny"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "llama-tiny")
    home = load_config({"data": {"source": ["~/x"]}, "run": {"out": "~/runs/a"}})
    assert home.data.source == (str(tmp_path / "x"),)
    assert home.run.out == str(tmp_path / "runs/a")
