import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import task_functions as f

from halfulp.errors import MissingExtraError
from halfulp.tasks import Outcome, _Worker, cores, room, run_tasks

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(os.name == "nt", reason="workers hold POSIX pipes")


def outcomes(function, tasks, **options) -> list[Outcome]:
    left = list(tasks)
    return list(run_tasks(function, lambda: left.pop(0) if left else None, **options))


def by_task(found: list[Outcome]) -> dict:
    assert len({o.task for o in found}) == len(found)
    return {o.task: o for o in found}


@pytest.mark.parametrize("jobs", [1, 2, 5])
def test_every_task_has_one_outcome_with_its_value(jobs):
    found = by_task(outcomes(f.square, range(7), jobs=jobs))
    assert {task: o.value for task, o in found.items()} == {x: x * x for x in range(7)}
    assert all(o.error is None and not o.died for o in found.values())


def test_no_tasks_start_no_worker():
    assert outcomes(f.square, []) == []


@pytest.mark.parametrize("jobs", [1, 2])
def test_the_next_task_is_asked_for_only_when_a_worker_is_free(jobs):
    """So that the choice of a task can depend on every outcome so far."""
    done, ahead = 0, []
    tasks = iter(range(6))

    def next_task() -> int | None:
        task = next(tasks, None)
        if task is not None:
            ahead.append(task - done)
        return task

    for _ in run_tasks(f.square, next_task, jobs=jobs):
        done += 1
    assert done == 6
    assert max(ahead) == jobs - 1


def test_a_task_that_waits_for_an_outcome_is_asked_for_again():
    """None means "nothing now", not "nothing ever"."""
    done: list[int] = []

    def next_task() -> int | None:
        return len(done) if len(done) < 3 and len(done) not in asked else None

    asked: set[int] = set()
    for outcome in run_tasks(f.square, lambda: _noted(next_task(), asked), jobs=2):
        done.append(outcome.task)
    assert done == [0, 1, 2]


def _noted(task: int | None, asked: set[int]) -> int | None:
    if task is not None:
        asked.add(task)
    return task


@pytest.mark.skipif(len(cores()) < 2, reason="needs two cores")
def test_workers_have_cores_of_their_own():
    seen = {o.value for o in outcomes(f.who, range(4), jobs=2)}
    assert len({pid for pid, _ in seen}) == 2
    (first,), (second,) = sorted({mine for _, mine in seen})
    assert first != second
    assert {first, second} <= set(cores())


def test_more_jobs_than_cores_share_all_of_them():
    jobs = len(cores()) + 1
    seen = {o.value for o in outcomes(f.who, range(jobs), jobs=jobs)}
    assert len(seen) == jobs
    assert {mine for _, mine in seen} == {tuple(cores())}


def test_a_worker_takes_as_many_cores_as_its_threads():
    (outcome,) = outcomes(f.who, [0], jobs=1, threads=len(cores()))
    assert outcome.value[1] == tuple(cores())
    assert room(len(cores())) == 1 == room(10_000)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("exit", "ended with code 3"),
        ("exit 0", "ended with code 0"),
        ("kill", "was killed by SIGKILL"),
    ],
)
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_that_dies_is_an_outcome_and_is_replaced(how, said, jobs):
    found = by_task(outcomes(f.misbehave, ["a", how, "b", "c"], jobs=jobs))
    assert found[how].died == said
    assert found[how].value is None
    assert {t: o.value for t, o in found.items() if t != how} == {"a": "a", "b": "b", "c": "c"}


def test_a_replacement_has_the_cores_of_the_dead_worker():
    before, after = outcomes(f.who_or_exit, [False, True, False], jobs=1)[::2]
    assert before.value[0] != after.value[0]
    assert before.value[1] == after.value[1]


def test_an_idle_worker_that_is_killed_is_replaced():
    """Nothing was running in it, so nothing is lost."""
    pids, values = [], []
    tasks = iter(range(3))
    for outcome in run_tasks(f.who, lambda: next(tasks, None), jobs=1):
        assert not outcome.died
        pids.append(outcome.value[0])
        values.append(outcome.task)
        os.kill(outcome.value[0], signal.SIGKILL)
        wait_until_gone(outcome.value[0])
    assert values == [0, 1, 2]
    assert len(set(pids)) == 3


