"""Speeds and corpus statistics as they are given, and runs as they are written."""

import json
import tomllib

import pytest

from halfulp.errors import PlanError
from halfulp.plan.facts import read_facts
from halfulp.plan.shape import PER_LAYER, PRESET, run_config, shape_of
from halfulp.plan.speeds import read_speeds
from halfulp.toml import dumps
from halfulp.train.config import load_config
from halfulp.train.presets import PRESETS


def test_speeds_as_pairs_and_as_a_file(tmp_path):
    found = read_speeds("bf16=1, fp8=1.35,nvfp4=1.6")
    assert found.keys() == {"fp8", "nvfp4"}
    assert (found["fp8"].ratio, found["fp8"].measured) == (1.35, True)
    table = {"fp8": {"ratio": 1.3, "low": 1.2, "high": 1.4, "source": "our cluster"}, "mxfp8": 1.2}
    (tmp_path / "speeds.json").write_text(json.dumps(table))
    found = read_speeds(str(tmp_path / "speeds.json"))
    assert (found["fp8"].low, found["fp8"].high, found["fp8"].source) == (1.2, 1.4, "our cluster")
    assert found["mxfp8"].low == found["mxfp8"].high == 1.2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fp8", "not understood"),
        ("fp8=fast", "not understood"),
        ("fp8=0", "positive ratio"),
        ("fp8=-1", "positive ratio"),
        ("fp8=inf", "positive ratio"),
        ("fp6=1.2", "cannot be planned with"),
        ("bf16=1.2", "which is 1"),
        ("missing.json", "cannot be read"),
    ],
)
def test_speeds_that_are_none(text, said):
    with pytest.raises(PlanError, match=said):
        read_speeds(text)


@pytest.mark.parametrize(
    "table", [[], {"fp8": "x"}, {"fp8": {"low": 1}}, {"fp8": {"ratio": 1.3, "low": 1.4}}]
)
def test_files_of_speeds_that_are_none(tmp_path, table):
    (tmp_path / "speeds.json").write_text(json.dumps(table))
    with pytest.raises(PlanError):
        read_speeds(str(tmp_path / "speeds.json"))


STATS = {
    "tokenizer": "bpe:32768", "symbols": 2.7e8, "duplicate_tokens_share": 0.1,
    "orders": [
        {"unit": "tokens", "n": 5, "unique": 8.6e7, "exponent": 0.783, "doubling": None,
         "curve": [[1e8, 4e7], [2.7e8, 8.6e7]]},
    ],
}  # fmt: skip


def test_statistics_of_a_corpus(tmp_path):
    (tmp_path / "stats.json").write_text(json.dumps(STATS))
    facts = read_facts(tmp_path / "stats.json")
    assert facts.unique_symbols == pytest.approx(2.43e8)
    assert (facts.orders[0].n, facts.orders[0].unit) == (5, "token")
    assert facts.orders[0].curve[-1] == (2.7e8, 8.6e7)
    assert facts.orders[0].doubling is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "holds no statistics"),
        ("[]", "holds no statistics"),
        ("{}", "symbols"),
        (json.dumps(STATS | {"symbols": 0}), "empty"),
        (json.dumps(STATS | {"orders": [{"n": 2}]}), "unit"),
    ],
)
def test_what_is_no_statistics_of_a_corpus(tmp_path, text, said):
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(PlanError, match=said):
        read_facts(tmp_path / "stats.json")
    with pytest.raises(PlanError, match="cannot be read"):
        read_facts(tmp_path / "absent.json")


@pytest.mark.parametrize("parameters", [1e6, 3e7, 1e9, 7e10, 1e12])
def test_shapes_have_the_parameters_asked_for(parameters):
    shape = shape_of(parameters)
    assert shape.parameters == pytest.approx(parameters, rel=0.15 if parameters < 1e7 else 0.05)
    assert shape.width % 64 == 0
    if parameters > 1e8:
        assert 60 < shape.width / shape.layers < 170
    with pytest.raises(PlanError, match="fewer"):
        shape_of(1e4)


def test_the_preset_has_the_parameters_per_layer_that_shapes_count():
    preset = PRESETS[PRESET]
    assert preset.kv_heads == preset.heads
    assert 4 + 3 * preset.ffn / preset.hidden == PER_LAYER
    assert preset.hidden // preset.heads == 64


def test_a_written_run_is_one_that_train_takes():
    shape = shape_of(1e8)
    config = run_config(
        shape, tokens=2e9, lr=1.2345e-3, batch_tokens=5e5, recipe="mxfp8", length=1024, gpus=4,
        data=["stdlib"], tokenizer="bpe:4096",
    )  # fmt: skip
    loaded = load_config(tomllib.loads(dumps(config)))
    train = loaded.train
    step = train.rows * train.accumulate * 1024 * 4
    assert step == pytest.approx(5e5, rel=0.1)
    assert step * train.steps == pytest.approx(2e9, rel=1e-3)
    assert (train.lr, loaded.policy.recipe) == (1.23e-3, "mxfp8")
    tiny = run_config(shape, tokens=1e6, lr=1e-3, batch_tokens=100, recipe="bf16_amp", length=512,
                      gpus=1, data=["stdlib"], tokenizer="bytes")  # fmt: skip
    assert (tiny["train"]["rows"], tiny["train"]["accumulate"]) == (1, 1)
