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
    # A process that is killed before its run has begun leaves config.toml.part and nothing else.
    names = set(entries) - {"config.toml.part"}
    if names:
        _check_replaceable(path, names, force=force, own=own)
    return bool(names)


def make_room(path: Path, *, force: bool, own: Set[str]) -> None:
    """An empty directory at `path`; RunError as in Run.create."""
    replaced = check_room(path, force=force, own=own)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the run directory {path} cannot be made: {error.strerror or error}. "
            "Give a place that can be written."
        ) from error
    if not replaced:
        return
    lock.acquire(path / "writer.lock")
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _check_replaceable(path: Path, names: Set[str], *, force: bool, own: Set[str]) -> None:
    if not force:
        raise RunError(
            f"{path} is asked for as a new run, but exists and is not empty. Give another name, "
            "resume the run, or delete it with force."
        )
    foreign = sorted(name for name in names if not _written_by_a_run(name, own))
    if foreign or not names & {"config.toml", "events.jsonl"} or path.is_symlink():
        found = f"holds {', '.join(foreign[:5])}" if foreign else "is a link or not a run"
        raise RunError(
            f"{path} is not deleted by force: it {found}, which no run writes. "
            "Move those files or give another name."
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
