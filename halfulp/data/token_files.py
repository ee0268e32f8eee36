"""Token files that users bring: nanoGPT, modded-nanogpt / llm.c, and Megatron."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from halfulp.data.cache import read_json, remembered
from halfulp.data.config import DataConfig
from halfulp.data.corpus import SourceFile, missing
from halfulp.data.split import held_out
from halfulp.data.stored import Stored
from halfulp.data.tokens import sidecar_of
from halfulp.errors import DataError

HEADER_MAGIC = 20240520
_HEADER_BYTES = 1024
_HEADER_VERSIONS = {1: ("<u2", 50257), 7: ("<u4", 128256)}  # GPT-2, Llama 3
_SIDECAR_DTYPES = {"uint8": "u1", "uint16": "<u2", "uint32": "<u4", "int32": "<i4", "int64": "<i8"}
_NEEDED = {int: "a whole number", str: "the SHA-256 of its file"}
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens, memory-mapped. What the file does not say is None.

    `ends` [documents] counts the tokens up to each document's end. `note` says how it was read.
    """

    path: Path
    tokens: np.ndarray
    offset: int
    note: str
    vocab: int | None = None
    sha256: str | None = None
    tokenizer: str | None = None
    end_of_document: int | None = None
    documents: int | None = None
    ends: np.ndarray | None = None


def store_tokens(config: DataConfig, files: Sequence[SourceFile], cache: Path) -> Stored:
    """The tokens of token files, read where they lie.

    The first reading checks every token against the vocabulary and the sidecar's checksum.
    Raises DataError when the vocabulary is unknown, a token lies outside it, or a file is broken.
    """
    if config.tokenizer != "bytes":
        raise DataError(
            f"data.tokenizer is {config.tokenizer!r}, and {files[0].path} is tokenized already. "
            "Leave data.tokenizer out."
        )
    found = [read_token_file(file.path) for file in files]
    vocab = _vocab(config, found)
    seen = [_inspected(file, cache) for file in found]
    for file, facts in zip(found, seen, strict=True):
        _check_tokens(file, facts, vocab)
    ends = _all_ends(found)
    held = None
    if ends is not None:
        keys, sizes = np.arange(len(ends), dtype=np.uint64), np.diff(ends, prepend=0)
        held = held_out(keys, sizes, config.val_fraction, config.seed)
    return Stored(
        tuple(file.tokens for file in found),
        tuple(facts["sha256"] for facts in seen),
        vocab,
        ends,
        held,
        _facts(found, ends),
    )


def read_token_file(path: Path) -> TokenFile:
    """The tokens in a .bin or Megatron .idx, by what lies beside it and how it begins.

    In this order: a Megatron `.idx` beside it; a sidecar `x.bin.json` or `meta.json`; the header of
    modded-nanogpt and llm.c; none of them, which means header-less uint16.
    """
    if path.suffix not in (".bin", ".idx"):
        raise DataError(f"{path} is a compressed token file. Decompress it: it is memory-mapped.")
    binary, index = path.with_suffix(".bin"), path.with_suffix(".idx")
    if not binary.is_file():
        raise missing(binary, f"the token file of {path},")
    if binary.stat().st_size == 0:
        raise DataError(f"{binary} is empty (0 bytes). Restore it or take it out.")
    if index.is_file():
        return _megatron(binary, index)
    for sidecar in (sidecar_of(binary), binary.with_name("meta.json")):
        if sidecar.is_file():
            return _with_sidecar(binary, sidecar)
    with open(binary, "rb") as file:
        header = np.frombuffer(file.read(_HEADER_BYTES).ljust(_HEADER_BYTES, b"\0"), "<i4")
    if header[0] == HEADER_MAGIC:
        return _with_header(binary, header)
    return TokenFile(binary, _mapped(binary, "<u2"), 0, "no header: taken for uint16")


def _mapped(path: Path, dtype: str, offset: int = 0) -> np.ndarray:
    size = path.stat().st_size - offset
    item = np.dtype(dtype).itemsize
    if size % item:
        raise DataError(
            f"{path} holds {size} bytes of tokens, which is no multiple of {item}, the size of "
            f"{np.dtype(dtype).name}. It is cut off or of another type: restore it, or say its "
            f"type in {sidecar_of(path).name}."
        )
    if not size:
        raise DataError(f"{path} holds no tokens. Restore it or take it out.")
    return np.memmap(path, dtype, "r", offset=offset).view(np.ndarray)


