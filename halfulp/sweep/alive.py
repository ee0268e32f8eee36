"""Whether a run still makes steps: a timer in its worker, and a look at it by the driver.

The timer says where the run hangs. It stands still with a process that is stopped from outside or
held by the system (a file system that does not answer); the driver sees that no step has come.
"""

import faulthandler
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 600.0  # until the first step: imports, a model to build, a step to compile
GRACE_S = 30.0  # that the driver leaves the worker to end itself

OnStep = Callable[[Mapping[str, Any]], None]


def stack_file(runs: Path, id: str) -> Path:
    """Where the worker of a run says where it hangs; the driver keeps it under another name."""
    return runs / f"{id}.stalled.txt"


def beat_file(runs: Path, id: str) -> Path:
    """What the worker touches when a run has made a step; not there before the first."""
    return runs / f"{id}.alive"


def patience(timeout_s: float, *, started: bool) -> float:
    """Seconds without an event after which a run hangs: `timeout_s`, or more until it has started.

    The first step waits for imports, the model and the compiler: `START_S` at least.
    """
    return timeout_s if started else max(timeout_s, START_S)


@contextmanager
def watched(runs: Path, id: str, timeout_s: float) -> Iterator[OnStep]:
    """End this process, with its stack in `stack_file`, when events stop coming; see `patience`.

    Yields what is to be called with every event. The timer is a thread of C: code that hangs
    without letting other threads run is ended too.
    """
    runs.mkdir(exist_ok=True)
    stack, beat = stack_file(runs, id), beat_file(runs, id)
    with open(stack, "w", encoding="utf-8") as stream:
        last, started = 0.0, False

        def wind() -> None:
            seconds = patience(timeout_s, started=started)
            faulthandler.dump_traceback_later(seconds, exit=True, file=stream)

        def alive(event: Mapping[str, Any]) -> None:
            nonlocal last, started
            first = event["event"] == "step" and not started
            if first or time.monotonic() - last > min(1.0, timeout_s / 10):
                last, started = time.monotonic(), started or first
                wind()
                if started:
                    beat.touch()

        wind()
        try:
            yield alive
        finally:
            faulthandler.cancel_dump_traceback_later()
            stack.unlink(missing_ok=True)
            beat.unlink(missing_ok=True)


class Watch:
    """The driver's look at the runs under way: which of them no longer move."""

    def __init__(self, runs: Path, timeout_s: float) -> None:
        self._runs, self._timeout_s = runs, timeout_s
        self._seen: dict[str, tuple[int, float]] = {}  # id → its last beat, and when it was new
        self._late: set[str] = set()

    def begin(self, id: str) -> None:
        """A run is handed to a worker."""
        for file in (beat_file(self._runs, id), stack_file(self._runs, id)):
            file.unlink(missing_ok=True)
        self._seen[id] = 0, time.monotonic()
        self._late.discard(id)

    def late(self, id: str) -> bool:
        """Whether the worker should have ended itself `GRACE_S` ago, and has not."""
        now, (before, since) = time.monotonic(), self._seen[id]
        if (beat := self._beat(id)) != before:
            self._seen[id] = beat, now
        elif now - since > patience(self._timeout_s, started=beat > 0) + GRACE_S:
            self._late.add(id)
        return id in self._late

    def why(self, id: str) -> str:
        """Why the run that has ended was stalled; "" if it was not."""
        started = self._beat(id) > 0
        seconds = f"{patience(self._timeout_s, started=started):g} s"
        what = f"no step for {seconds}" if started else f"no first step for {seconds}"
        stack = stack_file(self._runs, id)
        if stack.is_file() and stack.stat().st_size > 0:
            return f"{what}; its stack is in {_kept(stack).name}"
        if id in self._late:
            return f"{what}: its process was stopped, or waits for a disk that does not answer"
        return ""

    def end(self, id: str) -> None:
        """The run has an outcome."""
        beat_file(self._runs, id).unlink(missing_ok=True)

    def _beat(self, id: str) -> int:
        try:
            return beat_file(self._runs, id).stat().st_mtime_ns
        except OSError:
            return 0


def _kept(stack: Path) -> Path:
    """The same file under a name that no later try of the run takes."""
    number = 1
    while (kept := stack.with_suffix(f".{number}.txt")).exists():
        number += 1
    return stack.rename(kept)
