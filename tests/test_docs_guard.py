"""docs/guard.md says what the code does: options, defaults and constants."""

import dataclasses
import re
import tomllib
from importlib import import_module
from pathlib import Path

from halfulp.guard import attribute, keeper
from halfulp.train.config import GuardSection

DOC = (Path(__file__).parent.parent / "docs" / "guard.md").read_text(encoding="utf-8")


def rows(head: str) -> list[list[str]]:
    """The cells of the table whose first column is called `head`."""
    table = DOC.split(f"| {head} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


def test_every_option_stands_there_with_its_default():
    told = {name.strip("`"): default.strip("`") for name, default, _ in rows("option")}
    values = {name: tomllib.loads(f"x = {text}")["x"] for name, text in told.items()}
    plain = {key: list(v) if isinstance(v, tuple) else v for key, v in vars(GuardSection()).items()}
    assert values == plain
    assert list(told) == [field.name for field in dataclasses.fields(GuardSection)]


def test_constants_are_those_of_the_code():
    found = rows("constant")
    assert len(found) > 15
    for name, value, _ in found:
        module, constant = name.strip("`").split(".")
        actual = getattr(import_module(f"halfulp.guard.{module}"), constant)
        assert repr(actual).replace("'", '"') == value.strip("`"), name


def test_every_verdict_and_level_is_explained():
    verdicts = {getattr(attribute, name) for name in ("PRECISION", "DATA", "STATE", "HARDWARE")}
    assert {row[0] for row in rows("verdict")} == verdicts | {attribute.UNKNOWN}
    assert [row[0] for row in rows("level")] == [*"012345"]
    assert keeper.__doc__ is not None
    assert "5. stop" in keeper.__doc__
