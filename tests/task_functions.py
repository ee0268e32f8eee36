"""Tasks for worker processes: what they see, and how they can end."""

import os
import signal
import time

from halfulp.errors import MissingExtraError


class Unspeakable(Exception):
    """An exception that cannot be rebuilt from its pickle."""

    def __init__(self, first: int, second: int) -> None:
        super().__init__("two numbers are needed")


def square(x: int) -> int:
    return x * x


def who(_: object) -> tuple[int, tuple[int, ...]]:
    """Process and cores of the worker, after a moment in which the others begin."""
    time.sleep(0.3)
    return os.getpid(), tuple(sorted(os.sched_getaffinity(0)))


def misbehave(what: str) -> str:
    """`what`, unless it is the name of a way not to return."""
    if what == "exit":
        os._exit(3)
    if what == "exit 0":
        os._exit(0)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "raise":
        raise ValueError("a wrong value")
    if what == "exit like an answer":
        raise MissingExtraError("install it")
    if what == "raise the unspeakable":
        raise Unspeakable(1, 2)
    if what == "return the unspeakable":
        return (x for x in what)  # type: ignore[return-value]
    return what


def who_or_exit(leave: bool) -> tuple[int, tuple[int, ...]]:
    """As `who`, or the end of the process."""
    if leave:
        os._exit(1)
    return who(None)


def fork_and_die(_: object) -> None:
    """The process is killed, and leaves a child that lives for some seconds."""
    if os.fork() == 0:
        time.sleep(4)
        os._exit(0)
    os.kill(os.getpid(), signal.SIGKILL)


def stop(what: str) -> str:
    """`what`; before that "stop" stops its own process, which leaves a child."""
    if what == "stop":
        if os.fork() == 0:
            time.sleep(600)
        os.kill(os.getpid(), signal.SIGSTOP)
    return what
