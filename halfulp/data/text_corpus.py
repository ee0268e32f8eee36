"""Text files to stored tokens: scan, split, tokenize, with every step kept in the cache."""

import hashlib
import logging
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfulp.data.cache import file_sha256, key_of, read_json, remembered, replacing
from halfulp.data.config import DataConfig, bpe_size
from halfulp.data.corpus import SourceFile
from halfulp.data.documents import Piece, read_documents
from halfulp.data.split import held_out
from halfulp.data.stored import Stored
from halfulp.data.tokenizer import Bytes, Json, Tokenizer, load_tokenizer, train_bpe
from halfulp.data.tokens import sidecar_of, token_dtype, write_tokens
from halfulp.errors import DataError

log = logging.getLogger(__name__)
LAYOUT = 2  # part of every cache key; raise it when the same text would give other tokens
_GROUP_CHARACTERS = 1 << 22
_GROUP_PIECES = 4096


@dataclass(frozen=True)
class Scan:
    """The documents of a corpus: content hashes `keys` [n], bytes of text `sizes` [n].

    Empty documents are counted in `empty` and nowhere else.
    """

    keys: np.ndarray
    sizes: np.ndarray
    empty: int


def store_text(config: DataConfig, files: Sequence[SourceFile], cache: Path) -> Stored:
    """The tokens of text files, from the cache where it has them.

    Each document is followed by the tokenizer's end-of-document token.
    """
    corpus = _corpus_key(config, files, cache)
    scan = _cached_scan(corpus, config, files, cache)
    held = held_out(scan.keys, scan.sizes, config.val_fraction, config.seed)
    tokenizer = _tokenizer(corpus, config, files, scan, held, cache)
    path = cache / "tokens" / f"{key_of(LAYOUT, corpus, tokenizer.sha256)}.bin"
    cached = _stored_tokens(path, len(scan.keys))
    if cached is None:
        log.info("tokenizing %d documents into %s", len(scan.keys), path)
        _tokenize(path, config, files, tokenizer, scan)
        cached = _stored_tokens(path, len(scan.keys))
    if cached is None:
        raise DataError(
            f"{path} changed right after it was written. Clear the cache folder {cache}."
        )
    meta, ends = cached
    tokens = np.memmap(path, token_dtype(tokenizer.vocab), "r").view(np.ndarray)
    facts = {
        "documents": len(scan.keys),
        "empty_documents": scan.empty,
        "bytes": int(scan.sizes.sum()),
        "tokenizer": tokenizer.describe(),
        "token_files": [str(path)],
    }
    return Stored((tokens,), (meta["sha256"],), tokenizer.vocab, ends, held, facts)


def _corpus_key(config: DataConfig, files: Sequence[SourceFile], cache: Path) -> str:
    def make() -> dict[str, Any]:
        contents = [(file.kind, file_sha256(file.path)) for file in files]
        return {"corpus": key_of(LAYOUT, config.text_key, contents)}

    what = key_of("corpus", LAYOUT, config.text_key, [file.kind for file in files])
    return remembered(cache, what, [file.path for file in files], make)["corpus"]


def _cached_scan(corpus: str, config: DataConfig, files: Sequence[SourceFile], cache: Path) -> Scan:
    path = cache / "documents" / f"{corpus}.npz"
    known = _load_arrays(path)
    if known is not None:
        return Scan(known["keys"], known["sizes"], int(known["empty"]))
    scan = _scan(_pieces(files, config.text_key))
    if not len(scan.keys):
        raise DataError(
            f"the sources {list(config.source)} hold no text: {len(files)} files, "
            f"{scan.empty} documents, all of them empty. Name other sources."
        )
    _save_arrays(path, keys=scan.keys, sizes=scan.sizes, empty=np.array(scan.empty))
    return scan


def _scan(pieces: Iterable[Piece]) -> Scan:
    keys, sizes, empty = bytearray(), array("q"), 0
    digest, size = hashlib.blake2b(digest_size=8), 0
    for piece in pieces:
        data = piece.text.encode()
        digest.update(data)
        size += len(data)
        if not piece.last:
            continue
        if size:
            keys += digest.digest()
            sizes.append(size)
        else:
            empty += 1
        digest, size = hashlib.blake2b(digest_size=8), 0
    return Scan(np.frombuffer(bytes(keys), "<u8"), np.array(sizes, np.int64), empty)


