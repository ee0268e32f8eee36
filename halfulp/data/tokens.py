"""Tokens on disk and in memory: memory-mapped streams, and the writer of .bin files."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfulp.data.cache import replacing, write_json

SIDECAR_FORMAT = "halfulp-tokens-1"


class TokenSource:
    """Ranges of memory-mapped token arrays, read as one stream.

    `ranges` [n, 2] are starts and stops in the arrays laid end to end. `len()` counts tokens;
    `source[start:stop]` reads them in the arrays' own type.
    """

    def __init__(self, arrays: Sequence[np.ndarray], ranges: np.ndarray) -> None:
        self._arrays = tuple(arrays)
        self._offsets = np.cumsum([0, *map(len, self._arrays)])
        self._ranges = ranges.astype(np.int64)[ranges[:, 1] > ranges[:, 0]]
        self._ends = np.cumsum(self._ranges[:, 1] - self._ranges[:, 0])
        self.dtype = np.result_type(*self._arrays)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __repr__(self) -> str:
        return f"TokenSource({len(self)} tokens, {self.dtype})"

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, step = span.indices(len(self))
        if step != 1:
            raise IndexError(f"a TokenSource is read in steps of 1, not {step}")
        parts = []
        place = int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            end = min(stop, int(self._ends[place]))
            shift = int(self._ranges[place, 1] - self._ends[place])
            parts += self._stored(start + shift, end + shift)
            start, place = end, place + 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.dtype), *parts])

    def _stored(self, start: int, stop: int) -> list[np.ndarray]:
        parts = []
        which = int(np.searchsorted(self._offsets, start, side="right")) - 1
        while start < stop:
            offset = int(self._offsets[which])
            end = min(stop, int(self._offsets[which + 1]))
            if end > start:
                parts.append(self._arrays[which][start - offset : end - offset])
            start, which = end, which + 1
        return parts


def sidecar_of(path: Path) -> Path:
    """The file that says what is in a .bin: `tokens.bin.json` for `tokens.bin`."""
    return path.with_name(path.name + ".json")


def token_dtype(vocab: int) -> np.dtype:
    """The type that a .bin of this vocabulary is written in: uint16 where it fits."""
    return np.dtype("<u2" if vocab <= 2**16 else "<u4")


def write_tokens(
    path: Path,
    chunks: Iterable[np.ndarray],
    *,
    vocab: int,
    tokenizer: str | None = None,
    end_of_document: int | None = None,
    documents: int | None = None,
) -> dict[str, Any]:
    """Write a header-less nanoGPT .bin and, last, its sidecar; returns what the sidecar says.

    Both appear whole or not at all. `tokenizer` is the SHA-256 of the tokenizer's file.
    """
    dtype, digest, count = token_dtype(vocab), hashlib.sha256(), 0
    with replacing(path) as file:
        for chunk in chunks:
            data = np.ascontiguousarray(chunk, dtype).tobytes()
            digest.update(data)
            file.write(data)
            count += len(chunk)
    meta = {
        "format": SIDECAR_FORMAT,
        "dtype": dtype.name,
        "vocab": vocab,
        "tokens": count,
        "sha256": digest.hexdigest(),
        "tokenizer": tokenizer,
        "end_of_document": end_of_document,
        "documents": documents,
    }
    write_json(sidecar_of(path), meta)
    return meta
