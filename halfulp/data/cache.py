"""Files kept between runs: written whole or not at all, whoever else is writing."""

import hashlib
import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from halfulp.data.stream import BLOCK
from halfulp.errors import DataError

_SETTLED_SECONDS = 2.0


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends without an error.

    Readers see the old file or the whole new one. Writers of one path may race: the last wins.
    Raises DataError when the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
        os.replace(temporary, path)
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error.strerror or error}. "
            "Free space or choose another cache folder."
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_json(path: Path, value: object) -> None:
    """Write `value` to `path`, atomically."""
    with replacing(path) as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in `path`; None when it is missing or broken."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def key_of(*parts: object) -> str:
    """A short name for these values, the same in every process."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror or error}. Check the file and its permissions."
        ) from error
    return digest.hexdigest()


def remembered(
    cache: Path, what: str, files: Sequence[Path], make: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The answer of `make` to `what` about the bytes of `files`, kept until one of them changes.

    A change is a different path, size, inode or time. Files touched within the last two seconds are
    asked again next time: an edit within one tick of the clock would not show.
    """
    stats = [os.stat(path) for path in files]
    marks = [
        [os.path.abspath(path), s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino]
        for path, s in zip(files, stats, strict=True)
    ]
    path = cache / "seen" / f"{key_of(what, marks)}.json"
    known = read_json(path)
    if known is not None:
        return known
    value = make()
    newest = max(max(s.st_mtime, s.st_ctime) for s in stats)
    if time.time() - newest > _SETTLED_SECONDS:
        write_json(path, value)
    return value
