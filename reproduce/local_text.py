"""A corpus that every machine with this project has: the Python files of its environment."""

import hashlib
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from halfulp.data.corpus import SourceFile

BYTES = 120_000_000


@lru_cache(maxsize=1)
def python_files(size: int = BYTES) -> tuple[SourceFile, ...]:
    """Different Python files up to `size` bytes, in the order of the SHA-1 of their names.

    From the standard library and the installed packages. The order says nothing about the content,
    so that they are a random sample of these files.
    """
    chosen: dict[str, SourceFile] = {}
    held = 0
    for _, name, path in sorted(_paths()):
        content = path.read_bytes()
        digest = hashlib.sha1(content).hexdigest()
        if digest in chosen:
            continue
        held += len(content)
        if held > size:
            break
        chosen[digest] = SourceFile("text", path, name)
    return tuple(chosen.values())


def _paths() -> Iterator[tuple[str, str, Path]]:
    """(SHA-1 of the name, name, path) of every file."""
    for folder in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(folder))
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            if path.is_file() and not path.is_symlink():
                yield hashlib.sha1(name.encode()).hexdigest(), name, path
