"""`halfulp corpus sketch`, `merge` and `overlap` as a user types them."""

import json
from pathlib import Path

import pytest

from halfulp.cli import main


@pytest.fixture
def text(tmp_path: Path, monkeypatch) -> Path:
    """Two texts of three different words each, of which they share two; the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("round off adds")
    (tmp_path / "b.txt").write_text("adds up off")
    return tmp_path


def run(capsys, command: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["corpus", *command.split()])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def test_shards_are_sketched_united_and_compared(capsys, text):
    for name in "ab":
        code, out, _ = run(capsys, f"sketch {name}.txt -o {name}.hll --words 1 -j 1")
        assert code == 0
        assert out.split("\n")[1].split() == ["words:1", "3", "3", "±", "1.6%", f"{name}.hll"]
    assert run(capsys, "merge a.hll b.hll -o all")[0] == 0
    facts = json.loads((text / "all.hll.json").read_text())
    assert (facts["amounts"]["documents"], round(facts["distinct"])) == (2, 4)
    code, out, _ = run(capsys, "overlap a.hll b.hll --json found.json")
    assert code == 0
    assert json.loads((text / "found.json").read_text())["common"]["value"] == 2
    assert "distinct in both              2       2 … 2" in out
    assert "share of a.hll                66.67%  66.67% … 66.67%" in out
    assert "From all 4 distinct sequences of the two." in out


def test_several_lengths_are_several_files(capsys, text):
    code, _, _ = run(capsys, "sketch a.txt -o a --words 1,2 -j 1")
    assert code == 0
    names = sorted(path.name for path in text.glob("a-*.hll"))
    assert names == ["a-words-1.hll", "a-words-2.hll"]


def test_nothing_is_overwritten_without_force(capsys, text):
    (text / "a.theta").write_text("mine")
    code, _, err = run(capsys, "sketch a.txt -o a.hll --words 1 -j 1")
    assert code == 2
    assert "a.theta, to be written by --out, exists. Give --out another name, or --force" in err
    assert not (text / "a.hll").exists()
    assert run(capsys, "sketch a.txt -o a.hll --words 1 -j 1 --force")[0] == 0
    assert (text / "a.theta").read_bytes() != b"mine"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        ("sketch nowhere.txt -o x --words 1", 2, "nowhere.txt"),
        ("sketch junk.txt -o x --words 1", 3, "nothing is left"),
        ("sketch a.txt -o x --tokens 2", 2, "Name the tokenizer"),
        ("sketch a.txt -o x --words 1 --lg-k 3", 2, "lg_k is 3"),
        ("sketch a.txt -o no/x --words 1", 2, "a directory that exists"),
        ("sketch a.txt -o . --words 1", 2, "names no file"),
        ("sketch a.txt -o x --words 1 -j -1", 2, "greater than or equal to 0"),
        ("overlap one.hll one.hll -o one.hll.json --force", 2, "is read by this command"),
        ("merge a.txt -o x", 2, "A sketch is three files"),
        ("overlap one.hll two.hll", 2, "count unlike things: sequences is 'words:1' in one"),
    ],
)
def test_what_is_wrong_is_said(capsys, text, command, code, message):
    (text / "junk.txt").write_bytes(b"\0" * 100)
    run(capsys, "sketch a.txt -o one --words 1 -j 1")
    run(capsys, "sketch a.txt -o two --words 2 -j 1")
    found, _, err = run(capsys, command)
    assert found == code
    assert message in err
