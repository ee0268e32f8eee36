"""The run directory: what was asked, what happened and what it cost.

config.toml          the resolved configuration
environment.json     machine, versions, command and the sha256 of config.toml
events.jsonl         one JSON object per line, append-only: the truth
summary.json         the end result, written atomically
checkpoints/         step-00001000/ …, complete once it holds state.json
"""

import hashlib
import os
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, Protocol

from halfulp import lock, toml
from halfulp.environment import environment
from halfulp.errors import RunError
from halfulp.run_files import OWN_FILES, count_lines, cut_torn_line, make_room
from halfulp.strict_json import dumps, parse, read_json, write_json, write_whole


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
        text = toml.dumps(config)
        make_room(run.path, force=force, own=own)
        # config.toml comes first: a directory with it can be recognized as a run.
        write_whole(run.path / "config.toml", text)
        run._begin_writing()
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts = environment() | {"command": list(command), "config_sha256": digest}
        write_json(run.path / "environment.json", facts)
        return run

    @classmethod
    def open(cls, path: str | Path, *, writer: bool = True) -> "Run":
        """The existing run at `path`, to read or to go on with; RunError if there is none."""
        path = Path(path)
        # os.path is False, and does not raise, where a folder above may not be entered.
        if not os.path.isfile(path / "config.toml"):
            what = "has no config.toml" if os.path.isdir(path) else "does not exist"
            raise RunError(f"{path} is asked for as a run, but {what}. Give a run directory.")
        return cls(path, writer=writer)

    def write(self, event: str, **fields: Any) -> None:
        """Append one event and hand it to the trackers; on disk (flushed) when this returns."""
        if not self.writer:
            return
        line = {"event": event, "time": round(time.time(), 3), **fields}
        self._append(dumps(line) + "\n")
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
                event = parse(line)
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
                dropped.writelines(dumps(event) + "\n" for event in drop)
            self._stop_writing()
            write_whole(self.path / "events.jsonl", "".join(dumps(e) + "\n" for e in keep))
            self._begin_writing()
        return len(drop)

    def summarize(self, **fields: Any) -> None:
        """Merge `fields` into summary.json, atomically."""
        if self.writer:
            self._begin_writing()
            write_json(self.path / "summary.json", self.summary() | fields)

    def summary(self) -> dict[str, Any]:
        """summary.json, or {} while there is none."""
        return read_json(self.path / "summary.json")

    def environment(self) -> dict[str, Any]:
        """environment.json, or {} if it is missing."""
        return read_json(self.path / "environment.json")

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
            cut_torn_line(file, self.path / "events.torn")
            self._written = count_lines(file)
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
