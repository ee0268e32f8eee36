"""The files of a run directory on disk: room for a new one, and an event file that ends well."""

import os
import shutil
from collections.abc import Set
from pathlib import Path
from typing import BinaryIO

from halfulp import lock
from halfulp.errors import RunError
from halfulp.strict_json import parse

OWN_FILES = {
    "config.toml",
    "environment.json",
    "events.jsonl",
    "events.torn",
    "events.dropped.jsonl",
    "summary.json",
    "policy.toml",
    "report.html",
    "checkpoints",
    "tensorboard",
    "writer.lock",
}


def check_room(path: Path, *, force: bool, own: Set[str] = OWN_FILES) -> bool:
    """Whether `path` holds a run that is to be replaced; nothing is written.

    RunError where it holds anything else, or may not be replaced.
    """
    if os.path.exists(path) and not os.path.isdir(path):
        raise RunError(f"{path} is asked for as a run directory, but is a file. Give another name.")
    try:
        entries = os.listdir(path) if os.path.isdir(path) else ()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}. Give another name.") from error
    # A process that is killed before its run has begun leaves no more than these.
    names = {n for n in entries if n != "config.toml.part" and not n.startswith("writer.lock")}
    if names:
        _check_replaceable(path, names, force=force, own=own)
    return bool(names)


def make_room(path: Path, *, force: bool, own: Set[str]) -> None:
    """An empty directory at `path`, which this process writes; RunError as in Run.create."""
    check_room(path, force=force, own=own)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock.acquire(path / "writer.lock")
    except OSError as error:
        raise RunError(
            f"the run directory {path} cannot be made: {error.strerror or error}. "
            "Give a place that can be written."
        ) from error
    try:
        replaced = check_room(path, force=force, own=own)  # another process may have been faster
    except RunError:
        lock.release(path / "writer.lock")
        raise
    for entry in path.iterdir() if replaced else ():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry.name != "writer.lock":
            entry.unlink()


def _check_replaceable(path: Path, names: Set[str], *, force: bool, own: Set[str]) -> None:
    if not force:
        raise RunError(
            f"{path} is asked for as a new run, but exists and is not empty. Give another name, "
            "go on with it (--resume), or replace it (--force)."
        )
    foreign = sorted(name for name in names if not _written_by_a_run(name, own))
    if foreign:
        raise RunError(
            f"{path} is not deleted by force: it holds {', '.join(foreign[:5])}, which no run "
            "writes. Move those files or give another name."
        )
    begun = {name.removesuffix(".part") for name in names} & {"events.jsonl", "environment.json"}
    if not (begun or (path / "writer.lock").exists()) or path.is_symlink():
        holds = f"no run, but holds {', '.join(sorted(names)[:5])}"
        raise RunError(
            f"{path} is not deleted by force: it is {'a link' if path.is_symlink() else holds}. "
            "Delete it yourself, or give another name."
        )


def _written_by_a_run(name: str, own: Set[str]) -> bool:
    """Whether a run writes a file of this name, were it only until it is renamed."""
    return name.removesuffix(".part") in own or name.startswith("writer.lock.")


def cut_torn_line(file: Path, torn: Path) -> None:
    """End `file` with a whole line: complete the last one if it parses, else move it to `torn`."""
    if not file.exists():
        return
    with open(file, "r+b") as lines:
        start = _last_line(lines)
        lines.seek(start)
        tail = lines.read()
        if not tail:
            return
        if parse(tail) is not None:
            lines.write(b"\n")
            return
        with open(torn, "ab") as kept:
            kept.write(tail + b"\n")
        lines.truncate(start)


def count_lines(file: Path) -> int:
    """The lines of `file`; 0 if it does not exist."""
    if not file.exists():
        return 0
    with open(file, "rb") as lines:
        return sum(1 for _ in lines)


def _last_line(lines: BinaryIO) -> int:
    """Offset just after the last line break; the end of the file if it ends with one."""
    position = lines.seek(0, os.SEEK_END)
    while position > 0:
        begin = max(0, position - 65536)
        lines.seek(begin)
        found = lines.read(position - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        position = begin
    return 0
