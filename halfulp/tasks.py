"""Many independent tasks: on worker processes with cores of their own, or on a Ray cluster."""

import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
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
    hung: Callable[[T], bool] | None = None,
) -> Generator[Outcome[T], None, None]:
    """The outcomes of `function(task)`, in the order in which they come.

    * `next_task` is asked whenever a worker is free; None means that there is nothing to start now.
      The iterator ends when nothing is running and nothing is to be started.
    * `jobs` tasks run at a time, each with `threads` cores and `gpu_share` of a GPU; 0 = as many as
      there is room for.
    * Workers persist, so that a module is imported once in each. One that dies is an outcome, and
      another takes its place. They die with the process that started them.
    * `hung` is asked about every running task each second or so; a worker whose task hangs is
      killed with all that it has started, which is an outcome. Stopped processes end by that too.
    * `ray` is the address of a cluster, or "auto": tasks then run there, by the same rules, but
      that `hung` is not asked: from here nothing ends a process of another machine that is stopped.

    `function` is a module's, and tasks and values can be pickled. Raises ConfigError for a cluster
    that does not answer, MissingExtraError where Ray is not installed.
    """
    pool: _Pool = (
        _Ray(ray, jobs, threads, gpu_share) if ray else _Local(jobs, threads, gpu_share, hung)
    )
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
    """One process per slot, with a pipe of its own: none can harm another by the way it ends."""

    def __init__(
        self,
        jobs: int,
        threads: int,
        gpu_share: float,
        hung: Callable[[Any], bool] | None = None,
    ) -> None:
        self._jobs = jobs or (_gpu_room(gpu_share) if gpu_share else room(threads))
        self._threads, self._gpu_share = threads, gpu_share
        self._hung = hung
        self._workers: dict[int, _Worker] = {}
        self._busy: dict[_Worker, Any] = {}  # worker → its task

    def room(self) -> int:
        return self._jobs

    def submit(self, function: Callable[[T], Any], task: T) -> "_Worker":
        slot, worker = self._free()
        if worker is None or not worker.begin(function, task):
            worker = self._workers[slot] = self._start(slot)
            worker.begin(function, task)
        self._busy[worker] = task
        return worker

    def wait(self, handles: Sequence["_Worker"]) -> Sequence["_Worker"]:
        from multiprocessing.connection import wait

        while True:
            ready = wait([worker.pipe for worker in handles], timeout=1.0)
            for worker in handles:
                if worker.pipe not in ready and self._hung and self._hung(self._busy[worker]):
                    worker.kill()
            # A child of a dead worker may hold its pipe open.
            found = [w for w in handles if w.pipe in ready or w.ended]
            if found:
                return found

    def outcome(self, handle: "_Worker", task: Any) -> Outcome[Any]:
        del self._busy[handle]
        return handle.outcome(task)

    def stop(self) -> None:
        end = time.monotonic() + _GRACE_S
        for worker in self._workers.values():
            worker.dismiss()
        try:
            for worker in self._workers.values():
                worker.end(max(0.0, end - time.monotonic()))
        except KeyboardInterrupt:  # asked for twice: now
            for worker in self._workers.values():
                worker.end(0.0)
            raise

    def _free(self) -> "tuple[int, _Worker | None]":
        found = ((slot, self._workers.get(slot)) for slot in range(self._jobs))
        return next((slot, worker) for slot, worker in found if worker not in self._busy)

    def _start(self, slot: int) -> "_Worker":
        mine = cores()
        share = mine[slot * self._threads : (slot + 1) * self._threads]
        pinned = share if self._jobs * self._threads <= len(mine) else []
        return _Worker(pinned, self._gpu(slot) if self._gpu_share else None)

    def _gpu(self, slot: int) -> str:
        import torch

        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else range(max(1, torch.cuda.device_count()))
        return str(gpus[slot * len(gpus) // self._jobs])


class _Worker:
    """A process that answers one task after another, and ends when this process does."""

    def __init__(self, pinned: Sequence[int], gpu: str | None) -> None:
        from multiprocessing import Pipe

        self.pipe, theirs = Pipe()
        leash, self._leash = os.pipe()
        arguments = [list(map(str, sys.path)), theirs.fileno(), leash, list(pinned)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BEGIN, json.dumps(arguments)],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), leash),
            env=os.environ | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu}),
            start_new_session=True,  # Ctrl-C is for the driver, which then ends its workers
        )
        theirs.close()
        os.close(leash)
        self._given_up = False  # killed, and the system does not let go of it

    @property
    def ended(self) -> bool:
        """Whether the process is gone, or given up."""
        return self._given_up or self._process.poll() is not None

    def begin(self, function: Callable[[T], Any], task: T) -> bool:
        """Hand the task over; False when the process has ended."""
        message = pickle.dumps((function, task))
        try:
            if not self.ended:
                self.pipe.send_bytes(message)
                return True
        except OSError:
            pass
        self.end(0.0)
        return False

    def outcome(self, task: Any) -> Outcome[Any]:
        """What has come of the task; waits for it."""
        try:
            if not self.ended or self.pipe.poll():
                value, error = pickle.loads(self.pipe.recv_bytes())
                return Outcome(task, value, error)
        except (EOFError, OSError):
            pass
        self.end(_GRACE_S)
        return Outcome(task, died=_how(self._process.returncode))

    def dismiss(self) -> None:
        """Ask the process to end; a task that listens to SIGTERM may come to a good point."""
        self.pipe.close()
        self._process.terminate()

    def end(self, seconds: float) -> None:
        """Wait so long for the end of the process, and then kill it."""
        try:
            if not self._given_up:
                self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
        self.pipe.close()
        if self._leash >= 0:
            os.close(self._leash)
            self._leash = -1

    def kill(self) -> None:
        """End the process, stopped or not, and what it has started."""
        if self.ended:
            return
        os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:  # it waits for a disk that does not answer
            self._given_up = True