def _with_sidecar(path: Path, sidecar: Path) -> TokenFile:
    meta = read_json(sidecar)
    cure = 'It needs {"dtype": "uint16", "vocab": 50257}.'
    if meta is None:
        raise DataError(f"{sidecar}, beside {path.name}, is not a JSON object. {cure}")
    dtype, vocab = meta.get("dtype"), meta.get("vocab", meta.get("vocab_size"))
    if not isinstance(dtype, str) or dtype not in _SIDECAR_DTYPES:
        raise DataError(
            f"{sidecar} gives the dtype {dtype!r}, and one of {', '.join(_SIDECAR_DTYPES)} is "
            f"needed. {cure}"
        )
    if type(vocab) is not int or not 1 <= vocab < 2**63:
        raise DataError(f"{sidecar} gives the vocab {vocab!r}, and a number is needed. {cure}")
    for key, kind in (("documents", int), ("end_of_document", int), ("tokenizer", str)):
        if not isinstance(meta.get(key), kind | None):
            raise DataError(
                f"{sidecar} gives for {key!r} {meta[key]!r}, and {_NEEDED[kind]} is needed. "
                "Correct it, or leave it out."
            )
    tokens, own = _mapped(path, _SIDECAR_DTYPES[dtype]), sidecar == sidecar_of(path)
    said = meta.get("tokens", len(tokens)) if own else len(tokens)
    if said != len(tokens):
        raise DataError(
            f"{path} holds {len(tokens)} tokens, and {sidecar.name} says {said}. "
            "Restore the file, or write both again."
        )
    return TokenFile(
        path,
        tokens,
        0,
        f"{sidecar.name}: {dtype}",
        vocab=vocab,
        sha256=meta.get("sha256") if own else None,
        tokenizer=meta.get("tokenizer"),
        end_of_document=meta.get("end_of_document"),
        documents=meta.get("documents") if own else None,
    )


def _with_header(path: Path, header: np.ndarray) -> TokenFile:
    version, said = int(header[1]), int(header[2])
    if version not in _HEADER_VERSIONS:
        raise DataError(
            f"{path} has the header {HEADER_MAGIC} with version {version}; versions "
            f"{', '.join(map(str, _HEADER_VERSIONS))} are known. Write it as one of them, or as a "
            "header-less .bin with a sidecar."
        )
    dtype, vocab = _HEADER_VERSIONS[version]
    size = path.stat().st_size
    if size != _HEADER_BYTES + said * np.dtype(dtype).itemsize:
        raise DataError(
            f"{path} has {size} bytes, and its header announces {said} tokens of "
            f"{np.dtype(dtype).name} after {_HEADER_BYTES} bytes. It is cut off: fetch it again."
        )
    note = f"header {HEADER_MAGIC}, version {version}: {np.dtype(dtype).name}"
    return TokenFile(path, _mapped(path, dtype, _HEADER_BYTES), _HEADER_BYTES, note, vocab=vocab)


def _megatron(path: Path, index: Path) -> TokenFile:
    content = np.fromfile(index, np.uint8)
    if content[:9].tobytes() != _INDEX_MAGIC:
        raise DataError(
            f"{index} is no Megatron index: it begins with {content[:9].tobytes()!r} instead of "
            f"{_INDEX_MAGIC!r}. Write it with Megatron's preprocess_data.py, or take it away."
        )
    if len(content) < 34:
        raise _short_index(index, len(content), 34)
    version = int(content[9:17].view("<u8")[0])
    code, sequences, marks = int(content[17]), *map(int, content[18:34].view("<u8"))
    if version != 1 or code not in _INDEX_DTYPES:
        raise DataError(
            f"{index} has version {version} and dtype code {code}; version 1 with a code of "
            f"{', '.join(map(str, _INDEX_DTYPES))} (integers) is read. Write it again."
        )
    if len(content) != (needed := 34 + 12 * sequences + 8 * marks):
        raise _short_index(index, len(content), needed)
    lengths = content[34 : 34 + 4 * sequences].view("<i4").astype(np.int64)
    pointers = content[34 + 4 * sequences : 34 + 12 * sequences].view("<i8")
    documents = content[34 + 12 * sequences :].view("<i8")
    tokens = _mapped(path, _INDEX_DTYPES[code])
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    _check_index(path, index, tokens, bounds, pointers, documents)
    note = f"Megatron index, dtype code {code}: {tokens.dtype.name}"
    ends = bounds[documents[1:]]
    return TokenFile(path, tokens, 0, note, documents=len(ends), ends=ends)


def _short_index(index: Path, size: int, needed: int) -> DataError:
    return DataError(
        f"{index} has {size} bytes, and what it announces needs {needed}. It is cut off or "
        "multimodal, which is not read: copy it again, or write it as plain text tokens."
    )


