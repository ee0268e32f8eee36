"""The documents of token files, read in chunks: a mapped file would count as memory in use."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from halfulp.corpus.config import CountConfig
from halfulp.data.corpus import SourceFile
from halfulp.data.token_files import TokenFile, read_token_file
from halfulp.errors import DataError

PIECE = 1 << 12  # tokens; longer documents arrive in several pieces
_CHUNK = 1 << 20


class TokenPiece(NamedTuple):
    """A stretch of a document; `last` marks the document's end, `place` is that of its unit."""

    tokens: np.ndarray
    last: bool
    place: int


def token_pieces(
    source: SourceFile, config: CountConfig, unmarked: list[str]
) -> Iterator[TokenPiece]:
    """The documents of one token file, without the tokens that end them.

    A file that marks no documents is one, its units are pieces, and it is added to `unmarked`.
    Raises DataError for a broken file and for a token outside the vocabulary.
    """
    file, end = _marked(source, config)
    whole = is_unmarked(source, config)
    if whole:
        unmarked.append(str(source.path))
    start, stop, place = _range(source, file, end)
    for tokens, last in _stretches(file, config, end, start, stop):
        yield TokenPiece(tokens, last, place)
        place += last or whole


def is_unmarked(source: SourceFile, config: CountConfig) -> bool:
    """Whether nothing says where the documents of a token file end."""
    file, end = _marked(source, config)
    return end is None and file.ends is None


def tokens_before(source: SourceFile, config: CountConfig, count: int) -> tuple[np.ndarray, int]:
    """At most `count` tokens before a part of a file without marks, and how many there are."""
    file, end = _marked(source, config)
    start, _, _ = _range(source, file, end)
    begin = max(0, start - count)
    return np.concatenate([file.tokens[:0], *_chunks(file, begin, start)]), start


def _marked(source: SourceFile, config: CountConfig) -> tuple[TokenFile, int | None]:
    """The file, and the token that ends its documents."""
    file = read_token_file(source.path)
    end = file.end_of_document if config.end_token is None else config.end_token
    _check_end(file, end, config.vocab or file.vocab)
    return file, end


def _range(source: SourceFile, file: TokenFile, end: int | None) -> tuple[int, int, int]:
    """The tokens, begin and end, of the documents that begin in a part; the first one's place."""
    size, item = len(file.tokens), file.tokens.itemsize
    if source.end is None:
        return 0, size, 0
    at, to = (min(size, max(0, -(-(x - file.offset) // item))) for x in (source.begin, source.end))
    if file.ends is not None:
        begins = np.concatenate([[0], file.ends[:-1]])
        at, to = np.append(begins, size)[np.searchsorted(begins, (at, to))]
        return int(at), int(to), int(np.searchsorted(file.ends, at, side="right"))
    if end is None:
        at, to = (min(size, -(-x // PIECE) * PIECE) for x in (at, to))
        return at, to, at // PIECE
    begin = _document(file, end, at, to)
    if begin >= to:
        return to, to, 0
    return begin, _document(file, end, to, size), source.begin


def _document(file: TokenFile, end: int, at: int, to: int) -> int:
    """Where the first document begins that does so in tokens `at` to `to`, else `to`."""
    if not at:
        return 0
    done = at - 1
    for chunk in _chunks(file, done, to):
        marks = np.flatnonzero(chunk == end)
        if len(marks):
            return done + int(marks[0]) + 1
        done += len(chunk)
    return to


def _stretches(
    file: TokenFile, config: CountConfig, end: int | None, start: int, stop: int
) -> Iterator[tuple[np.ndarray, bool]]:
    done, open_ = start, False
    for chunk in _chunks(file, start, stop):
        _check(file, chunk, done, config.vocab or file.vocab)
        begin = 0
        for mark, skipped in _stops(file, chunk, done, end):
            yield from _cut(chunk[begin:mark], True)
            begin = mark + skipped
        yield from _cut(chunk[begin:], False)
        open_, done = begin < len(chunk), done + len(chunk)
    if open_:
        yield np.empty(0, file.tokens.dtype), True


def _chunks(file: TokenFile, start: int, stop: int) -> Iterator[np.ndarray]:
    dtype, left = file.tokens.dtype, stop - start
    with open(file.path, "rb") as stream:
        stream.seek(file.offset + start * dtype.itemsize)
        while left > 0:
            chunk = np.fromfile(stream, dtype, min(left, _CHUNK))
            if not len(chunk):
                raise DataError(f"{file.path} became shorter while it was read. Start again.")
            left -= len(chunk)
            yield chunk


def _stops(
    file: TokenFile, chunk: np.ndarray, done: int, end: int | None
) -> Iterator[tuple[int, int]]:
    """Where documents end in the chunk, and how many tokens that mark it follow."""
    marks = np.flatnonzero(chunk == end) if end is not None else np.empty(0, np.int64)
    if file.ends is None:
        yield from ((int(mark), 1) for mark in marks)
        return
    lo, hi = np.searchsorted(file.ends, (done, done + len(chunk)), side="right")
    for stop in file.ends[lo:hi] - done:
        marked = end is not None and chunk[stop - 1] == end
        yield (int(stop) - 1, 1) if marked else (int(stop), 0)


def _cut(tokens: np.ndarray, last: bool) -> Iterator[tuple[np.ndarray, bool]]:
    at = 0
    while len(tokens) - at > PIECE:
        yield tokens[at : at + PIECE], False
        at += PIECE
    if last or len(tokens) > at:
        yield tokens[at:], last


def _check_end(file: TokenFile, end: int | None, vocab: int | None) -> None:
    most = np.iinfo(file.tokens.dtype).max if vocab is None else vocab - 1
    if end is not None and end > most:
        raise DataError(
            f"{file.path} ({file.note}) cannot hold the end token {end}: its tokens end at {most}. "
            "Give the token that ends its documents."
        )


def _check(file: TokenFile, chunk: np.ndarray, done: int, vocab: int | None) -> None:
    largest = int(chunk.max())
    if vocab is not None and largest >= vocab:
        raise DataError(
            f"{file.path} ({file.note}) holds the token {largest} at position "
            f"{done + int(chunk.argmax())}, outside the vocabulary of {vocab}. Correct the "
            "vocabulary or the file beside it that names it, or restore the file."
        )
    if chunk.dtype.kind == "i" and chunk.min() < 0:
        raise DataError(
            f"{file.path} ({file.note}) holds the negative token {int(chunk.min())}. "
            "Its type is another one: correct it and write the file again."
        )
