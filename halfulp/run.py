"""The run directory: what was asked, what happened and what it cost.

config.toml          the resolved configuration
environment.json     machine, versions, command and the sha256 of config.toml
events.jsonl         one JSON object per line, append-only: the truth
summary.json         the end result, written atomically
checkpoints/         step-00001000/ …, complete once it holds state.json
"""

import hashlib
import json
import math
import os
import shutil
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from halfulp import lock, toml
from halfulp.errors import RunError

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
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class Tracker(Protocol):
    """A writer beside events.jsonl."""

    def write(self, event: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Run:
    """A handle on one run directory.

    Reading needs no lock. The first write takes it, cuts a torn last line off events.jsonl and
    keeps that in events.torn. With `writer=False` (rank > 0) the writing methods do nothing.
    Non-finite numbers are stored as the strings "NaN", "Infinity", "-Infinity" and read back as
    floats, so every line is strict JSON.
    """

    def __init__(self, path: Path, *, writer: bool = True, trackers: Sequence[Tracker] = ()):
        self.path = Path(path)
        self.writer = writer
        self.trackers = list(trackers)
        self.continue_with = f"halfulp train --resume {path}"
        self._events: int | None = None  # file descriptor while this process is the writer
        self._written = 0  # events in the file while this process is the writer

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Mapping[str, Any],
        *,
        command: Sequence[str],
        force: bool = False,
        writer: bool = True,
        own: Set[str] = OWN_FILES,
    ) -> "Run":
        """A fresh run directory with config.toml and environment.json.

        RunError when `path` exists and is not empty; `force` deletes it first, but only if it
        holds nothing but the files of a run (`own`) and nobody is writing it.
        """
        run = cls(Path(path), writer=writer)
        if not writer:
            return run
        _make_room(run.path, force=force, own=own)
        text = toml.dumps(config)
        # config.toml comes first: a directory with it can be recognized as a run.
        _write_whole(run.path / "config.toml", text)
        run._begin_writing()
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts = environment() | {"command": list(command), "config_sha256": digest}
        _write_json(run.path / "environment.json", facts)
        return run

    @classmethod
    def open(cls, path: str | Path, *, writer: bool = True) -> "Run":
        """The existing run at `path`, to read or to go on with; RunError if there is none."""
        path = Path(path)
        if not (path / "config.toml").is_file():
            what = "has no config.toml" if path.is_dir() else "does not exist"
            raise RunError(f"{path} is asked for as a run, but {what}. Give a run directory.")
        return cls(path, writer=writer)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event and hand it to the trackers; on disk (flushed) when this returns."""
        if not self.writer:
            return
        line = {"event": event, "time": round(time.time(), 3), **fields}
        self._append(_dumps(line) + "\n")
        for tracker in self.trackers:
            tracker.write(line)

    def events(
        self, kind: str | None = None, *, damaged: list[str] | None = None
    ) -> Iterator[dict[str, Any]]:
        """Events in file order, of one kind or all; a torn last line is passed over.

        Any other line that is not a JSON object is named in `damaged`; without that list it is a
        RunError.
        """
        file = self.path / "events.jsonl"
        if not file.exists():
            return
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                event = _parse(line)
                if event is not None:
                    if kind is None or event.get("event") == kind:
                        yield event
                elif line.endswith(b"\n"):
                    what = f"{file} line {number} is not a JSON object: {line[:60]!r}"
                    if damaged is None:
                        raise RunError(
                            f"{what}. Delete that line (sed -i {number}d {file}) and read again."
                        )
                    damaged.append(what)

    @property
    def written(self) -> int:
        """Number of events in the file; 0 where this process does not write."""
        if self.writer:
            self._begin_writing()
        return self._written

    def truncate(self, step: int, *, kept: int = 0) -> int:
        """Move what came after `step` to events.dropped.jsonl; returns how many events.

        That is everything from the first event of a later step on, but for the first `kept` events:
        the steps of a run that has been rolled back do not ascend.
        """
        if not self.writer:
            return 0
        self._begin_writing()
        events = list(self.events())
        later = (i for i in range(kept, len(events)) if events[i].get("step", 0) > step)
        cut = next(later, len(events))
        keep, drop = events[:cut], events[cut:]
        if drop:
            with open(self.path / "events.dropped.jsonl", "a", encoding="utf-8") as dropped:
                dropped.writelines(_dumps(event) + "\n" for event in drop)
            self._stop_writing()
            _write_whole(self.path / "events.jsonl", "".join(_dumps(e) + "\n" for e in keep))
            self._begin_writing()
        return len(drop)

    def summarize(self, **fields: Any) -> None:
        """Merge `fields` into summary.json, atomically."""
        if self.writer:
            self._begin_writing()
            _write_json(self.path / "summary.json", self.summary() | fields)

    def summary(self) -> dict[str, Any]:
        """summary.json, or {} while there is none."""
        return _read_json(self.path / "summary.json")

    def environment(self) -> dict[str, Any]:
        """environment.json, or {} if it is missing."""
        return _read_json(self.path / "environment.json")

    def config(self) -> dict[str, Any]:
        """config.toml as nested dicts; RunError if it is not valid TOML."""
        file = self.path / "config.toml"
        try:
            return tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"cannot read {file}: {error}. Restore it or drop the run.") from error

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints (those that hold state.json), oldest first."""
        found = (self.path / "checkpoints").glob("step-*/state.json")
        steps = {file.parent: file.parent.name.removeprefix("step-") for file in found}
        numbered = [(int(digits), path) for path, digits in steps.items() if digits.isdecimal()]
        return [path for _, path in sorted(numbered)]

    def close(self) -> None:
        """Close the trackers and let another process write; a later write opens the run again."""
        for tracker in self.trackers:
            tracker.close()
        self.trackers.clear()
        self._stop_writing()
        if self.writer:
            lock.release(self.path / "writer.lock")

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, text: str) -> None:
        self._begin_writing()
        assert self._events is not None
        rest = text.encode()
        try:
            while rest:
                rest = rest[os.write(self._events, rest) :]
        except OSError as error:
            raise RunError(
                f"cannot write to {self.path / 'events.jsonl'}: {error.strerror}. Make room and "
                f"continue with: {self.continue_with}"
            ) from error
        self._written += 1

    def _begin_writing(self) -> None:
        if self._events is not None:
            return
        file = self.path / "events.jsonl"
        try:
            lock.acquire(self.path / "writer.lock")
            _cut_torn_line(file, self.path / "events.torn")
            self._written = _count_lines(file)
            self._events = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunError(
                f"{self.path} cannot be written to: {error.strerror or error}. Let this user "
                "write there and make room, or go on with a copy elsewhere."
            ) from error

    def _stop_writing(self) -> None:
        if self._events is not None:
            os.close(self._events)
            self._events = None


