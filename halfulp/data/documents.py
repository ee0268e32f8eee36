"""Files to documents: text, JSON lines and Parquet, read piece by piece."""

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO, NamedTuple

from halfulp.data.corpus import SourceFile
from halfulp.data.stream import blocks, open_stream
from halfulp.errors import DataError, require

PIECE = 1 << 18  # characters; longer documents arrive in several pieces
_LINE_END = re.compile(r"(?<=\S)\n(?=\S)")
_GAP = re.compile(r"(?<=\S)(?= \S)")


class Piece(NamedTuple):
    """A stretch of a document; `last` marks the document's end."""

    text: str
    last: bool


def read_documents(file: SourceFile, text_key: str) -> Iterator[Piece]:
    """The documents of a file in order: one per text file, JSON line or Parquet row.

    Raises DataError, naming file and place, for anything that is not text.
    """
    if file.kind == "jsonl":
        yield from _jsonl(file, text_key)
    elif file.kind == "parquet":
        yield from _parquet(file, text_key)
    else:
        yield from _text(file)


def cut(text: str, begin: int = 0) -> int:
    """Where the piece of `text` that starts at `begin` ends; more than PIECE characters follow.

    Between two lines where it can, else before a space, so that byte-level BPE gives the same
    tokens as on the whole text; a text without either is cut anywhere.
    """
    end = begin + PIECE
    for pattern, skip in ((_LINE_END, 1), (_GAP, 0)):
        for start in (max(begin, end - 4096), end - PIECE // 2):
            places = [match.start() for match in pattern.finditer(text, start, end)]
            if places:
                return places[-1] + skip
    return end


def _pieces(text: str) -> Iterator[Piece]:
    begin = 0
    while len(text) - begin > PIECE:
        end = cut(text, begin)
        yield Piece(text[begin:end], False)
        begin = end
    yield Piece(text[begin:], True)


def _text(file: SourceFile) -> Iterator[Piece]:
    with open_stream(file.path) as stream:
        yield from in_pieces(_decoded(file, blocks(stream)))


def in_pieces(texts: Iterable[str]) -> Iterator[Piece]:
    """The pieces of the document that `texts` make up, end to end."""
    held = ""
    for text in texts:
        held += text
        while len(held) > PIECE:
            end = cut(held)
            yield Piece(held[:end], False)
            held = held[end:]
    yield Piece(held, True)


def _decoded(file: SourceFile, stream: Iterator[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in stream:
        if (at := block.find(b"\0")) >= 0:
            raise _not_text(file, offset + at, block[at : at + 1], block[:2] if not offset else b"")
        text = _decode(file, decoder, block, offset)
        yield text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(block)
    _decode(file, decoder, b"", offset, final=True)


def _decode(
    file: SourceFile,
    decoder: codecs.IncrementalDecoder,
    block: bytes,
    offset: int,
    *,
    final: bool = False,
) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        start = block[:2] if offset == 0 else b""
        bad = error.object[error.start : error.start + 1]
        raise _not_text(file, offset - pending + error.start, bad, start) from error


def _not_text(file: SourceFile, at: int, bad: bytes, start: bytes) -> DataError:
    cure = "Take it out of the sources, or convert it: text, JSONL, Parquet and .bin are read."
    if start in (b"\xff\xfe", b"\xfe\xff"):
        cure = "It begins like UTF-16: convert it with iconv -f UTF-16 -t UTF-8."
    return DataError(
        f"{file.path} is not UTF-8 text: byte {at} is 0x{bad.hex()}"
        f"{' (binary file)' if bad == bytes(1) else ''}. {cure}"
    )


def _jsonl(file: SourceFile, key: str) -> Iterator[Piece]:
    with open_stream(file.path) as stream:
        for place, line in _lines(file, stream):
            if line.strip():
                yield from _pieces(_json_text(f"{file.path} {place}", line, key))


def _lines(file: SourceFile, stream: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """The lines that begin in the file's part, each with what to call it."""
    at = number = 0
    if file.begin:
        stream.seek(file.begin - 1)
        begun = stream.readline(-1 if file.end is None else file.end - file.begin + 1)
        if not begun.endswith(b"\n"):
            return
        at = file.begin - 1 + len(begun)
    try:
        for line in stream:
            if file.end is not None and at >= file.end:
                return
            number += 1
            yield f"the line at byte {at}" if file.begin else f"line {number}", line
            at += len(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        # open_stream names the file; the line is known only here.
        raise EOFError(f"{error} (after line {number})") from error


def _json_text(place: str, line: bytes, key: str) -> str:
    try:
        row = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{place} is not UTF-8: byte {error.start} of the line is "
            f"0x{error.object[error.start]:02x}. Convert the file to UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not a JSON value ({error}). The file may be cut off: restore it or "
            "delete the line."
        ) from error
    if not isinstance(row, dict):
        raise DataError(
            f"{place} holds a {type(row).__name__}, and a JSON object with the key {key!r} is "
            "needed. Write one object a line."
        )
    if key not in row:
        raise DataError(
            f"{place} has no key {key!r}; its keys are {_names(row)}. "
            "Give the one that holds the text as text_key."
        )
    return _checked(row[key], place, key)


def _parquet(file: SourceFile, key: str) -> Iterator[Piece]:
    pyarrow = require("pyarrow", "data")
    parquet = require("pyarrow.parquet", "data")
    number = 0
    try:
        with parquet.ParquetFile(file.path) as table:
            _check_column(file, pyarrow, table.schema_arrow, key)
            number, groups = _row_groups(table.metadata, file)
            if not groups:
                return
            for batch in table.iter_batches(batch_size=256, columns=[key], row_groups=groups):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield from _pieces(_checked(value, f"{file.path} row {number}", key))
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken_parquet(file, number, error) from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{key!r} at {file.path} after row {number} is not UTF-8: byte {error.start} is "
            f"0x{error.object[error.start]:02x}. Write the column again as text, or drop the row."
        ) from error


def _broken_parquet(file: SourceFile, row: int, error: BaseException) -> DataError:
    return DataError(
        f"{file.path} is a broken or cut-off Parquet file, after row {row}: "
        f"{str(error).splitlines()[0]} Fetch or write it again, or take it out."
    )


def first_row(file: SourceFile) -> int:
    """How many rows of a Parquet file lie before its part. DataError for a broken file."""
    pyarrow = require("pyarrow", "data")
    try:
        with require("pyarrow.parquet", "data").ParquetFile(file.path) as table:
            return _row_groups(table.metadata, file)[0]
    except (pyarrow.ArrowException, OSError) as error:
        raise _broken_parquet(file, 0, error) from error


def _row_groups(metadata: Any, file: SourceFile) -> tuple[int, list[int]]:
    """The row groups that begin in the file's part, and the rows before them."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    begins = [_first_byte(group) for group in groups]
    end = max([0, *begins]) + 1 if file.end is None else file.end
    rows = sum(g.num_rows for g, at in zip(groups, begins, strict=True) if at < file.begin)
    return rows, [i for i, at in enumerate(begins) if file.begin <= at < end]


def _first_byte(group: Any) -> int:
    column = group.column(0)
    return min(at for at in (column.dictionary_page_offset, column.data_page_offset) if at)


def _check_column(file: SourceFile, pyarrow: Any, schema: Any, key: str) -> None:
    if key not in schema.names:
        raise DataError(
            f"{file.path} has no column {key!r}; its columns are {_names(schema.names)}. "
            "Give the one that holds the text as text_key."
        )
    if schema.names.count(key) > 1:
        raise DataError(
            f"{file.path} has several columns {key!r}, and one is read. Write it again with names "
            "that differ."
        )
    kind = schema.field(key).type
    types = pyarrow.types
    if types.is_dictionary(kind):
        kind = kind.value_type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise DataError(
            f"the column {key!r} of {file.path} holds {kind}, and text is needed. "
            f"Give a column of strings as text_key; the columns are {_names(schema.names)}."
        )


def _checked(value: object, place: str, key: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{key!r} at {place} is a {type(value).__name__}, and text is needed. "
            "Give a key that holds text as text_key, or drop the row."
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{key!r} at {place} holds half of a surrogate pair at character {error.start}, which "
            "is no text. Repair or drop the row."
        ) from error
    return value


def _names(names: Any) -> str:
    shown = [repr(name) for name in names]
    more = f" and {len(shown) - 20} more" if len(shown) > 20 else ""
    return (", ".join(shown[:20]) or "none") + more
