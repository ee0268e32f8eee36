"""What a sweep comes to: in this process, where nothing else is at stake."""

import json
import math
import sys
from pathlib import Path

import pytest
import sweeps
from sweeps import config_of, design_of, facts_of, write_corpus

import halfulp
from halfulp.errors import ConfigError, DataError, HalfulpError, RunError
from halfulp.policy import Policy
from halfulp.run import Run
from halfulp.sweep.run import run_design
from halfulp.sweep.store import read_sweep

pytestmark = pytest.mark.usefixtures("serially")


def use(monkeypatch, function) -> None:
    monkeypatch.setattr("halfulp.sweep.run.run_cell", function)


@pytest.fixture
def imagined(corpus, tmp_path, monkeypatch):
    """The same, with runs that nobody has trained; and so do later sweeps of the test."""
    use(monkeypatch, sweeps.imagined)
    return run_design(design_of(corpus), tmp_path / "whole")


def events() -> tuple[list[dict], dict]:
    told: list[dict] = []
    return told, {"on_event": told.append}


def test_every_run_has_a_result_and_a_directory(whole):
    design = whole.design
    assert facts_of(whole.results).keys() == {cell.id for cell in design.cells()}
    assert {r.status for r in whole.results} == {"finished"}
    for result in whole.results:
        assert result.steps == result.planned_steps == 4
        assert result.tokens == 4 * 2 * 16
        assert 0 < result.seconds < result.wall_seconds
        assert 1 < result.loss_nats < 7
        path = whole.path / "runs" / result.id
        assert sorted(p.name for p in path.iterdir()) == [
            "config.toml", "environment.json", "events.jsonl", "policy.toml", "summary.json",
        ]  # fmt: skip
        assert Run.open(path, writer=False).summary()["loss_nats"] == result.loss_nats


def test_runs_of_a_seed_begin_alike_and_end_apart(whole):
    """Recipes of a seed share weights and data; nothing else is the same."""
    by_seed: dict[int, list] = {}
    for result in whole.results:
        by_seed.setdefault(result.seed, []).append(result)
    for results in by_seed.values():
        first = [r.initial_nats for r in results]
        assert max(first) - min(first) < 0.02
        exact = {r.initial_nats for r in results if r.recipe == "fp32"}
        assert len(exact) == 1
        assert len({r.loss_nats for r in results}) == 4
    assert abs(by_seed[0][0].initial_nats - by_seed[1][0].initial_nats) > 1e-3


def test_the_same_call_goes_on_and_runs_nothing_twice(whole):
    told, options = events()
    again = run_design(whole.design, whole.path, **options)
    assert [e["event"] for e in told] == ["begin"]
    assert facts_of(again.results) == facts_of(whole.results)


@pytest.mark.parametrize("kept", [1, 5])
def test_a_sweep_that_was_cut_short_ends_like_a_whole_one(imagined, tmp_path, kept):
    class Cut(Exception):
        pass

    def cut(event) -> None:
        told.append(event)
        if event["event"] == "result" and len(told) > 2 * kept:
            raise Cut

    told: list[dict] = []
    path = tmp_path / "sweep"
    with pytest.raises(Cut):
        run_design(imagined.design, path, on_event=cut)
    assert len(read_sweep(path).results) == kept
    assert not (path / "writer.lock").exists()
    again = run_design(imagined.design, path)
    assert facts_of(again.results) == facts_of(imagined.results)


def test_a_damaged_result_is_named_and_its_run_repeated(imagined, tmp_path):
    path = tmp_path / "sweep"
    run_design(imagined.design, path)
    lines = (path / "events.jsonl").read_text().splitlines()
    spoiled = [i for i, line in enumerate(lines) if '"result"' in line][2]
    lost = json.loads(lines[spoiled])["id"]
    lines[spoiled] = lines[spoiled][:50]
    (path / "events.jsonl").write_text("\n".join(lines) + "\n")
    told, options = events()
    table = run_design(imagined.design, path, **options)
    assert [e["event"] for e in told] == ["damaged", "begin", "run", "result"]
    assert told[-1]["id"] == lost
    assert f"line {spoiled + 1} is not a JSON object" in told[0]["message"]
    assert facts_of(table.results) == facts_of(imagined.results)
    assert len(table.damaged) == 1


def test_a_run_that_becomes_non_finite_is_a_result(corpus, tmp_path):
    """fp16 weights overflow where fp32's do not."""
    design = design_of(corpus, recipes=["fp32", "mask_e3m2"], lrs=[1e-2, 1e30])
    table = run_design(design, tmp_path / "sweep")
    found = {r.id: r for r in table.results}
    assert len(found) == 8
    failed = [r for r in found.values() if r.lr == 1e30]
    assert {r.status for r in failed} == {"nonfinite"}
    assert all("not finite" in r.message and 0 < r.steps < 4 for r in failed)
    assert all(math.isnan(r.loss_nats) for r in failed)
    assert {r.status for r in found.values() if r.lr == 1e-2} == {"finished"}
    read = read_sweep(tmp_path / "sweep")
    assert facts_of(read.results) == facts_of(table.results)


