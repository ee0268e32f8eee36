"""Files to groups of pieces of documents, in bounded memory."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from halfulp.corpus.config import CountConfig
from halfulp.corpus.files import NotTextError, invalid_bytes, stat_of, text_blocks
from halfulp.corpus.token_pieces import TokenPiece, token_pieces
from halfulp.data.corpus import SourceFile
from halfulp.data.documents import Piece, in_pieces, read_documents

FILE_BITS = 40  # of a unit's number: the rest is its file
_GROUP = {"text": 1 << 18, "tokens": 1 << 16}  # characters, tokens
_MOST_PIECES = 4096
_PIECE = 1 << 16  # characters
_NAMED = 3  # files of one note


class Group(NamedTuple):
    """Consecutive pieces of documents: texts, or arrays of tokens.

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
        self.invalid.update(other.invalid)
        self.unmarked += other.unmarked


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

    A piece is a document or a part of a longer one: 2^16 characters of a text file, at most 2^18
    where the text is tokenized or comes from JSONL or Parquet, 2^12 tokens of a token file.
    Raises DataError, naming the place, for what is broken.
    """
    pieces, numbers, size = [], [], 0
    for index, file in files:
        room = _GROUP["tokens" if file.kind == "tokens" else "text"]
        place = file.begin
        for piece in _pieces(file, config, notes):
            pieces.append(piece)
            numbers.append(index << FILE_BITS | place)
            place += bool(piece.last or _is_split(file, config, notes))
            size += len(piece[0])
            if size >= room or len(pieces) >= _MOST_PIECES:
                yield _group(pieces, numbers)
                pieces, numbers, size = [], [], 0
    if pieces:
        yield _group(pieces, numbers)


def _is_split(file: SourceFile, config: CountConfig, notes: Notes) -> bool:
    return (config.split and file.kind == "text") or str(file.path) in notes.unmarked


def _group(pieces: Sequence[Piece | TokenPiece], numbers: Sequence[int]) -> Group:
    contents, last = zip(*pieces, strict=True)
    return Group(contents, np.array(last, bool), np.array(numbers, np.uint64))


def _pieces(
    file: SourceFile, config: CountConfig, notes: Notes
) -> Iterator[Piece] | Iterator[TokenPiece]:
    if not stat_of(file.path).st_size:
        return iter(())
    if file.kind == "tokens":
        return token_pieces(file.path, config, notes.unmarked)
    if file.kind == "text":
        return _text(file, config, notes)
    return read_documents(file, config.text_key)


def _text(file: SourceFile, config: CountConfig, notes: Notes) -> Iterator[Piece]:
    if not config.force_bytes:
        try:
            invalid = invalid_bytes(file.path)
        except NotTextError as error:
            notes.skipped[str(file.path)] = str(error)
            return
        if invalid:
            notes.invalid[str(file.path)] = invalid
    texts = text_blocks(file.path)
    # Only a tokenizer cares where a document is cut.
    yield from in_pieces(texts) if config.tokenizer else _cut_anywhere(texts)


def _cut_anywhere(texts: Iterable[str]) -> Iterator[Piece]:
    for text in texts:
        for at in range(0, len(text), _PIECE):
            yield Piece(text[at : at + _PIECE], False)
    yield Piece("", True)