def environment() -> dict[str, Any]:
    """Versions and machine, as they decide the numbers and the speed of a run."""
    import platform

    import torch

    from halfulp.numerics import cuda, kernel

    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    status, on_gpu = kernel.status(), cuda.status()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in ("halfulp", "transformers", "numpy")},
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": [torch.cuda.get_device_name(i) for i in devices],
        "kernel": status.name,
        "kernel_reason": status.reason,
        "gpu_kernel": on_gpu.name,
        "gpu_kernel_reason": on_gpu.reason,
    }


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    import platform

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _make_room(path: Path, *, force: bool, own: Set[str]) -> None:
    if path.exists() and not path.is_dir():
        raise RunError(f"{path} is asked for as a run directory, but is a file. Give another name.")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the run directory {path} cannot be made: {error.strerror or error}. "
            "Give a place that can be written."
        ) from error
    # A process that is killed before its run has begun leaves config.toml.part and nothing else.
    names = {entry.name for entry in path.iterdir()} - {"config.toml.part"}
    if not names:
        return
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
    lock.acquire(path / "writer.lock")
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _written_by_a_run(name: str, own: Set[str]) -> bool:
    """Whether a run writes a file of this name, were it only until it is renamed."""
    return name.removesuffix(".part") in own or name.startswith("writer.lock.")


def _cut_torn_line(file: Path, torn: Path) -> None:
    """End `file` with a whole line: complete the last one if it parses, else move it to `torn`."""
    if not file.exists():
        return
    with open(file, "r+b") as lines:
        start = _last_line(lines)
        lines.seek(start)
        tail = lines.read()
        if not tail:
            return
        if _parse(tail) is not None:
            lines.write(b"\n")
            return
        with open(torn, "ab") as kept:
            kept.write(tail + b"\n")
        lines.truncate(start)


def _count_lines(file: Path) -> int:
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


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return _revive(value) if b'"NaN"' in line or b'Infinity"' in line else value


def _revive(value: Any) -> Any:
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return {k: _revive(v) for k, v in value.items()} if isinstance(value, dict) else value


def _dumps(value: Any, indent: int | None = None) -> str:
    try:
        return json.dumps(value, allow_nan=False, default=_plain, indent=indent)
    except ValueError:
        return json.dumps(_spell(value), allow_nan=False, indent=indent)


def _spell(value: Any) -> Any:
    """`value` with every non-finite float as its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(k): _spell(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else _spell(_plain(value))


def _plain(value: Any) -> Any:
    """A path as text, and a scalar of numpy or torch as a Python number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise RunError(
        f"an event holds {value!r} ({type(value).__name__}), which JSON cannot spell. "
        "Write numbers, strings, lists and dicts."
    )


def _write_whole(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old text or the new one, never a part."""
    waiting = path.with_name(f"{path.name}.part")
    with open(waiting, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    waiting.replace(path)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write_whole(path, _dumps(value, indent=2) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = _parse(path.read_bytes())
    if value is None:
        raise RunError(f"{path} is not a JSON object. Restore it, or delete it to go without it.")
    return value