def refusing(path: Path, pattern: str) -> str:
    text = Policy.from_recipe("te_current").to_toml()
    path.write_text(text + f'\n[[rule]]\nmatch = "{pattern}"\nrecipe = "fp32"\n')
    return str(path)


def test_a_recipe_that_the_model_cannot_take_is_refused_once_and_named(corpus, tmp_path):
    file = refusing(tmp_path / "mine.toml", "layers.7.ffn")
    design = design_of(corpus, recipes=["fp32", file, "te_current"])
    table = run_design(design, tmp_path / "sweep")
    refused = [r for r in table.results if r.status == "refused"]
    assert [r.recipe for r in refused] == ["mine.toml"]
    assert "layers.7.ffn" in refused[0].message
    assert not refused[0].lost
    assert [r.recipe for r in table.results].count("fp32") == 4
    told, options = events()
    assert len(run_design(design, tmp_path / "sweep", **options).results) == 9
    assert [e["event"] for e in told] == ["begin"]


def test_recipes_that_the_model_cannot_take_are_refused_before_there_is_a_directory(
    corpus, tmp_path
):
    """The reference, or all of the others."""
    file = refusing(tmp_path / "mine.toml", "layers.7.ffn")
    for reference, why in (
        ("mine.toml", r"the reference mine\.toml cannot be trained on corpus: .*layers\.7\.ffn"),
        ("fp32", r"none of the recipes but the reference fp32\. mine\.toml on corpus: .*layers\.7"),
    ):
        named = file if reference == "mine.toml" else reference
        design = design_of(corpus, recipes=["fp32", file], reference=named)
        with pytest.raises(ConfigError, match=why):
            run_design(design, tmp_path / "sweep")
        assert not (tmp_path / "sweep").exists()


def local_model(folder: Path, **values) -> dict:
    """The section [model] of a Hugging Face directory without weights."""
    folder.mkdir()
    shape = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 300}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 64}
    (folder / "config.json").write_text(json.dumps(shape | values))
    return {"preset": str(folder), "hidden": 0, "layers": 0}