def _check_index(
    path: Path,
    index: Path,
    tokens: np.ndarray,
    bounds: np.ndarray,
    pointers: np.ndarray,
    documents: np.ndarray,
) -> None:
    cure = "Write both files again with Megatron's preprocess_data.py."
    if bounds[-1] != len(tokens):
        raise DataError(
            f"{path} holds {len(tokens)} tokens, and {index.name} announces {bounds[-1]}. {cure}"
        )
    if (np.diff(bounds) < 0).any() or (pointers != bounds[:-1] * tokens.itemsize).any():
        raise DataError(f"{index} points to sequences that do not follow one another. {cure}")
    whole = len(documents) > 1 and documents[0] == 0 and documents[-1] == len(pointers)
    if not whole or (np.diff(documents) < 0).any():
        raise DataError(f"{index} has document marks that do not cover its sequences. {cure}")


def _vocab(config: DataConfig, files: Sequence[TokenFile]) -> int:
    if config.vocab:
        return config.vocab
    for file in files:
        if file.vocab is None:
            pickle = file.path.with_name("meta.pkl")
            hint = f" {pickle} is a pickle and is not read." if pickle.exists() else ""
            raise DataError(
                f"{file.path} ({file.note}) does not say its vocabulary; its largest token is "
                f"{int(file.tokens.max())}.{hint} Give data.vocab, or write "
                f'{sidecar_of(file.path).name} with {{"dtype": "uint16", "vocab": 50257}}.'
            )
    sizes = {file.vocab: file.path for file in files if file.vocab is not None}
    if len(sizes) > 1:
        listed = ", ".join(f"{path} {vocab}" for vocab, path in sizes.items())
        raise DataError(
            f"the token files have different vocabularies: {listed}. Name files of one tokenizer, "
            "or give data.vocab if they share one."
        )
    return next(iter(sizes))


def _inspected(file: TokenFile, cache: Path) -> dict[str, Any]:
    def make() -> dict[str, Any]:
        digest, low, high, at = hashlib.sha256(), 0, -1, 0
        for start in range(0, len(file.tokens), _CHUNK):
            part = file.tokens[start : start + _CHUNK]
            digest.update(part.tobytes())
            low = min(low, int(part.min()))
            if int(part.max()) > high:
                high, at = int(part.max()), start + int(part.argmax())
        return {"sha256": digest.hexdigest(), "smallest": low, "largest": high, "at": at}

    what = f"tokens {file.tokens.dtype.str} {file.offset}"
    return remembered(cache, what, [file.path], make)


def _check_tokens(file: TokenFile, facts: dict[str, Any], vocab: int) -> None:
    if facts["smallest"] < 0:
        raise DataError(
            f"{file.path} ({file.note}) holds the negative token {facts['smallest']}. "
            "Its type is another one: correct it and write the file again."
        )
    if facts["largest"] >= vocab:
        raise DataError(
            f"{file.path} ({file.note}) holds the token {facts['largest']} at position "
            f"{facts['at']}, outside the vocabulary of {vocab}. Correct data.vocab or the "
            "sidecar, or restore the file."
        )
    if file.sha256 is not None and facts["sha256"] != file.sha256:
        raise DataError(
            f"the bytes of {file.path} have the SHA-256 {facts['sha256']}, and "
            f"{sidecar_of(file.path).name} says {file.sha256}. "
            "The file is damaged or was replaced: restore it, or write both again."
        )


def _all_ends(files: Sequence[TokenFile]) -> np.ndarray | None:
    ends, before = [], 0
    for file in files:
        if file.ends is None:
            return None
        ends.append(file.ends + before)
        before += len(file.tokens)
    return np.concatenate(ends)


def _facts(files: Sequence[TokenFile], ends: np.ndarray | None) -> dict[str, Any]:
    counts = [file.documents for file in files]
    known = [count for count in counts if count is not None]
    hashes = {file.tokenizer for file in files}
    marks = {file.end_of_document for file in files}
    return {
        "documents": sum(known) if len(known) == len(counts) else None,
        "empty_documents": 0 if ends is None else int((np.diff(ends, prepend=0) == 0).sum()),
        "bytes": None,
        "tokenizer": {
            "kind": "tokenized",
            "path": None,
            "sha256": hashes.pop() if len(hashes) == 1 else None,
            "end_of_document": marks.pop() if len(marks) == 1 else None,
        },
        "token_files": [f"{file.path} ({file.note})" for file in files],
    }