def test_an_exception_is_an_outcome_and_the_worker_lives_on():
    found = outcomes(f.misbehave, ["raise", "exit like an answer", "a"], jobs=1)
    assert isinstance(found[0].error, ValueError)
    assert str(found[0].error) == "a wrong value"
    assert "in misbehave" in "".join(found[0].error.__notes__)  # where it was raised
    assert isinstance(found[1].error, MissingExtraError)
    assert found[2].value == "a"


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_cannot_be_pickled_is_named_and_harms_no_neighbor(jobs):
    names = ["raise the unspeakable", "return the unspeakable", "a", "b"]
    found = by_task(outcomes(f.misbehave, names, jobs=jobs))
    assert "Unspeakable: two numbers are needed" in str(found[names[0]].error)
    assert "cannot pickle 'generator'" in str(found[names[1]].error)
    assert [found[n].value for n in "ab"] == ["a", "b"]


def test_a_dead_worker_whose_child_lives_on_is_seen():
    """The child holds the worker's pipe open."""
    (outcome,) = outcomes(f.fork_and_die, [0], jobs=1)
    assert outcome.died == "was killed by SIGKILL"


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_worker_whose_task_hangs_is_killed_though_it_is_stopped(jobs):
    """Only that one, and the next task finds another worker."""
    found = by_task(outcomes(f.stop, ["a", "stop", "b"], jobs=jobs, hung=lambda t: t == "stop"))
    assert found["stop"].died == "was killed by SIGKILL"
    assert {t: o.value for t, o in found.items() if t != "stop"} == {"a": "a", "b": "b"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it is left behind
def test_a_worker_that_cannot_be_killed_is_given_up(monkeypatch):
    """It waits for a disk that does not answer: the driver does not wait with it."""
    groups: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("halfulp.tasks._GRACE_S", 0.2)
        patch.setattr("halfulp.tasks.os.killpg", lambda group, _: groups.append(group))
        found = by_task(outcomes(f.stop, ["stop", "a"], jobs=1, hung=lambda t: t == "stop"))
    assert found["stop"].died == "was killed, and is still there"
    assert found["a"].value == "a"
    os.killpg(groups[0], signal.SIGKILL)
    wait_until_gone(groups[0])


def test_workers_end_when_the_iterator_is_closed():
    tasks = iter(range(9))
    with closing(run_tasks(f.who, lambda: next(tasks, None), jobs=2)) as running:
        pid = next(running).value[0]
    wait_until_gone(pid)


def test_no_worker_is_left_when_the_driver_is_interrupted_twice(monkeypatch):
    """The second time while it waits for its workers; one of them is stopped and would stay."""
    end = _Worker.end

    def interrupted(worker: _Worker, seconds: float) -> None:
        if seconds > 0:
            raise KeyboardInterrupt
        end(worker, seconds)

    tasks = iter(range(9))
    running = run_tasks(f.who, lambda: next(tasks, None), jobs=1)
    pid = next(running).value[0]
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(_Worker, "end", interrupted)
    with pytest.raises(KeyboardInterrupt):
        running.close()
    wait_until_gone(pid)


_DRIVER = """
import sys
sys.path.insert(0, {here!r})
import task_functions as f
from halfulp.tasks import run_tasks
tasks = iter(range(1000))
for outcome in run_tasks(f.who, lambda: next(tasks, None), jobs=2):
    print(outcome.value[0], flush=True)
"""


def test_workers_end_with_a_driver_that_is_killed():
    """Also where the driver's script has no `if __name__ == "__main__"`."""
    driver = subprocess.Popen(
        [sys.executable, "-c", _DRIVER.format(here=str(HERE))], stdout=subprocess.PIPE, text=True
    )
    assert driver.stdout is not None
    pids = {int(driver.stdout.readline()) for _ in range(4)}
    assert len(pids) == 2
    driver.kill()
    driver.wait()
    driver.stdout.close()
    for pid in pids:
        wait_until_gone(pid)


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 20
    # The leader of a process may be a zombie before its other threads are.
    while _state(pid) not in ("", "Z") or _threads(pid) > 1:
        assert time.monotonic() < end, f"process {pid} lives on"
        time.sleep(0.01)


def _threads(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/task"))
    except OSError:
        return 0


def _state(pid: int) -> str:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[0]