@pytest.mark.parametrize(
    ("sections", "why"),
    [
        ({"model": {"hidden": 40}}, "hidden = 40 does not fit"),
        ({"model": {"preset": "nothing"}}, "'nothing' is neither a preset nor a local path"),
        ({"model": {"vocab_size": 8}}, "has 8 token ids and the data needs"),
        ({"model": {"max_position_embeddings": 4}}, "has 4 positions and data.length is 16"),
        ({"model": {"hidden_size": "wide"}}, "is not a model configuration"),
        ({"data": {"tokenizer": "nowhere.json"}}, "nowhere.json"),
        ({"data": {"length": 100_000}}, "shorten the window"),
        ({"data": {"source": ["/nowhere"]}}, "/nowhere does not exist"),
        ({"run": {"trackers": ["tensorboard"]}}, r"halfulp\[track\]"),
        ({"blockwise": {"ratios": "emb=10,vo=4", "guard": True}}, "vo"),
    ],
)  # fmt: skip
def test_what_no_run_could_begin_with_leaves_nothing_on_disk(
    corpus, tmp_path, monkeypatch, sections, why
):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    model = sections.get("model", {})
    if model.keys() - {"hidden", "preset"}:
        sections = {"model": local_model(tmp_path / "model", **model)}
    with pytest.raises(HalfulpError, match=why):
        run_design(design_of(corpus, config=config_of(corpus, **sections)), tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_a_sweep_is_replaced_by_force_only_when_the_new_one_can_begin(imagined, corpus, tmp_path):
    path = tmp_path / "sweep"
    run_design(imagined.design, path)
    broken = design_of(corpus, data={"a": [str(tmp_path / "none")]})
    with pytest.raises(DataError, match="none does not exist"):
        run_design(broken, path, force=True)
    assert facts_of(read_sweep(path).results) == facts_of(imagined.results)


def test_a_machine_without_room_stops_the_sweep_and_is_no_failure(imagined, tmp_path, monkeypatch):
    path = tmp_path / "sweep"
    use(monkeypatch, sweeps.full_disk)
    with pytest.raises(RunError, match=r"te_current.* cannot be run here: .*No space left") as said:
        run_design(imagined.design, path)
    assert f"halfulp sweep --resume {path}" in str(said.value)
    assert {r.recipe for r in read_sweep(path).results} == {"fp32"}
    assert not (path / "writer.lock").exists()
    use(monkeypatch, sweeps.imagined)
    assert facts_of(run_design(imagined.design, path).results) == facts_of(imagined.results)


def test_a_checkpoint_that_cannot_be_read_costs_a_fresh_start(whole, tmp_path, monkeypatch):
    path, broken = tmp_path / "sweep", []

    def spoil_once(task):
        trained = sweeps.run_cell(task)
        if not broken:
            broken.append(task.cell.id)
            config = whole.design.config_of(task.cell, path / "runs" / task.cell.id, path)
            folder = path / "runs" / task.cell.id
            train_half(config, folder)
            raise InterruptedError("the machine went down")
        return trained

    use(monkeypatch, spoil_once)
    told, options = events()
    table = run_design(whole.design, path, **options)
    assert [e["id"] for e in told if e["event"] == "retry"] == broken
    assert facts_of(table.results) == facts_of(whole.results)


@pytest.mark.parametrize("left", [["config.toml.part"], ["config.toml", "environment.json.part"]])
def test_a_run_whose_worker_was_killed_as_it_began_is_run(whole, tmp_path, left):
    path = tmp_path / "sweep"
    folder = path / "runs" / whole.design.cells()[0].id
    run_design(whole.design, path, time_s=1e-9)
    folder.mkdir(parents=True)
    for name in left:
        (folder / name).write_text("half = ")
    assert facts_of(run_design(whole.design, path).results) == facts_of(whole.results)


def train_half(config, folder: Path) -> None:
    """A run at its first checkpoint, of which a byte is wrong."""
    from dataclasses import replace

    from halfulp.train.loop import train

    half = replace(config, train=replace(config.train, steps=2))
    train(half, force=True, command=("test",))
    file = next((folder / "checkpoints").glob("*/model.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"!")


def test_no_run_is_started_that_would_not_be_done_in_time(imagined, tmp_path, monkeypatch):
    path = tmp_path / "sweep"
    now = [0.0]
    monkeypatch.setattr("halfulp.sweep.run.time.monotonic", lambda: now[0])

    def ten_seconds(task):
        from dataclasses import replace

        now[0] += 10
        trained = sweeps.imagined(task)
        return replace(trained, result=replace(trained.result, wall_seconds=10.0))

    use(monkeypatch, ten_seconds)
    table = run_design(imagined.design, path, time_s=35)
    assert len(table.results) == 3  # the fourth would end at 40
    assert now[0] == 30
    table = run_design(imagined.design, path, time_s=9)
    assert len(table.results) == 3
    table = run_design(imagined.design, path)
    assert facts_of(table.results) == facts_of(imagined.results)


def test_a_worker_with_other_data_stops_the_sweep(corpus, tmp_path, monkeypatch):
    """Machines of a cluster may hold different files under one name."""

    def elsewhere(task):
        (moving / "25.txt").write_text("other words " * 300)
        return sweeps.run_cell(task)

    moving = write_corpus(tmp_path / "moving")
    use(monkeypatch, elsewhere)
    with pytest.raises(RunError, match=r"data set moving .* is not the same here"):
        run_design(design_of(moving), tmp_path / "sweep")
    assert read_sweep(tmp_path / "sweep").results == ()


@pytest.mark.parametrize("options", [{"jobs": -1}, {"time_s": -1.0}, {"timeout_s": 0.0}])
def test_numbers_that_mean_nothing_are_refused(whole, tmp_path, options):
    with pytest.raises(ConfigError, match="cannot be used"):
        run_design(whole.design, tmp_path / "sweep", **options)
    assert not (tmp_path / "sweep").exists()


def test_one_of_two_data_sets_that_cannot_be_read_is_enough(corpus, tmp_path):
    design = design_of(corpus, data={"a": [str(corpus)], "b": [str(tmp_path / "none")]})
    with pytest.raises(DataError, match="none does not exist"):
        run_design(design, tmp_path / "sweep")
    assert not (tmp_path / "sweep").exists()


def test_two_data_sets_are_two_sweeps_in_one(whole, corpus, tmp_path):
    other = write_corpus(tmp_path / "other", seed=1)
    data = {"corpus": [str(corpus)], "other": [str(other)]}
    table = run_design(design_of(corpus, data=data), tmp_path / "sweep")
    assert len(facts_of(table.results)) == 16
    assert facts_of(r for r in table.results if r.data == "corpus") == facts_of(whole.results)


def test_the_call_of_the_package_is_the_same_sweep(whole, corpus, tmp_path):
    table = halfulp.sweep(
        config_of(corpus), recipes=["fp32", "te_current"], lrs=[1e-2, 1e-3], seeds=2,
        out=tmp_path / "sweep",
    )  # fmt: skip
    assert facts_of(table.results) == facts_of(whole.results)
    assert table.path == tmp_path / "sweep"
