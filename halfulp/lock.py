"""One writer per directory: a file that names the process that writes."""

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from halfulp.errors import RunError


def acquire(path: Path) -> None:
    """Make this process the writer that `path` names; a file left by a dead process is taken over.

    RunError when another live process, or any process of another machine, is the writer. Of
    processes that come at the same moment one becomes the writer.
    """
    mine = _identity()
    with _turn(path):
        other = _read(path)
        if other is not None and other != mine and _alive(other):
            raise RunError(
                f"{path.parent} is being written by process {other.get('pid')} on "
                f"{other.get('host')}. Wait for it or stop it; if it is gone, delete {path}."
            )
        # A process may be killed here: the name of what it leaves is known to `run_files`.
        waiting = path.with_name(f"{path.name}.{os.getpid()}")
        waiting.write_text(json.dumps(mine), encoding="utf-8")
        waiting.replace(path)


def held(path: Path) -> bool:
    """Whether a live process, or any of another machine, is the writer that `path` names."""
    other = _read(path)
    return other is not None and _alive(other)


def release(path: Path) -> None:
    """Remove the file if it names this process."""
    if _read(path) == _identity():
        path.unlink(missing_ok=True)


@contextmanager
def _turn(path: Path) -> Iterator[None]:
    """Inside, no other process of this machine is inside for the directory of `path`."""
    if os.name == "nt":
        yield
        return
    import fcntl

    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems lock no directories
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _read(path: Path) -> dict | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _identity() -> dict:
    pid = os.getpid()
    return {"pid": pid, "host": socket.gethostname(), "began": _began(pid)}


def _began(pid: int) -> str | None:
    """Start time of a live process in kernel ticks; None where there is no /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]


def _alive(other: dict) -> bool:
    pid = other.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        return False
    if other.get("host") != socket.gethostname():
        return True
    if Path("/proc/self/stat").exists():
        # Process ids are reused; the start time tells an heir from the writer.
        return _began(pid) is not None and _began(pid) == other.get("began")
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
