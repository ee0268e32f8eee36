"""Text to words without a tokenizer, and to the keys of its lines and documents.

A word is one character of Chinese or Japanese writing, or one of ASCII that is no letter, digit,
underscore or white space, or a run of all others. White space, of ASCII or U+3000, only separates.
Lines and documents are sequences of words, so that two of them that differ in white space alone
are the same.
"""

import hashlib
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfulp.corpus import murmur
from halfulp.corpus.spans import Spans, spans

LONGEST = 1 << 16  # bytes; a longer word is cut there
_SPACE, _SINGLE, _WORD, _WIDE = range(4)
_RUN = frozenset((string.ascii_letters + string.digits + "_").encode()) | frozenset(range(128, 256))
_OF_THREE, _OF_FOUR = frozenset((*range(0xE3, 0xEA), 0xEF)), frozenset((0xF0,))
_BLANK = 0x3000
# Punctuation, kana, ideographs; compatible ones; forms of full and half width; planes 2 and 3.
_ONE_BY_ONE = (0x3000, 0x9FFF), (0xF900, 0xFAFF), (0xFF00, 0xFFEF), (0x20000, 0x3FFFF)


def _class(byte: int) -> int:
    """_WIDE for a byte that the characters of _ONE_BY_ONE begin with, and others may."""
    if byte in _OF_THREE | _OF_FOUR:
        return _WIDE
    if byte in _RUN:
        return _WORD
    return _SPACE if byte in string.whitespace.encode() else _SINGLE


_CLASSES = bytes(map(_class, range(256)))
_MASKS = np.array([(1 << 8 * length) - 1 for length in range(9)], np.uint64)
_ROUNDS = 8  # words of more than 8 · _ROUNDS bytes are hashed one by one


@dataclass(frozen=True)
class WordBatch:
    """The words of some pieces of text.

    - `words` [n] uint64; `cuts` [pieces]: how many words there are up to each piece's end.
    - `starts`: positions in `words` where a document begins.
    - `lines`, `documents`: those that ended and hold a word.
    """

    words: np.ndarray
    cuts: np.ndarray
    starts: np.ndarray
    lines: Spans
    documents: Spans


class Words:
    """Pieces of documents in, words out; what a piece leaves open is carried to the next call.

    `goes_on`: the first piece does not begin a document.
    """

    def __init__(self, *, goes_on: bool = False) -> None:
        self._held = b""
        self._fresh = not goes_on  # the next piece begins a document
        self._line = self._document = (0, 0)  # key and words of what is open

    def feed(self, pieces: Sequence[bytes], last: np.ndarray) -> WordBatch:
        """The words of `pieces`; `last` [pieces]: whether each ends its document."""
        ended = [piece + b"\n" if end else piece for piece, end in zip(pieces, last, strict=True)]
        data = b"".join([self._held, *ended])
        edges = len(self._held) + np.cumsum([len(piece) for piece in ended])
        whole = len(data) - _begun(data)
        data, begun = data[:whole], data[whole:]
        starts, ends = self._hold(data, *_spans(data))
        self._held += begun
        words = _symbols(data, starts, ends)
        cuts = np.searchsorted(starts, edges)
        newlines = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        line_pieces = np.searchsorted(edges, newlines, side="right")
        line_ends = np.searchsorted(starts, newlines)
        lines, self._line = spans(words, line_ends, line_pieces, self._line)
        documents, self._document = spans(words, cuts[last], np.flatnonzero(last), self._document)
        begins, self._fresh = document_starts(cuts, last, self._fresh), bool(last[-1])
        return WordBatch(words, cuts, begins, lines, documents)

    def _hold(
        self, data: bytes, starts: np.ndarray, ends: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Keep the word that the data end in the middle of for the next call."""
        self._held = b""
        if len(ends) and ends[-1] == len(data) and ends[-1] - starts[-1] < LONGEST:
            self._held = data[starts[-1] :]
            return starts[:-1], ends[:-1]
        return starts, ends


def document_starts(cuts: np.ndarray, last: np.ndarray, fresh: bool) -> np.ndarray:
    """Positions where documents begin; `fresh`: whether the first piece begins one."""
    return np.concatenate([[0], cuts[:-1]])[np.concatenate([[fresh], last[:-1]])]


def _spans(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Where words begin and end."""
    classes = np.frombuffer(data.translate(_CLASSES), np.uint8)
    single, run = classes == _SINGLE, np.zeros(len(data) + 2, bool)
    run[1:-1] = classes >= _WORD
    chars = [] if data.isascii() else _one_by_one(data, classes)
    for at, size, _ in chars:
        run[(at[:, None] + np.arange(1, size + 1)).ravel()] = False
    first, last = single | (run[1:-1] & ~run[:-2]), single | (run[1:-1] & ~run[2:])
    for at, size, code in chars:
        at = at[code != _BLANK]
        first[at] = last[at + size - 1] = True
    starts, ends = np.flatnonzero(first), np.flatnonzero(last) + 1
    return _shortened(starts, ends) if (ends - starts > LONGEST).any() else (starts, ends)


def _one_by_one(data: bytes, classes: np.ndarray) -> list[tuple[np.ndarray, int, np.ndarray]]:
    """Where characters that are words of their own begin, their bytes, and their code points."""
    octets = np.frombuffer(data + bytes(3), np.uint8)
    wide, found = np.flatnonzero(classes == _WIDE), []
    four = octets[wide] == 0xF0
    for at, size, mask in ((wide[~four], 3, 0x0F), (wide[four], 4, 0x07)):
        code, valid = (octets[at] & mask).astype(np.int32), np.ones(len(at), bool)
        for i in range(1, size):
            following = octets[at + i]
            valid &= following >> 6 == 0b10
            code = code << 6 | (following & 0x3F)
        valid &= np.any([(code >= low) & (code <= high) for low, high in _ONE_BY_ONE], axis=0)
        found.append((at[valid], size, code[valid]))
    return found


def _begun(data: bytes) -> int:
    """How many bytes at the end may begin a character that is a word of its own."""
    for i, byte in enumerate(data[:-4:-1], 1):
        if byte in _OF_THREE | _OF_FOUR:
            return i if i < (4 if byte in _OF_FOUR else 3) else 0
        if byte >> 6 != 0b10:
            break
    return 0


def _shortened(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    cuts = [np.arange(a, b, LONGEST) for a, b in zip(starts, ends, strict=True)]
    starts = np.concatenate(cuts)
    stops = [np.append(cut[1:], end) for cut, end in zip(cuts, ends, strict=True)]
    return starts, np.concatenate(stops)


def _symbols(data: bytes, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit number for each word: its bytes where they fit, else a hash of them."""
    eights = np.ndarray((len(data) + 1,), "<u8", data + bytes(8), strides=(1,))
    lengths = ends - starts
    found = eights[starts] & _MASKS[np.minimum(lengths, 8)]
    rest = np.flatnonzero(lengths > 8)
    for at in range(8, 8 * _ROUNDS, 8):
        rest = rest[lengths[rest] > at]
        if not len(rest):
            return found
        mixed = found[rest]
        murmur.fmix(mixed, np.empty_like(mixed))
        found[rest] = mixed + (
            eights[starts[rest] + at] & _MASKS[np.minimum(lengths[rest] - at, 8)]
        )
    for i in rest[lengths[rest] > 8 * _ROUNDS]:
        digest = hashlib.blake2b(data[starts[i] : ends[i]], digest_size=8).digest()
        found[i] = int.from_bytes(digest, "little")
    return found
