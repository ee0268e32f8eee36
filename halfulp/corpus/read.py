"""Files to groups of pieces of documents, in bounded memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from halfulp.corpus.config import CountConfig
from halfulp.corpus.files import NotTextError, invalid_bytes, stat_of, text_blocks
from halfulp.corpus.lines import BYTE_ORDER, lines_in
from halfulp.corpus.token_pieces import token_pieces
from halfulp.data.corpus import SourceFile
from halfulp.data.documents import first_row, in_pieces, read_documents
from halfulp.data.stream import open_stream

FILE_BITS = 40  # of a unit's number: the rest is its file
_GROUP = {"text": 1 << 18, "tokens": 1 << 18}  # characters, tokens
_MOST_PIECES = 4096
_PIECE = 1 << 16  # bytes
_NAMED = 3  # files of one note


class Placed(NamedTuple):
    """A piece of a document, whether it is the last one, and the place of its unit in the file."""

    content: Any
    last: bool
    place: int


class Group(NamedTuple):
    """Consecutive pieces of documents: texts, bytes of texts, or arrays of tokens.

    `last` [pieces]: whether a piece ends its document. `numbers` [pieces] uint64 names the unit of
    each in the whole corpus: file << FILE_BITS | place in the file. A unit is a document, or a
    piece where documents are split.
    """

    pieces: Sequence[Any]
    last: np.ndarray
    numbers: np.ndarray


@dataclass
class Notes:
    """What was met on the way; paths as text."""

    skipped: dict[str, str] = field(default_factory=dict)  # and why
    invalid: dict[str, int] = field(default_factory=dict)  # bytes that are not UTF-8
    unmarked: list[str] = field(default_factory=list)  # token files that mark no documents

    def merge(self, other: "Notes") -> None:
        self.skipped.update(other.skipped)
        for path, count in other.invalid.items():
            self.invalid[path] = self.invalid.get(path, 0) + count
        self.unmarked += [path for path in other.unmarked if path not in self.unmarked]


def skips(skipped: Mapping[str, str]) -> list[str]:
    """A sentence for each reason why files were skipped."""
    paths: dict[str, list[str]] = {}
    for path, why in skipped.items():
        paths.setdefault(why, []).append(path)
    return [f"skipped {named(which)}: {why}" for why, which in paths.items()]


def named(paths: Sequence[str]) -> str:
    """All paths where they are few, else how many there are and the first."""
    if len(paths) <= _NAMED:
        return ", ".join(paths)
    return f"{len(paths):,} files ({', '.join(paths[:_NAMED])}, …)"


def groups(
    files: Iterable[tuple[int, SourceFile]], config: CountConfig, notes: Notes
) -> Iterator[Group]:
    """The documents of numbered files; files that are no text are left out and noted.

    A piece is a document or a part of a longer one: 2^16 bytes of a text file, at most 2^18
    characters where the text is tokenized or comes from JSONL or Parquet, 2^12 tokens of a token
    file. A part of a text, or of a token file without marks, is a document of its own here.
    Raises DataError, naming the place, for what is broken.
    """
    pieces, numbers, size = [], [], 0
    for index, file in files:
        room = _GROUP["tokens" if file.kind == "tokens" else "text"]
        for piece in _pieces(file, config, notes):
            pieces.append(piece)
            numbers.append(index << FILE_BITS | piece.place)
            size += len(piece.content)
            if size >= room or len(pieces) >= _MOST_PIECES:
                yield _group(pieces, numbers)
                pieces, numbers, size = [], [], 0
    if pieces:
        yield _group(pieces, numbers)


def _group(pieces: Sequence[Placed], numbers: Sequence[int]) -> Group:
    contents, last, _ = zip(*pieces, strict=True)
    return Group(contents, np.array(last, bool), np.array(numbers, np.uint64))


def _pieces(file: SourceFile, config: CountConfig, notes: Notes) -> Iterator[Placed]:
    if not stat_of(file.path).st_size:
        return iter(())
    if file.kind == "tokens":
        return (Placed(*piece) for piece in token_pieces(file, config, notes.unmarked))
    if file.kind == "text":
        return _text(file, config, notes)
    return _rows(file, config)


def _rows(file: SourceFile, config: CountConfig) -> Iterator[Placed]:
    # The lines of a part are fewer than its bytes; rows, compressed, need not be.
    place = first_row(file) if file.kind == "parquet" and file.begin else file.begin
    for piece in read_documents(file, config.text_key):
        yield Placed(*piece, place)
        place += piece.last


def _text(file: SourceFile, config: CountConfig, notes: Notes) -> Iterator[Placed]:
    begin, end = (0, None) if file.end is None else lines_in(file, clean=bool(config.tokenizer))
    if begin == end or not _is_text(file, begin, end, config, notes):
        return
    if config.tokenizer:  # only a tokenizer cares where a document is cut
        pieces = in_pieces(text_blocks(file.path, begin, end))
        placed = (Placed(*piece, begin + i) for i, piece in enumerate(pieces))
    else:
        placed = _cut_anywhere(file.path, begin, end)
    yield from placed if config.split else (piece._replace(place=0) for piece in placed)


def _is_text(
    file: SourceFile, begin: int, end: int | None, config: CountConfig, notes: Notes
) -> bool:
    """Whether the bytes are text, or are to be counted as they are; noted if not."""
    if config.force_bytes:
        return True
    try:
        invalid = invalid_bytes(file.path, begin, end)
    except NotTextError as error:
        where = "" if file.end is None else f", bytes {begin:,} to {end:,}"
        notes.skipped[f"{file.path}{where}"] = str(error)
        return False
    if invalid:
        notes.invalid[str(file.path)] = invalid
    return True


def _cut_anywhere(path: Path, begin: int, end: int | None) -> Iterator[Placed]:
    """Cut at multiples of _PIECE in the file, so that its parts have the same units."""
    at = begin
    with open_stream(path) as stream:
        if begin:
            stream.seek(begin)
        while end is None or at < end:
            room = _PIECE - at % _PIECE
            piece = stream.read(room if end is None else min(room, end - at))
            if not piece:
                break
            yield Placed(piece if at else piece.removeprefix(BYTE_ORDER), False, at // _PIECE)
            at += len(piece)
    yield Placed(b"", True, max(0, at - 1) // _PIECE)