_GRACE_S = 5.0
_BEGIN = (
    "import json, sys; arguments = json.loads(sys.argv[1]); sys.path[:] = arguments.pop(0); "
    "from halfulp.tasks import work; work(*arguments)"
)


def work(pipe: int, leash: int, pinned: Sequence[int]) -> None:
    """The life of a worker process: tasks from the file descriptor `pipe`, one after another."""
    from multiprocessing.connection import Connection

    for descriptor in (pipe, leash):
        os.set_inheritable(descriptor, False)
    threading.Thread(target=_end_with, args=[leash], daemon=True).start()
    if pinned and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, pinned)
    asked = Connection(pipe)
    while True:
        try:
            message = asked.recv_bytes()
            asked.send_bytes(_answer(message))
        except (EOFError, OSError):  # the driver has closed its end
            return


def _end_with(leash: int) -> None:
    os.read(leash, 1)  # nothing is ever written: this returns when the driver has ended
    os._exit(1)


def _answer(message: bytes) -> bytes:
    """(value, error) of the pickled (function, task)."""
    try:
        function, task = pickle.loads(message)
        return pickle.dumps((function(task), None))
    except BaseException as error:
        error.add_note(traceback.format_exc())
        try:
            said = pickle.dumps((None, error))
            pickle.loads(said)
        except Exception:  # of a class that cannot be pickled, or not be rebuilt
            said = pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}")))
        return said


def _how(code: int | None) -> str:
    if code is None:
        return "was killed, and is still there"
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"


def _gpu_room(gpu_share: float) -> int:
    import torch

    return max(1, int(torch.cuda.device_count() / gpu_share + 1e-6))


class _Ray:
    def __init__(self, address: str, jobs: int, threads: int, gpu_share: float) -> None:
        self._ray = require("ray", "ray")
        self._jobs, self._threads, self._gpu_share = jobs, threads, gpu_share
        self._mine = not self._ray.is_initialized()
        if self._mine:
            _connect(self._ray, address)
        self._remote: Any = None
        self._running: set[Any] = set()

    def room(self) -> int:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        places = sum(map(self._places, nodes))
        if not places:
            share = f" and {self._gpu_share:g} of a GPU" if self._gpu_share else ""
            raise ConfigError(
                f"no node of the Ray cluster has the {self._threads} CPU{share} that a task asks "
                f"for; it has {len(nodes)} nodes. Add one, or ask for fewer threads."
            )
        return min(self._jobs or places, places)

    def _places(self, resources: Mapping[str, float]) -> int:
        """How many tasks a node with these resources has room for."""
        places = resources.get("CPU", 0.0) / self._threads
        if self._gpu_share:
            places = min(places, resources.get("GPU", 0.0) / self._gpu_share)
        return int(places + 1e-6)

    def submit(self, function: Callable[[Any], Any], task: Any) -> Any:
        if self._remote is None:
            options = {"num_cpus": self._threads, "num_gpus": self._gpu_share, "max_retries": 0}
            self._remote = self._ray.remote(**options)(function)
        handle = self._remote.remote(task)
        self._running.add(handle)
        return handle

    def wait(self, handles: Sequence[Any]) -> Sequence[Any]:
        return self._ray.wait(handles, num_returns=1)[0]

    def outcome(self, handle: Any, task: Any) -> Outcome[Any]:
        self._running.discard(handle)
        try:
            return Outcome(task, self._ray.get(handle))
        except self._ray.exceptions.RayTaskError as error:
            return Outcome(task, error=error.cause or error)
        except self._ray.exceptions.RayError as error:
            return Outcome(task, died=f"ended ({type(error).__name__})")

    def stop(self) -> None:
        for handle in self._running:
            self._ray.cancel(handle, force=True)
        if self._mine:
            self._ray.shutdown()


def _check_port(address: str) -> None:
    """OSError, ValueError for an address at which nobody listens: Ray itself tries for minutes."""
    import socket

    if address not in ("auto", "local"):
        host, _, port = address.removeprefix("ray://").rpartition(":")
        socket.create_connection((host, int(port)), timeout=5).close()


def _connect(ray: Any, address: str) -> None:
    try:
        _check_port(address)
        # "auto" may find a cluster that has just died: Ray would try it 20 times for 30 seconds.
        os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "1")
        ray.init(address=address, log_to_driver=False, logging_level="warning")
    except (ConnectionError, OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"no Ray cluster answers at {address!r} ({str(error).splitlines()[0]}). Start one with "
            "`ray start --head`, give its address, or leave --ray out for a local pool."
        ) from error
