"""What the README shows works: its Python runs, its run.toml is valid, its commands exist."""

import re
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from halfulp.policy import Policy

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def test_the_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert "of the nonzero values became zero" in capsys.readouterr().out


def test_the_run_toml_is_a_configuration(tmp_path: Path) -> None:
    from halfulp.train.config import load_config

    (toml,) = blocks("toml")
    path = tmp_path / "run.toml"
    path.write_text(toml)
    config = load_config(path)
    assert config.policy.recipe == "te_current"
    assert config.data.tokenizer == "bpe:4096"


def test_the_commands_exist() -> None:
    from halfulp.cli.app import app

    used = set(re.findall(r"`halfulp (\w+)", README))
    assert {"demo", "train", "report", "recipes", "formats", "info"} <= used
    for command in used:
        assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0, command


def test_the_policy_of_the_docs_loads(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "policy.md").read_text(encoding="utf-8")
    policy, run = blocks("toml", text)
    path = tmp_path / "policy.toml"
    path.write_text(policy)
    assert [rule.match for rule in Policy.load(path).rules][-1] == "*"
    assert tomllib.loads(run)["policy"]["schedule"]


def test_relative_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
