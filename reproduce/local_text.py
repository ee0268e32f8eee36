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
    """Different Python files in the order of their SHA-1, which is random, up to `size` bytes.

    From the standard library and the installed packages.
    """
    by_digest = {hashlib.sha1(p.read_bytes()).hexdigest(): p for p in sorted(_paths())}
    chosen, held = [], 0
    for digest in sorted(by_digest):
        path = by_digest[digest]
        held += path.stat().st_size
        if held > size:
            break
        chosen.append(SourceFile("text", path, path.name))
    return tuple(chosen)


def _paths() -> Iterator[Path]:
    for name in ("stdlib", "purelib"):
        root = Path(sysconfig.get_path(name))
        yield from (p for p in root.rglob("*.py") if p.is_file() and not p.is_symlink())
