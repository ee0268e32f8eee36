"""The files of a corpus that is counted; what is no text is found out when it is read."""

import codecs
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from halfulp.data.corpus import (
    STDLIB,
    SourceFile,
    is_companion,
    kind_of,
    missing,
    refuse_mixture,
    stdlib_files,
    walk,
)
from halfulp.data.stream import BLOCK, blocks, open_stream
from halfulp.errors import DataError

MOST_INVALID = 1e-3  # of a text's bytes
_ESCAPED = re.compile("[\udc80-\udcff]")


class NotTextError(DataError):
    """A file with a NUL byte or too much that is not UTF-8; counting goes on without it."""


def corpus_files(paths: Sequence[str]) -> tuple[SourceFile, ...]:
    """The files at `paths`, in the order given and by name within a folder.

    Empty files stay: they hold no document. Hidden files, and files that speak for a token file
    beside them, are left out. "stdlib" is the running Python's own library.
    Raises DataError for a path that is missing, a folder without files, and token files mixed with
    text.
    """
    files: list[SourceFile] = []
    for item in paths:
        if not item:
            raise DataError("a path is empty; the folder that you are in is called '.'.")
        try:
            files += stdlib_files() if item == STDLIB else _named(Path(item).expanduser())
        except OSError as error:
            raise DataError(
                f"{item} cannot be read: {error}. Check it and its permissions."
            ) from error
    refuse_mixture(files)
    return tuple(files)


def _named(path: Path) -> list[SourceFile]:
    if path.is_dir():
        found = [
            SourceFile(kind_of(file), file, file.relative_to(path).as_posix())
            for file in walk(path)
            if not is_companion(file)
        ]
        if not found:
            raise DataError(
                f"the folder {path} holds no file; hidden files are not read. Give a folder with "
                "text, JSONL, Parquet or token files."
            )
        return found
    if not path.exists():
        raise missing(path, "the path")
    if not path.is_file():
        raise DataError(f"{path} is neither a file nor a folder. Give a regular file.")
    return [SourceFile(kind_of(path), path, path.name)]


def stat_of(path: Path) -> os.stat_result:
    """What the system says of a file. DataError when it cannot be read."""
    try:
        return path.stat()
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error


def bytes_of(path: Path, begin: int = 0, end: int | None = None) -> Iterator[bytes]:
    """The bytes of a file from `begin` to `end`, decompressed, about a megabyte at a time."""
    with open_stream(path) as stream:
        if begin:
            stream.seek(begin)
        if end is None:
            yield from blocks(stream)
            return
        while begin < end and (block := stream.read(min(BLOCK, end - begin))):
            yield block
            begin += len(block)


def invalid_bytes(path: Path, begin: int = 0, end: int | None = None) -> int:
    """How many bytes of a text, or of some lines of it, are not UTF-8, decompressed.

    Raises NotTextError when there is a NUL byte or more than MOST_INVALID of them.
    """
    size = invalid = 0
    held = b""
    for block in bytes_of(path, begin, end):
        if b"\0" in block:
            raise NotTextError(_nul(block if not begin + size else b"  "))
        size += len(block)
        held, bad = _invalid(held + block)
        invalid += bad
    invalid += len(held)
    if invalid > MOST_INVALID * size:
        raise NotTextError(f"{invalid:,} of its {size:,} bytes are not UTF-8")
    return invalid


def _nul(start: bytes) -> str:
    utf16 = start[:2] in (b"\xff\xfe", b"\xfe\xff")
    return "it begins like UTF-16: convert it to UTF-8" if utf16 else "it holds a NUL byte"


def _invalid(data: bytes) -> tuple[bytes, int]:
    """The begun character at the end of `data`, and how many bytes before it are not UTF-8."""
    try:
        _, used = codecs.utf_8_decode(data, "strict", False)
        return data[used:], 0
    except UnicodeDecodeError:
        text, used = codecs.utf_8_decode(data, "surrogateescape", False)
        return data[used:], len(_ESCAPED.findall(text))


def text_blocks(path: Path, begin: int = 0, end: int | None = None) -> Iterator[str]:
    """The text of a file, or of some lines of it, without a byte order mark.

    Bytes that are not UTF-8 are lone surrogates: `text.encode("utf-8", "surrogateescape")` gives
    them back.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    first = not begin
    for block in bytes_of(path, begin, end):
        text = decoder.decode(block)
        yield text.removeprefix("\ufeff") if first else text
        first = False
    yield decoder.decode(b"", True)
