"""Many independent tasks: on worker processes with cores of their own, or on a Ray cluster."""

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from halfulp.errors import ConfigError, require

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What came of one task: a value, the exception that it raised, or how its process ended."""

    task: T
    value: Any = None
    error: BaseException | None = None
    died: str = ""


def run_tasks(
    function: Callable[[T], Any],
    next_task: Callable[[], T | None],
    *,
    jobs: int = 0,
    threads: int = 1,
    gpu_share: float = 0.0,
    ray: str = "",
) -> Iterator[Outcome[T]]:
    """The outcomes of `function(task)`, in the order in which they come.

    * `next_task` is asked whenever a worker is free; None means that there is nothing to start now.
      The iterator ends when nothing is running and nothing is to be started.
    * `jobs` tasks run at a time, each with `threads` cores and `gpu_share` of a GPU; 0 = as many as
      there is room for.
    * Workers persist, so that a module is imported once in each. One that dies is an outcome, and
      another takes its place. They die with the process that started them.
    * `ray` is the address of a cluster, or "auto": tasks then run there, by the same rules.

    `function` is a module's, and tasks and values can be pickled. Raises ConfigError for a cluster
    that does not answer, MissingExtraError where Ray is not installed.
    """
    pool = _Ray(ray, jobs, threads, gpu_share) if ray else _Local(jobs, threads, gpu_share)
    running: dict[Any, T] = {}
    try:
        while True:
            while len(running) < pool.room() and (task := next_task()) is not None:
                running[pool.submit(function, task)] = task
            if not running:
                return
            for handle in pool.wait(list(running)):
                yield pool.outcome(handle, running.pop(handle))
    finally:
        pool.stop()


def room(threads: int = 1) -> int:
    """How many tasks of so many threads this machine's cores hold; at least one."""
    return max(1, len(cores()) // threads)


def cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


class _Pool(Protocol):
    def room(self) -> int: ...
    def submit(self, function: Callable[[Any], Any], task: Any) -> Any: ...
    def wait(self, handles: Sequence[Any]) -> Sequence[Any]: ...
    def outcome(self, handle: Any, task: Any) -> Outcome[Any]: ...
    def stop(self) -> None: ...


class _Local:
    def __init__(self, jobs: int, threads: int, gpu_share: float) -> None:
        import multiprocessing

        from pebble import ProcessPool

        self._jobs = jobs or (_gpu_room(gpu_share) if gpu_share else room(threads))
        self._slots = tempfile.TemporaryDirectory(prefix="halfulp-")
        self._pool = ProcessPool(
            max_workers=self._jobs,
            initializer=_enter,
            initargs=[self._slots.name, self._jobs, threads, gpu_share],
            # fork would copy the thread pools of torch into a state in which they hang.
            context=multiprocessing.get_context("spawn"),
        )

    def room(self) -> int:
        return self._jobs

    def submit(self, function: Callable[[Any], Any], task: Any) -> "Future[Any]":
        return self._pool.schedule(function, args=[task])

    def wait(self, handles: Sequence["Future[Any]"]) -> Sequence["Future[Any]"]:
        return list(wait(handles, return_when=FIRST_COMPLETED).done)

    def outcome(self, handle: "Future[Any]", task: Any) -> Outcome[Any]:
        from pebble import ProcessExpired

        error = handle.exception()
        if isinstance(error, ProcessExpired):
            return Outcome(task, died=_ended(error.exitcode))
        return Outcome(task, error=error) if error else Outcome(task, handle.result())

    def stop(self) -> None:
        self._pool.stop()
        self._pool.join()
        self._slots.cleanup()


def _ended(code: int | None) -> str:
    import signal

    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def _gpu_room(gpu_share: float) -> int:
    import torch

    return max(1, int(torch.cuda.device_count() / gpu_share + 1e-6))


def _enter(slots: str, jobs: int, threads: int, gpu_share: float) -> None:
    """Begin a worker: its own cores and GPU, and an end with its parent."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    slot = _take_slot(Path(slots), jobs)
    mine = cores()
    if jobs * threads <= len(mine) and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine[slot * threads : (slot + 1) * threads])
    if gpu_share:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = visible.split(",") if visible else None
        index = int(slot * gpu_share + 1e-6)
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[index] if gpus else str(index)


def _end_with_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _take_slot(folder: Path, jobs: int) -> int:
    """The first slot that no living worker holds: its file stays locked until the process ends."""
    import fcntl

    for slot in range(jobs):
        file = os.open(folder / str(slot), os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return slot
        except OSError:
            os.close(file)
    return 0


class _Ray:
    def __init__(self, address: str, jobs: int, threads: int, gpu_share: float) -> None:
        self._ray = require("ray", "ray")
        self._jobs, self._threads, self._gpu_share = jobs, threads, gpu_share
        self._mine = not self._ray.is_initialized()
        if self._mine:
            _connect(self._ray, address)
        self._remote: Any = None

    def room(self) -> int:
        resources = self._ray.cluster_resources()
        places = resources.get("CPU", 0.0) / self._threads
        if self._gpu_share:
            places = min(places, resources.get("GPU", 0.0) / self._gpu_share)
        return min(self._jobs or int(places), max(1, int(places)))

    def submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        if self._remote is None:
            options = {"num_cpus": self._threads, "num_gpus": self._gpu_share, "max_retries": 0}
            self._remote = self._ray.remote(**options)(function)
        return self._remote.remote(task)

    def wait(self, handles: Sequence[Any]) -> Sequence[Any]:
        return self._ray.wait(handles, num_returns=1)[0]

    def outcome(self, handle: Any, task: Any) -> Outcome[Any]:
        try:
            return Outcome(task, self._ray.get(handle))
        except self._ray.exceptions.RayTaskError as error:
            return Outcome(task, error=error.cause or error)
        except self._ray.exceptions.RayError as error:
            return Outcome(task, died=f"ended ({type(error).__name__})")

    def stop(self) -> None:
        if self._mine:
            self._ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}). Start one with "
            "`ray start --head`, give its address, or leave --ray out for a local pool."
        ) from error
