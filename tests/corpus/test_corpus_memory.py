"""One line as long as the file: counted, in memory that does not grow with it."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from halfulp.corpus.config import CountConfig
from halfulp.corpus.files import corpus_files
from halfulp.corpus.scan import Counted, Shard, scan

FAMILY = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32)


def one_line(path: Path, megabytes: int) -> int:
    """A file without a newline, of numbers that mostly differ; returns how many there are."""
    rng = np.random.default_rng(0)
    words = 0
    with open(path, "wb") as file:
        for _ in range(megabytes):
            block = rng.integers(10**6, 10**7, 2**17)
            file.write(" ".join(map(str, block)).encode() + b" ")
            words += len(block)
    return words


def counted(path: Path, **options) -> Counted:
    files = tuple(enumerate(corpus_files([str(path)])))
    return scan(Shard(0, files, CountConfig(**options), 0))


def test_a_long_line_needs_no_memory_of_its_length(tmp_path):
    path = tmp_path / "line.txt"
    words = one_line(path, 12)
    counted(path, words=(1,))  # tables that are made once
    tracemalloc.start()
    found = counted(path, words=(1, 3))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.tallies["words:1"].occurrences == words
    assert found.tallies["lines"].occurrences == found.tallies["documents"].occurrences == 1
    assert peak < 45e6  # the words of the line alone, as 64-bit numbers with their places, are 50e6
    several_sigma = 5 * found.tallies["words:3"].sample.rel_std
    assert found.tallies["words:3"].sample.distinct == pytest.approx(words - 2, rel=several_sigma)


@pytest.mark.slow
def test_a_gigabyte_in_one_line_stays_within_64_megabytes(tmp_path):
    small, path = tmp_path / "small.txt", tmp_path / "line.txt"
    small.write_text("a b c")
    counted(small, words=FAMILY)
    before = rss_bytes()
    words = one_line(path, 1024)
    peak = 0

    def watch(size: int) -> None:
        nonlocal peak
        peak = max(peak, rss_bytes())

    files = tuple(enumerate(corpus_files([str(path)])))
    found = scan(Shard(0, files, CountConfig(words=FAMILY), 0), watch)
    assert found.tallies["words:32"].occurrences == words - 31
    assert peak - before < 64e6


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
