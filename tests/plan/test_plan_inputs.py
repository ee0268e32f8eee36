"""Speeds and corpus statistics as they are given, and runs as they are written."""

import json
import tomllib

import pytest

from halfulp.corpus.growth import Growth
from halfulp.corpus.stats import Stats
from halfulp.errors import DataError, PlanError
from halfulp.plan.facts import read_facts
from halfulp.plan.shape import PER_LAYER, PRESET, Shape, run_config, shape_of
from halfulp.plan.speeds import read_speeds
from halfulp.plan.vocabulary import vocabulary_of
from halfulp.toml import dumps
from halfulp.train.config import load_config
from halfulp.train.model import outline
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
        ("fp8=1.2, fp8=1.4", "gives fp8 twice"),
        ("missing.json", "cannot be read"),
    ],
)
def test_speeds_that_are_none(text, said):
    with pytest.raises(PlanError, match=said):
        read_speeds(text)


@pytest.mark.parametrize(
    "table",
    [
        [],
        {"bf16": [1]},
        {"bf16": "x"},
        {"fp8": "x"},
        {"fp8": {"low": 1}},
        {"fp8": {"ratio": 1.3, "low": 1.4}},
    ],
)
def test_files_of_speeds_that_are_none(tmp_path, table):
    (tmp_path / "speeds.json").write_text(json.dumps(table))
    with pytest.raises(PlanError):
        read_speeds(str(tmp_path / "speeds.json"))


def counted(path, **changes):
    """Statistics of 3e8 words and 2.7e8 tokens, a tenth of the words in repeated documents."""

    def count(name, distinct, **more):
        values = {
            "occurrences": 4 * distinct, "exact": True, "rel_std": 0.0, "f": (1, 2), "slope": 0.8,
            "slope_se": 0.01, "doubling_factor": 2.4,
            "curve": ((100, 90), (4 * distinct, distinct)),
        }  # fmt: skip
        return Growth(name=name, distinct=distinct, **(values | more))

    counts = [count("documents", 900, unique_symbols=270_000_000), count("lines", 5000)]
    counts += [count("words:3", 10**7), count("tokens:8", 127_700_000, doubling_factor=None)]
    counts += [count("tokens:5", 86_000_000), count("window:16", 10**6)]
    tokenizer = {"kind": "json", "path": "/x/bpe.json", "sha256": "abcdef0123456789"}
    values = {
        "paths": ("text",), "files": 3, "text_bytes": 10**9, "empty_documents": 0,
        "symbols": {"words": 300_000_000, "tokens": 270_000_000}, "tokenizer": tokenizer,
        "skipped": {}, "invalid": {}, "unmarked": (), "split": False,
        "counts": {c.name: c for c in counts},
    }  # fmt: skip
    Stats(**(values | changes)).save(path)
    return path


def test_statistics_of_a_corpus(tmp_path):
    facts = read_facts(counted(tmp_path / "stats.json"))
    assert (facts.unit, facts.symbols, facts.note) == ("token", 2.7e8, "")
    assert facts.unique_symbols == pytest.approx(2.43e8)
    assert facts.tokenizer == "bpe.json abcdef01"
    assert [(o.unit, o.n) for o in facts.orders] == [("token", 5), ("token", 8), ("word", 3)]
    assert facts.orders[0].curve[-1] == (3.44e8, 8.6e7)
    assert (facts.orders[0].doubling, facts.orders[1].doubling) == (2.4, None)


def test_words_stand_in_for_tokens_and_that_is_said(tmp_path):
    path = counted(tmp_path / "stats.json", symbols={"words": 300_000_000}, tokenizer=None)
    facts = read_facts(path)
    assert (facts.unit, facts.unique_symbols) == ("word", pytest.approx(2.7e8))
    assert "taken as tokens" in facts.note


def test_token_files_measure_their_documents_in_tokens(tmp_path):
    path = counted(tmp_path / "stats.json", text_bytes=None, symbols={"tokens": 540_000_000})
    assert read_facts(path).unique_symbols == pytest.approx(2.7e8)


def test_what_is_no_statistics_of_a_corpus(tmp_path):
    with pytest.raises(PlanError, match="counted no text"):
        read_facts(counted(tmp_path / "none.json", symbols={"words": 0}))
    with pytest.raises(DataError, match="cannot be read"):
        read_facts(tmp_path / "absent.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(DataError, match="no statistics"):
        read_facts(tmp_path / "other.json")


@pytest.mark.parametrize("parameters", [1e6, 3e7, 1e9, 7e10, 1e12])
def test_shapes_have_the_parameters_asked_for(parameters):
    shape = shape_of(parameters)
    assert shape.parameters == pytest.approx(parameters, rel=0.15 if parameters < 1e7 else 0.05)
    assert shape.width % 64 == 0
    if parameters > 1e8:
        assert 60 < shape.width / shape.layers < 170
    with pytest.raises(PlanError, match="fewer"):
        shape_of(1e4)


@pytest.mark.parametrize(("parameters", "vocabulary"), [(1e6, 2000), (3e7, 32_000), (1e9, 128_000)])
def test_a_shape_may_count_its_embeddings(parameters, vocabulary):
    shape, bare = shape_of(parameters, vocabulary), shape_of(parameters)
    assert shape.parameters == pytest.approx(parameters, rel=0.15 if parameters < 1e7 else 0.05)
    assert shape.layers * shape.width**2 < bare.layers * bare.width**2
    with pytest.raises(PlanError, match="fewer than a layer and the embeddings of 32,000 tokens"):
        shape_of(2e6, 32_000)


def test_a_written_run_has_the_parameters_of_the_plan(tmp_path):
    """Its model, built on meta, has them with its embeddings; without, it would have 78 % more."""
    text = tmp_path / "a.txt"
    text.write_text("abc " * 100)
    vocabulary = vocabulary_of("bpe:32000", [str(text)])
    assert vocabulary == 32_000
    assert vocabulary_of("bytes", [str(text)]) == 257
    made = run_config(
        shape_of(2.5e7, vocabulary), tokens=1e6, lr=1e-3, batch_tokens=1e4, recipe="bf16_amp",
        length=512, gpus=1, data=[str(text)], tokenizer="bpe:32000",
    )  # fmt: skip
    model = outline(load_config(made).model, vocab=vocabulary, length=512)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(2.5e7, rel=0.05)


def test_the_shape_of_an_absurd_size_is_found_among_as_many_as_that_of_a_usual_one(monkeypatch):
    tried = []

    def count(parameters, width, vocabulary):
        tried.append(width)
        return Shape(layers=round(parameters / (12 * width**2)) or 1, width=width, parameters=1.0)

    monkeypatch.setattr("halfulp.plan.shape._with_width", count)
    shape_of(1e18)
    assert 500 < len(tried) < 2000
    assert all(width % 64 == 0 for width in tried)


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
