import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sweeps import config_of, design_of, write_corpus

from halfulp import toml
from halfulp.errors import ConfigError, PolicyError
from halfulp.policy import Policy
from halfulp.run import Run
from halfulp.sweep.design import Cell, Design, make_design
from halfulp.train.config import Stage, TrainConfig
from halfulp.train.loop import train

TWO = {"recipes": ["fp32", "te_current"], "lrs": [1e-3, 1e-2], "seeds": 2}


def make(**options) -> Design:
    return make_design(TrainConfig(), **(TWO | options))


def policy_file(path: Path, recipe: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(Policy.from_recipe(recipe).to_toml())
    return str(path)


def back(design: Design) -> Design:
    return Design.from_dict(tomllib.loads(toml.dumps(design.to_dict())))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipes": []}, "two recipes or more, and has none"),
        ({"recipes": ["fp32"]}, "two recipes or more, and has fp32"),
        ({"recipes": ["fp32", "fp32"]}, "two recipes or more"),
        ({"lrs": [1e-3]}, "two learning rates or more, and has 0.001"),
        ({"lrs": []}, "two learning rates"),
        ({"seeds": 1}, "two seeds or more, and has 0"),
        ({"seeds": 0}, "two seeds or more, and has none"),
        ({"seeds": [4, 4]}, "two seeds or more"),
        ({"seeds": [0, -1]}, "seed -1 cannot be used"),
        ({"seeds": [0, 0.5]}, "seed 0.5 cannot be used"),
        ({"seeds": [0, 2**63]}, "seed 9223372036854775808 cannot be used"),
        ({"lrs": [0.0, 1e-3]}, "learning rate 0 cannot be used"),
        ({"lrs": [-1e-3, 1e-3]}, "learning rate -0.001"),
        ({"lrs": [float("nan"), 1e-3]}, "learning rate nan"),
        ({"lrs": [float("inf"), 1e-3]}, "learning rate inf"),
        ({"lrs": [1e-3, 1e-3, 1e-2]}, "share the name fp32-lr1.000e-03-seed0"),
        ({"lrs": [1e-3, 1.00001e-3]}, "share the name"),
        ({"recipes": ["fp32", "te_current", "fp32"]}, "share the name"),
        ({"reference": "bf16_amp"}, "reference 'bf16_amp' is none of the recipes"),
        ({"recipes": ["fp32", "te_current:x+fp32"]}, "does not say where it ends"),
        ({"recipes": ["fp32", "bf16_amp:1.5+te_current"]}, "until = 1.5"),
        ({"recipes": ["fp32", "bf16_amp:0+te_current"]}, "until = 0"),
        ({"recipes": ["fp32", "fp32:0.5+bf16_amp:0.2+te_current"]}, "until = 0.2"),
        ({"data": {"日本": ["stdlib"], "中国": ["docs"]}}, "differ in ASCII letters"),
        ({"data": {"a": ["stdlib"], "b": ["stdlib"]}}, "'b' has the same sources as 'a'"),
    ],
)
def test_a_design_that_cannot_answer_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        make(**options)


@pytest.mark.parametrize("recipe", ["te_curent", "bf16_amp:0.2+te_curent", "", "fp32:0.5+"])
def test_an_unknown_recipe_is_named(recipe):
    with pytest.raises(PolicyError, match=recipe.rpartition("+")[2] or "''"):
        make(recipes=["fp32", recipe])


def test_a_missing_policy_file_is_named(tmp_path):
    with pytest.raises(PolicyError, match=r"none\.toml"):
        make(recipes=["fp32", str(tmp_path / "none.toml")])


def test_the_grid_is_whole_and_the_reference_leads():
    design = make(recipes=["mxfp8", "fp32"], reference="fp32", seeds=[3, 7], lrs=[1e-2, 1e-3])
    cells = design.cells()
    assert len(cells) == len({cell.id for cell in cells}) == 8
    assert cells[0] == Cell("fp32", 1e-3, 3, "stdlib")
    assert [cell.recipe for cell in cells[:4]] == ["fp32", "mxfp8", "fp32", "mxfp8"]
    assert design.lrs == (1e-3, 1e-2)


@pytest.mark.parametrize("spoiled", [{"lrs": ["x", "y"]}, {"lrs": "x"}, {"data": []}])
def test_a_design_spoiled_by_hand_is_named(spoiled):
    content = make().to_dict()
    content["sweep"] |= spoiled
    with pytest.raises(ConfigError):
        Design.from_dict(content)


def test_seeds_go_on_from_the_configurations_own():
    config = TrainConfig()
    config = replace(config, train=replace(config.train, seed=5))
    assert make_design(config, **(TWO | {"seeds": 3})).seeds == (5, 6, 7)


def test_what_every_run_has_of_its_own_does_not_make_another_design():
    """Rate, seed, recipe and directory of the configuration are not the design's."""
    config = TrainConfig()
    other = replace(
        config,
        train=replace(config.train, lr=0.5),
        policy=replace(config.policy, recipe="mxfp8"),
        run=replace(config.run, out="elsewhere"),
    )
    digests = {make_design(c, **TWO).digest() for c in (config, other)}
    assert len(digests) == 1
    longer = replace(config, train=replace(config.train, steps=7))
    for design in (make_design(longer, **TWO), make(seeds=3), make(guard=True), make(lrs=[1, 2])):
        assert design.digest() not in digests


