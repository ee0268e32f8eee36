"""Parts of a large text: the lines that begin in them, and the text before."""

import re
from collections.abc import Iterator
from pathlib import Path

from halfulp.corpus.files import stat_of
from halfulp.data.corpus import SourceFile
from halfulp.data.stream import BLOCK, open_stream

BYTE_ORDER = b"\xef\xbb\xbf"  # mark
_ANY = re.compile(rb"\n")
_CLEAN = re.compile(rb"(?<=\S)\n(?=\S)")  # where byte-level BPE gives the same tokens on both sides
_NEAR = 1 << 16  # bytes looked at first for what lies before a part
_FAR = 1 << 25


def lines_in(file: SourceFile, *, clean: bool) -> tuple[int, int]:
    """The bytes, begin and end, of the lines that begin in the file's part; equal where none does.

    `clean`: a line does not count as beginning where white space lies around its line break.
    """
    size = stat_of(file.path).st_size
    if file.end is None:
        return 0, size
    begin = _line(file.path, file.begin, min(file.end, size), clean=clean) if file.begin else 0
    if begin is None:
        return size, size
    end = None if file.end >= size else _line(file.path, file.end, size, clean=clean)
    return begin, size if end is None else end


def text_before(path: Path, at: int, *, clean: bool) -> Iterator[bytes]:
    """Whole lines that end at `at`, again and again more of them; the last is all, or 32 MB."""
    reach = _NEAR
    while True:
        begin = max(0, at - reach)
        first = _line(path, begin, at, clean=clean) if begin else 0
        if first is not None:
            with open_stream(path) as stream:
                stream.seek(first)
                text = stream.read(at - first)
            yield text if first else text.removeprefix(BYTE_ORDER)
        if not begin or reach >= _FAR:
            return
        reach = min(4 * reach, _FAR)


def _line(path: Path, begin: int, end: int, *, clean: bool) -> int | None:
    """Where the first line begins that does so in the bytes from `begin` ≥ 1 to `end`."""
    pattern = _CLEAN if clean else _ANY
    at = max(0, begin - 2)  # a clean line break needs the byte before it
    with open_stream(path) as stream:
        stream.seek(at)
        data = stream.read(BLOCK)
        while True:
            found = pattern.search(data, max(0, begin - 1 - at))
            if found is not None:
                line = at + found.end()
                return line if line < end else None
            more = stream.read(BLOCK) if at + len(data) <= end else b""
            if not more:
                return None
            at += max(0, len(data) - 2)
            data = data[-2:] + more
