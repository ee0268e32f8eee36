"""The documents of token files, read in chunks: a mapped file would count as memory in use."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from halfulp.corpus.config import CountConfig
from halfulp.data.token_files import TokenFile, read_token_file
from halfulp.errors import DataError

PIECE = 1 << 12  # tokens; longer documents arrive in several pieces
_CHUNK = 1 << 20


class TokenPiece(NamedTuple):
    """A stretch of a document; `last` marks the document's end."""

    tokens: np.ndarray
    last: bool


def token_pieces(path: Path, config: CountConfig, unmarked: list[str]) -> Iterator[TokenPiece]:
    """The documents of one token file, without the tokens that end them.

    A file that marks no documents is one, and is appended to `unmarked`.
    Raises DataError for a broken file and for a token outside the vocabulary.
    """
    file = read_token_file(path)
    end = file.end_of_document if config.end_token is None else config.end_token
    _check_end(file, end, config.vocab or file.vocab)
    if end is None and file.ends is None:
        unmarked.append(str(path))
    done, open_ = 0, False
    for chunk in _chunks(file):
        _check(file, chunk, done, config.vocab or file.vocab)
        begin = 0
        for stop, skipped in _stops(file, chunk, done, end):
            yield from _cut(chunk[begin:stop], True)
            begin = stop + skipped
        yield from _cut(chunk[begin:], False)
        open_, done = begin < len(chunk), done + len(chunk)
    if open_:
        yield TokenPiece(np.empty(0, file.tokens.dtype), True)


def _chunks(file: TokenFile) -> Iterator[np.ndarray]:
    dtype, left = file.tokens.dtype, len(file.tokens)
    with open(file.path, "rb") as stream:
        stream.seek(file.offset)
        while left:
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


def _cut(tokens: np.ndarray, last: bool) -> Iterator[TokenPiece]:
    at = 0
    while len(tokens) - at > PIECE:
        yield TokenPiece(tokens[at : at + PIECE], False)
        at += PIECE
    if last or len(tokens) > at:
        yield TokenPiece(tokens[at:], last)


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
