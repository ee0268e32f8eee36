"""`halfulp corpus stats` and `growth`: figures, refusals and exit codes."""

import gzip
import json
import random
import signal
from pathlib import Path

import numpy as np
import pytest

from halfulp.cli import main
from halfulp.corpus import count as counting
from halfulp.corpus.config import CountConfig
from halfulp.corpus.files import corpus_files
from halfulp.corpus.stats import load_stats
from halfulp.errors import DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("HALFULP_CACHE", str(folder))
    return folder


def run(capsys, *arguments: str | Path) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main(["corpus", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


def text_of(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return " ".join(str(int(chance.paretovariate(0.7)) % 5000) for _ in range(words))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "text"
    made.mkdir()
    for i in range(60):
        (made / f"{i:02d}.txt").write_text(text_of(i, 300))
    return made


def test_help_names_the_commands(capsys):
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for command in ("stats", "growth"):
        assert f"  {command}  " in out
        code, told, _ = run(capsys, command, "--help")
        assert code == 0
        assert "Exit codes: 0 done, 2 something is wrong, 3 no file is text, 130 stopped" in told


def test_stats_are_printed_written_and_read_again(capsys, folder, tmp_path):
    path = tmp_path / "stats.json"
    code, out, _ = run(capsys, "stats", folder, "--words", "1,3", "-o", path, "-j", "1")
    assert code == 0
    assert "60 files" in out
    assert "18,000 words, 60 documents" in out
    found = load_stats(path)
    words = [d.split() for d in (text_of(i, 300) for i in range(60))]
    assert found.counts["words:1"].distinct == len({w for d in words for w in d})
    triples = {tuple(d[i : i + 3]) for d in words for i in range(298)}
    assert found.counts["words:3"].distinct == len(triples)
    assert found.counts["words:3"].occurrences == 60 * 298
    assert found.symbols == {"words": 18000}
    assert found.counts["documents"].unique_symbols == 18000
    again = json.loads(path.read_text())
    assert json.loads(json.dumps(found.to_json(), allow_nan=False)) == again
    other = tmp_path / "other.json"
    assert run(capsys, "stats", folder, "--words", "1,3", "--json", other, "-j", "1")[0] == 0
    assert other.read_bytes() == path.read_bytes()


def test_nothing_is_overwritten_without_force(capsys, folder, tmp_path):
    path = tmp_path / "stats.json"
    path.write_text("mine")
    code, _, err = run(capsys, "stats", folder, "-o", path)
    assert (code, path.read_text()) == (2, "mine")
    assert "--force" in err
    assert run(capsys, "stats", folder, "-o", path, "--force", "-j", "1")[0] == 0
    assert load_stats(path).files == 60


@pytest.mark.parametrize("command", ["stats", "growth"])
def test_what_is_counted_is_not_written(capsys, folder, command):
    text = folder / "00.txt"
    before = text.read_bytes()
    code, _, err = run(capsys, command, text, "-o", text, "--force")
    assert (code, text.read_bytes()) == (2, before)
    assert "is read by this command" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("stats", ""), "a path is empty"),
        (("stats", "a.txt", "--words", ""), "for example 1,2,4,8"),
        (("growth", "a.txt", "--to", ""), "for example 2,4,8"),
        (("growth", "a.txt", "--to", "1e300", "--allow-far"), "give 1 to 1,000,000"),
        (("stats", "a.txt", "-j", "-1"), "greater than or equal to 0"),
        (("stats", "t.bin", "--end-token", "70000"), "cannot hold the end token 70000"),
        (("stats", "t.bin", "--vocab", "50", "--end-token", "50"), "its tokens end at 49"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(capsys, tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some words")
    np.arange(50, dtype="<u2").tofile(tmp_path / "t.bin")
    code, out, err = run(capsys, *arguments, *([] if "-j" in arguments else ["-j", "1"]))
    assert (code, out) == (2, "")
    assert said in err


def test_a_few_documents_are_counted_and_not_forecast(capsys, tmp_path):
    (tmp_path / "a.txt").write_text(text_of(0, 300))
    code, out, _ = run(capsys, "growth", tmp_path / "a.txt", "--words", "1", "-j", "1")
    assert code == 0
    assert "note: no forecast where there are fewer" in out


def test_growth_prints_forecasts_and_draws(capsys, folder, tmp_path):
    plot, out_file = tmp_path / "g.svg", tmp_path / "g.json"
    code, out, _ = run(
        capsys, "growth", folder, "--words", "2", "--to", "2,8", "--plot", plot, "-o", out_file,
        "-j", "1",
    )  # fmt: skip
    assert code == 0
    assert "× 2 (80 % band)" in out
    assert plot.read_text().count("<svg") == 1
    assert "mathdefault" not in plot.read_text()
    made = json.loads(out_file.read_text())["forecasts"]["words:2"]
    assert [f["factor"] for f in made] == [2, 8]
    assert made[0]["low"] < made[0]["distinct"] < made[0]["high"] < made[1]["low"]
    assert load_stats(out_file).counts["words:2"].distinct < made[0]["low"]


def test_far_forecasts_are_refused_unless_allowed(capsys, folder):
    code, _, err = run(capsys, "growth", folder, "--to", "16")
    assert code == 2
    assert "--allow-far" in err
    code, out, _ = run(capsys, "growth", folder, "--to", "16", "--allow-far", "-j", "1")
    assert code == 0
    assert "× 16" in out


def test_an_empty_file_is_no_document(capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    path = tmp_path / "s.json"
    code, out, _ = run(capsys, "growth", tmp_path / "empty.txt", "-o", path)
    assert code == 0
    assert "note: 0 documents" in out
    found = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["counts"]["words:3"]["slope"] is None
    assert found["counts"]["words:3"]["distinct"] == 0


def test_documents_that_are_all_empty_are_counted_apart(capsys, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": " "}\n')
    code, out, _ = run(capsys, "stats", path, "-j", "1")
    assert code == 0
    assert "0 documents (2 more are empty)" in out


@pytest.mark.parametrize("content", [b"abc\0def" * 40, b"caf\xe9 au lait " * 40, b"\xff\xfea\0b\0"])
def test_binary_files_are_skipped_and_named(capsys, folder, content):
    (folder / "a.exe").write_bytes(content)
    code, out, _ = run(capsys, "stats", folder, "-j", "1")
    assert code == 0
    assert f"note: skipped {folder / 'a.exe'}: " in out
    assert "60 documents" in out
    code, out, _ = run(capsys, "stats", folder, "-j", "1", "--bytes")
    assert code == 0
    assert "61 documents" in out
    code, _, err = run(capsys, "stats", folder / "a.exe")
    assert code == 3
    assert "--bytes" in err


@pytest.mark.parametrize("command", ["stats", "sketch"])
def test_many_skipped_files_are_one_note(capsys, folder, command):
    for i in range(20):
        (folder / f"{i:02}.exe").write_bytes(b"abc\0def" * 40)
    out_file = ["-o", folder.parent / "a.hll"] if command == "sketch" else []
    _, out, err = run(capsys, command, folder, "-j", "1", *out_file)
    (line,) = [line for line in (out + err).splitlines() if "skipped 20 files (" in line]
    assert (out + err).count("NUL byte") == 1
    assert sum(f"{i:02}.exe" in line for i in range(20)) == 3


def test_overlap_of_folders_says_how_to_sketch_them(capsys, folder):
    code, _, err = run(capsys, "overlap", folder, folder)
    assert code == 2
    assert f"halfulp corpus sketch {folder} -o" in err.replace("\n", " ")


def test_a_few_invalid_bytes_are_counted_as_letters(capsys, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone two\r\n" * 1 + b"three four\r\n" * 400 + b"caf\xe9 x")
    code, out, _ = run(capsys, "stats", path, "--words", "1", "-j", "1")
    assert code == 0
    assert "bytes that are not UTF-8, counted as letters: 1, in " in out
    row = next(line for line in out.splitlines() if line.startswith("words:1")).split()
    assert row[1:3] == ["804", "6"]  # no byte order mark and no carriage return among them


def test_broken_input_is_named_with_its_place(capsys, tmp_path):
    def refused(name: str, content: bytes, says: str, *more: str) -> None:
        path = tmp_path / name
        path.write_bytes(content)
        code, _, err = run(capsys, "stats", path, *more)
        assert code == 2
        assert says in err
        assert name in err

    packed = gzip.compress(text_of(0, 5000).encode())
    refused("cut.txt.gz", packed[:-20], "broken or cut off")
    zstandard = pytest.importorskip("zstandard")
    refused("cut.txt.zst", zstandard.compress(text_of(0, 5000).encode())[:-20], "cut off")
    rows = b'{"text": "a"}\n{"body": "b"}\n'
    refused("key.jsonl", rows, "line 2 has no key 'text'; its keys are 'body'")
    refused("bad.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', "line 2 is not UTF-8")
    refused("odd.bin", b"\0" * 7, "no multiple of 2")
    big = np.array([1, 2, 70], "<u2").tobytes()
    refused(
        "vocab.bin",
        big,
        "the token 70 at position 2, outside the vocabulary of 50",
        "--vocab",
        "50",
    )
    refused("words.bin", big, "is tokenized already", "--words", "3")
    refused("plain.txt", b"some text", "Name the tokenizer", "--tokens", "3")


def test_missing_paths_and_empty_folders_are_exit_2(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, "stats", tmp_path / "empty")
    assert (code, "holds no file" in err) == (2, True)
    code, _, err = run(capsys, "stats", tmp_path / "emty")
    assert (code, "the nearest path is" in err) == (2, True)
    code, _, err = run(capsys, "stats", tmp_path, "--words", "0")
    assert (code, "lengths must lie in 1 … 1024" in err) == (2, True)
    code, _, err = run(capsys, "stats", tmp_path / "empty", "--words", "x")
    assert (code, "Give whole numbers" in err) == (2, True)


def test_token_files_without_marks_are_one_document(capsys, tmp_path):
    np.arange(5000, dtype="<u2").tofile(tmp_path / "a.bin")
    code, out, _ = run(capsys, "stats", tmp_path / "a.bin", "--windows", "16")
    assert code == 0
    assert "5,000 tokens, 1 documents" in out
    assert "name their end with --end-token" in out
    code, out, _ = run(capsys, "stats", tmp_path / "a.bin", "--end-token", "999")
    assert "4,999 tokens, 2 documents" in out


def test_a_stopped_count_is_resumed(capsys, folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole.json"
    monkeypatch.setattr(counting, "SHARD_BYTES", 4000)
    assert run(capsys, "stats", folder, "-j", "1", "-o", whole)[0] == 0
    code, _, err = run(capsys, "stats", folder, "--resume")
    assert (code, "nothing to resume" in err) == (2, True)
    stop_at, scan = 7, counting.scan

    def stopping(shard, progress):
        if shard.index == stop_at:
            signal.raise_signal(signal.SIGINT)
        return scan(shard, progress)

    monkeypatch.setattr(counting, "scan", stopping)
    code, out, err = run(capsys, "stats", folder, "-j", "1")
    assert (code, out) == (130, "")
    assert f"stopped after {stop_at} of " in err
    assert "--resume" in err
    seen = []
    monkeypatch.setattr(counting, "scan", lambda s, p: seen.append(s.index) or scan(s, p))
    resumed = tmp_path / "resumed.json"
    assert run(capsys, "stats", folder, "-j", "1", "--resume", "-o", resumed)[0] == 0
    assert min(seen) == stop_at
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_large_jsonl_file_is_counted_in_parts(capsys, tmp_path, monkeypatch):
    path, whole, divided = tmp_path / "a.jsonl", tmp_path / "1.json", tmp_path / "2.json"
    rows = [json.dumps({"text": text_of(i, 1 + i % 200)}) for i in range(150)]
    path.write_text("\n".join(rows))
    options = ("stats", path, "--words", "1,3", "-j", "1", "-o")
    assert run(capsys, *options, whole)[0] == 0
    monkeypatch.setattr(counting, "SHARD_BYTES", 700)
    shards = counting.shards_of(corpus_files([str(path)]), CountConfig())
    assert len(shards) > 30
    assert sum(shard.size for shard in shards) == path.stat().st_size
    assert run(capsys, *options, divided)[0] == 0
    one, two = load_stats(whole), load_stats(divided)
    assert one.symbols == two.symbols
    for name, count in one.counts.items():
        other = two.counts[name]
        assert (count.occurrences, count.distinct, count.f) == (
            other.occurrences, other.distinct, other.f,
        )  # fmt: skip
    path.write_text("\n".join([*rows, "oops"]))
    code, _, err = run(capsys, *options, tmp_path / "3.json")
    assert (code, "the line at byte" in err) == (2, True)


def test_more_than_memory_is_refused_with_the_bytes(capsys, folder):
    code, _, err = run(capsys, "stats", folder, "--keep", str(10**12), "-j", "1")
    assert code == 2
    assert "can need 100,000,000,000,000 bytes" in err
    code, _, err = run(capsys, "stats", folder, "--keep", "10")
    assert (code, "give 1000 keys or more" in err) == (2, True)


def test_damaged_progress_is_refused(capsys, folder, own_cache, monkeypatch):
    monkeypatch.setattr(counting, "SHARD_BYTES", 4000)
    monkeypatch.setattr(counting, "_SECONDS_BETWEEN_SAVES", -1.0)

    def failing(shard, progress):
        if shard.index == 3:
            raise DataError("no more")
        return real(shard, progress)

    real = counting.scan
    monkeypatch.setattr(counting, "scan", failing)
    assert run(capsys, "stats", folder, "-j", "1")[0] == 2
    (kept,) = (own_cache / "corpus").iterdir()
    kept.write_bytes(kept.read_bytes()[:-50])
    code, _, err = run(capsys, "stats", folder, "-j", "1", "--resume")
    assert (code, "is damaged" in err) == (2, True)


@pytest.mark.slow  # processes import numpy for a second or more each, and a cluster starts
def test_processes_and_a_cluster_write_what_one_process_writes(
    capsys, folder, tmp_path, monkeypatch
):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(counting, "SHARD_BYTES", 20000)
    options = ("stats", folder, "--words", "1,3,8", "--keep", "2000")
    one, two, cluster = (tmp_path / f"{name}.json" for name in ("one", "two", "cluster"))
    assert run(capsys, *options, "-j", "1", "-o", one)[0] == 0
    assert run(capsys, *options, "-j", "2", "-o", two)[0] == 0
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert run(capsys, *options, "--ray", "auto", "-o", cluster)[0] == 0
    finally:
        ray.shutdown()
    assert one.read_bytes() == two.read_bytes() == cluster.read_bytes()
    assert not load_stats(one).counts["words:8"].exact


def test_a_shard_of_files_that_are_no_text_counts_nothing(capsys, folder, monkeypatch):
    (folder / "a.exe").write_bytes(b"\0" * 20_000)
    monkeypatch.setattr(counting, "SHARD_BYTES", 10_000)
    code, out, _ = run(capsys, "stats", folder, "--words", "1", "-j", "1")
    assert (code, "18,000 words, 60 documents" in out) == (0, True)
