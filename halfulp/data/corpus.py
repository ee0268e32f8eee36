"""Sources to files: what a list of sources names, in an order that never changes."""

import difflib
import os
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from halfulp.data.stream import first_bytes
from halfulp.errors import DataError

STDLIB = "stdlib"
_NOT_LIBRARY = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__",
}  # fmt: skip


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus; `kind` is "text", "jsonl", "parquet" or "tokens".

    `begin` and `end` can name a part of a file that is not compressed: what begins in those bytes,
    lines of text or JSONL, row groups of Parquet, documents of tokens.
    """

    kind: str
    path: Path
    name: str
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Listing:
    """The files of a corpus, and the binary files that its folders hold and nobody reads."""

    files: tuple[SourceFile, ...]
    skipped: tuple[str, ...]


def list_files(source: Sequence[str]) -> Listing:
    """The files named by `source`: in the order given, and by relative name within a folder.

    Folders are read recursively. Hidden files, links to folders, and files that begin like
    binary ones are left out; the last are listed in `skipped`.
    Raises DataError for a missing path, an empty file, a folder without text, and for text
    mixed with token files.
    """
    files: list[SourceFile] = []
    skipped: list[str] = []
    for item in source:
        try:
            found = stdlib_files() if item == STDLIB else _named(Path(item).expanduser(), skipped)
        except OSError as error:
            raise DataError(
                f"the source {item} cannot be read: {error}. Check it and its permissions."
            ) from error
        files.extend(found)
    refuse_mixture(files)
    return Listing(tuple(files), tuple(skipped))


def kind_of(path: Path) -> str:
    """How a file of this name is read: "text", "jsonl", "parquet" or "tokens"."""
    name = path.name.lower()
    plain = name.removesuffix(".gz").removesuffix(".zst")
    suffix = os.path.splitext(plain)[1]
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix == ".json" and plain != name:
        return "jsonl"  # C4 and its kin call compressed JSON lines .json.gz
    return {".parquet": "parquet", ".bin": "tokens", ".idx": "tokens"}.get(suffix, "text")


def missing(path: Path, what: str) -> DataError:
    """The error for a path that does not exist, naming the nearest one that does."""
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        parent = parent.parent
    names = sorted(entry.name for entry in parent.iterdir()) if parent.is_dir() else []
    wanted = path.relative_to(parent).parts[0] if path != parent else path.name
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.5)
    nearest = parent / close[0] if close else parent
    return DataError(f"{what} {path} does not exist; the nearest path is {nearest}. Fix the path.")


def stdlib_files() -> list[SourceFile]:
    """The modules of the running Python's own library, sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, inner, names in os.walk(root):
        # Build folders and _sysconfigdata differ between installations of one Python.
        inner[:] = [d for d in inner if d not in _NOT_LIBRARY and not d.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            library = name.endswith(".py") and not name.startswith("_sysconfigdata")
            if library and path.is_file():
                files.append(SourceFile("text", path, path.relative_to(root).as_posix()))
    if not files:
        raise DataError(
            f"the source 'stdlib' asks for the running Python's library, and {root} holds no "
            "*.py files. Give the path of a text as data.source."
        )
    return sorted(files, key=lambda file: file.name)


def _named(path: Path, skipped: list[str]) -> list[SourceFile]:
    if path.is_dir():
        return _folder(path, skipped)
    if not path.exists():
        raise missing(path, "source")
    if not path.is_file():
        raise DataError(f"source {path} is neither a file nor a folder. Give a regular file.")
    if path.stat().st_size == 0:
        raise DataError(f"source {path} is empty (0 bytes). Restore it or take it out.")
    return [SourceFile(kind_of(path), path, path.name)]


def _folder(root: Path, skipped: list[str]) -> list[SourceFile]:
    files = []
    for path in walk(root):
        kind, name = kind_of(path), path.relative_to(root).as_posix()
        if kind == "text" and b"\0" in first_bytes(path):
            skipped.append(str(path))
        elif not is_companion(path):
            files.append(SourceFile(kind, path, name))
    if not files:
        raise DataError(
            f"the folder {root} holds no text ({len(skipped)} binary files). Give a folder with "
            "text, JSONL, Parquet or token files; hidden files are not read."
        )
    return files


def walk(root: Path) -> Iterator[Path]:
    """The files below `root`, sorted by relative name, without hidden ones. OSError passes."""
    found = []
    for folder, inner, names in os.walk(root, onerror=_raise):
        inner[:] = [name for name in inner if not name.startswith(".")]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    found.sort(key=lambda path: path.relative_to(root).as_posix())
    return (path for path in found if path.is_file())


def _raise(error: OSError) -> None:
    raise error


def is_companion(path: Path) -> bool:
    """Whether a token file beside this one speaks for it."""
    if path.suffix == ".idx":
        return path.with_suffix(".bin").is_file()
    if path.name.endswith(".bin.json"):
        return path.with_suffix("").is_file()
    return path.name == "meta.json" and any(path.parent.glob("*.bin"))


def refuse_mixture(files: Sequence[SourceFile]) -> None:
    """DataError when text and token files are mixed."""
    tokens = [file for file in files if file.kind == "tokens"]
    text = [file for file in files if file.kind != "tokens"]
    if tokens and text:
        raise DataError(
            f"the sources mix token files ({tokens[0].path}) with text ({text[0].path}). "
            "Name the files of one sort as data.source."
        )