def test_the_guard_is_off_unless_asked_for():
    assert not make().config.guard.on
    assert make(guard=True).config.guard.on


def test_every_run_has_one_thread_and_the_same_device_unless_said_otherwise():
    assert TrainConfig().train.device == "auto"
    assert make().config.train.threads == 1
    assert make().config.train.device == ("cuda" if torch.cuda.is_available() else "cpu")
    config = TrainConfig()
    config = replace(config, train=replace(config.train, device="cuda", threads=3))
    chosen = make_design(config, **TWO).config.train
    assert (chosen.device, chosen.threads) == ("cuda", 3)


def test_stages_are_one_more_recipe(tmp_path):
    file = policy_file(tmp_path / "mine.toml", "te_current")
    design = make(recipes=["fp32", f"bf16_amp:0.2+{file}", f"{file}:0.5+mxfp8"])
    assert design.recipes == ("fp32", "bf16_amp:0.2+mine.toml", "mine.toml:0.5+mxfp8")
    config = design.config_of(design.cells()[1], tmp_path / "run", tmp_path / "policies")
    assert config.policy.schedule == (Stage(until=0.2, recipe="bf16_amp"),)
    assert config.policy.file == str(tmp_path / "policies/mine.toml")
    config = design.config_of(design.cells()[2], tmp_path / "run", tmp_path / "policies")
    assert config.policy.schedule == (Stage(until=0.5, file=str(tmp_path / "policies/mine.toml")),)
    assert (config.policy.recipe, config.policy.file) == ("mxfp8", "")


def test_two_policy_files_of_one_name_are_refused(tmp_path):
    files = [policy_file(tmp_path / f / "p.toml", r) for f, r in (("a", "mxfp8"), ("b", "nvfp4"))]
    with pytest.raises(ConfigError, match=r"two policy files are called p\.toml"):
        make(recipes=["fp32", *files])


def test_a_policy_file_may_not_pass_for_a_recipe(tmp_path):
    file = policy_file(tmp_path / "te_current.toml", "mxfp8")
    with pytest.raises(ConfigError, match="share the name te_current-lr"):
        make(recipes=["fp32", "te_current", file])


def test_a_design_comes_back_from_toml_as_it_went(tmp_path):
    """Names and texts may hold whatever TOML has a meaning for."""
    nasty = 'a "quoted" \\ name.v2 = [é]\t'
    file = tmp_path / f"{nasty}.toml"
    policy_file(file, "mxfp8")
    file.write_text(f"# it's \"\"\"quoted\"\"\" '''twice''' \\\n{file.read_text()}")
    design = make(
        recipes=["fp32", str(file)],
        lrs=[1e-5, 0.1 + 0.2],
        data={nasty: ["stdlib"], "b.c": [str(tmp_path / "x y")]},
    )
    assert f"{nasty}.toml" in design.policies
    again = back(design)
    assert again == design
    assert again.digest() == design.digest()
    assert back(again) == again
    assert Path(design.cells()[1].id).name == design.cells()[1].id
    assert design.cells()[1].id.isascii()


@pytest.mark.parametrize("part", ["recipes", "reference", "lrs", "seeds", "data", "policies"])
def test_a_design_with_a_part_missing_or_wrong_is_named(part):
    value = make().to_dict()
    value["sweep"][part] = 3
    with pytest.raises(ConfigError):
        Design.from_dict(value)
    del value["sweep"][part]
    with pytest.raises(ConfigError, match=part):
        Design.from_dict(value)


def test_a_seed_decides_weights_and_data_whatever_the_recipe(corpus, tmp_path):
    """The first loss in fp32, and the data of every step, are those of the reference."""
    design = design_of(corpus, config=config_of(corpus, train={"steps": 2, "count_every": 0}))
    first: dict[tuple[int, float], set[float]] = {}
    for cell in design.cells():
        config = design.config_of(cell, tmp_path / cell.id, tmp_path)
        # In fp32: a recipe rounds the same weights and the same batch.
        config = replace(config, policy=replace(config.policy, recipe="fp32"))
        path = train(config, command=("test",)).path
        steps = list(Run.open(path, writer=False).events("step"))
        first.setdefault((cell.seed, 0.0), set()).add(steps[0]["loss_nats"])
        first.setdefault((cell.seed, cell.lr), set()).add(steps[1]["loss_nats"])
    assert all(len(losses) == 1 for losses in first.values())
    assert len({losses.pop() for (_, lr), losses in first.items() if not lr}) == 2  # two seeds


def test_each_data_set_is_read_where_it_is_named(corpus, tmp_path):
    other = write_corpus(tmp_path / "other", seed=1)
    design = design_of(corpus, data={"one": [str(corpus)], "two": [str(other)]})
    assert len(design.cells()) == 16
    sources = {
        cell.data: design.config_of(cell, tmp_path, tmp_path).data.source for cell in design.cells()
    }
    assert sources == {"one": (str(corpus),), "two": (str(other),)}
