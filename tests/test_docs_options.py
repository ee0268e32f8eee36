"""docs/options.md names every option of a run, with its default."""

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from halfulp.train import tree
from halfulp.train.config import DEVICES, PARALLEL, SCHEDULES, TRACKERS, TrainConfig
from halfulp.train.presets import PRESETS

PAGE = (Path(__file__).parent.parent / "docs" / "options.md").read_text(encoding="utf-8")
ELSEWHERE = {"guard", "blockwise"}


def told(section: str) -> dict[str, object]:
    """Name → default of every row of the section's table."""
    table = PAGE.split(f"## `[{section}]`")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| `(.*?)` \|", table, flags=re.MULTILINE)
    return {
        name: tomllib.loads(f"x = {default}")["x"]
        for names, default in rows
        for name in re.findall(r"\w+", names)
    }


@pytest.mark.parametrize(
    "section", [f.name for f in dataclasses.fields(TrainConfig) if f.name not in ELSEWHERE]
)
def test_every_option_stands_there_with_its_default(section: str) -> None:
    assert told(section) == tree.plain(TrainConfig())[section]


def test_every_section_and_choice_is_named() -> None:
    assert all(f"`[{f.name}]`" in PAGE for f in dataclasses.fields(TrainConfig))
    for word in (*PRESETS, *SCHEDULES, *PARALLEL, *DEVICES, *TRACKERS):
        assert f"`{word}`" in PAGE, word