def _tokenizer(
    corpus: str,
    config: DataConfig,
    files: Sequence[SourceFile],
    scan: Scan,
    held: np.ndarray | None,
    cache: Path,
) -> Tokenizer:
    if config.tokenizer == "bytes":
        return Bytes()
    size = bpe_size(config.tokenizer)
    if size is None:
        return load_tokenizer(Path(config.tokenizer).expanduser())
    marks = config.val_fraction if held is None else np.packbits(held).tobytes().hex()
    path = cache / "tokenizers" / f"{key_of(LAYOUT, corpus, size, marks)}.json"
    known = _stored_tokenizer(path, size)
    if known is not None:
        return known
    log.info("training a BPE of %d entries into %s", size, path)
    pieces = _pieces(files, config.text_key)
    content = train_bpe(_training_texts(pieces, scan, held, config.val_fraction), size)
    with replacing(path) as file:
        file.write(content)
    return load_tokenizer(path)


def _training_texts(
    pieces: Iterable[Piece], scan: Scan, held: np.ndarray | None, fraction: float
) -> Iterator[str]:
    """The text that is not held out; by position, the first 1 - `fraction` of the bytes.

    By position the held-out share is counted in tokens, so these bytes may end a little after or
    before the held-out tokens begin.
    """
    if held is None:
        left = int(float(scan.sizes.sum()) * (1 - fraction))
        for piece in pieces:
            data = piece.text.encode()[:left]
            left -= len(data)
            if data:
                yield data.decode(errors="ignore")
        return
    document, empty = 0, True
    for piece in pieces:
        if piece.text and not held[document]:
            yield piece.text
        empty = empty and not piece.text
        if piece.last:
            document, empty = document + (not empty), True


def _tokenize(
    path: Path,
    config: DataConfig,
    files: Sequence[SourceFile],
    tokenizer: Tokenizer,
    scan: Scan,
) -> None:
    lengths = array("q")
    chunks = _token_chunks(_pieces(files, config.text_key), tokenizer, lengths)
    write_tokens(
        path,
        _counted(chunks, lengths, len(scan.keys)),
        vocab=tokenizer.vocab,
        tokenizer=tokenizer.sha256,
        end_of_document=tokenizer.end,
        documents=len(scan.keys),
    )
    _save_arrays(path.with_suffix(".npz"), ends=np.cumsum(np.array(lengths, np.int64)))


def _counted(
    chunks: Iterable[np.ndarray], lengths: Sequence[int], documents: int
) -> Iterator[np.ndarray]:
    yield from chunks
    if len(lengths) != documents:
        raise DataError(
            f"the sources changed while they were read: {documents} documents, then "
            f"{len(lengths)}. Start again when they are complete."
        )


def _token_chunks(
    pieces: Iterable[Piece], tokenizer: Tokenizer, lengths: "array[int]"
) -> Iterator[np.ndarray]:
    """Tokens in document order; appends the length of each document, its end included."""
    end = np.array([tokenizer.end], token_dtype(tokenizer.vocab))
    length, empty = 0, True
    for group in _groups(pieces):
        parts = []
        for piece, ids in zip(group, tokenizer.encode([p.text for p in group]), strict=True):
            parts.append(ids)
            length, empty = length + len(ids), empty and not piece.text
            if not piece.last:
                continue
            if not empty:
                parts.append(end)
                lengths.append(length + 1)
            length, empty = 0, True
        yield np.concatenate(parts)


def _groups(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    group, characters = [], 0
    for piece in pieces:
        group.append(piece)
        characters += len(piece.text)
        if characters >= _GROUP_CHARACTERS or len(group) >= _GROUP_PIECES:
            yield group
            group, characters = [], 0
    if group:
        yield group


def _pieces(files: Sequence[SourceFile], text_key: str) -> Iterator[Piece]:
    for file in files:
        yield from read_documents(file, text_key)


def _stored_tokens(path: Path, documents: int) -> tuple[dict[str, Any], np.ndarray] | None:
    """Sidecar and document ends of a cached .bin, None unless all three files agree."""
    marks = path.with_suffix(".npz")  # written last: without it another process is still writing
    if not marks.exists():
        return None
    meta, table = read_json(sidecar_of(path)), _load_arrays(marks)
    if meta is not None and table is not None and path.exists():
        ends, tokens = table["ends"], meta.get("tokens", -1)
        size = token_dtype(meta.get("vocab", 0)).itemsize
        whole = len(ends) == documents and ends[-1] == tokens
        if whole and path.stat().st_size == tokens * size:
            return meta, ends
    log.warning("the cached tokens %s are damaged and are made again", path)
    return None


def _stored_tokenizer(path: Path, size: int) -> Json | None:
    if not path.exists():
        return None
    try:
        known = load_tokenizer(path)
    except DataError:
        known = None
    if known is None or known.vocab != size:
        log.warning("the cached tokenizer %s is damaged and is trained again", path)
        return None
    return known


def _save_arrays(path: Path, **arrays: np.ndarray) -> None:
    with replacing(path) as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def _load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of an .npz, whose checksums are verified; None when missing or damaged."""
    try:
        # A file opened here, because numpy leaves its own open when the archive is broken.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        log.warning("the cached file %s is damaged (%s) and is made again", path, error)
        return None
