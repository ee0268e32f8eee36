"""The same tasks and the same sweep on a real Ray cluster of two workers."""

import os
import sys
from contextlib import closing
from functools import cache
from pathlib import Path

import pytest
import sweeps
from sweeps import design_of, facts_of, ray_meeting, ray_node_that_leaves, ray_task

from halfulp.errors import ConfigError, MissingExtraError, RunError
from halfulp.sweep.run import run_design
from halfulp.tasks import run_tasks

ray = pytest.importorskip("ray")


def test_a_cluster_that_is_not_there_is_named_with_its_cure(monkeypatch):
    """Whatever else runs on this machine: "auto" would find it, alive or dying."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", cache(lambda: frozenset()))
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda temp_dir: None)
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at 'auto'.*ray start --head"):
        list(run_tasks(ray_task, lambda: "a", ray="auto"))
    assert not ray.is_initialized()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense", "a:b"])
def test_an_address_without_a_cluster_is_named_at_once(address):
    with pytest.raises(ConfigError, match=f"no Ray cluster answers at '{address}'"):
        list(run_tasks(ray_task, lambda: "a", ray=address))
    assert not ray.is_initialized()


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"halfulp\[ray\]"):
        list(run_tasks(ray_task, lambda: "a", ray="auto"))


@pytest.fixture(scope="module")
def cluster():
    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    # Workers are given the environment of the cluster, and find the modules of this folder there.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
        made = Cluster(initialize_head=True, head_node_args=small | {"include_dashboard": False})
        made.second = made.add_node(**small)
    # One connection for all tests; workers that have imported torch are used again.
    ray.init(made.address, log_to_driver=False, logging_level="error")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def outcomes(cluster, tasks, function=ray_task, **options):
    left = list(tasks)
    return list(
        run_tasks(function, lambda: left.pop(0) if left else None, ray=cluster.address, **options)
    )


def test_one_that_dies_is_an_outcome(cluster):
    found = outcomes(cluster, ["a", "b", "exit", "c", "raise", "d"])
    by_task = {o.task: o for o in found}
    assert len(by_task) == len(found) == 6
    assert by_task["exit"].died == "ended (WorkerCrashedError)"
    assert isinstance(by_task["raise"].error, RunError)
    assert str(by_task["raise"].error) == "a wrong disk"
    assert all(by_task[task].value for task in "abcd")


def test_tasks_run_on_both_workers(cluster, tmp_path):
    assert len({o.value for o in outcomes(cluster, [tmp_path] * 2, ray_meeting)}) == 2


def test_as_many_tasks_as_jobs_run_at_a_time(cluster):
    (_, ended), (began, _) = sorted(o.value for o in outcomes(cluster, ["a", "b"], jobs=1))
    assert ended <= began


def test_tasks_that_no_node_has_room_for_are_named(cluster):
    with pytest.raises(ConfigError, match=r"has the 2 CPU that a task asks for; it has 2 nodes"):
        outcomes(cluster, ["a"], threads=2)
    with pytest.raises(ConfigError, match=r"1 CPU and 0\.25 of a GPU"):
        outcomes(cluster, ["a"], gpu_share=0.25)


def test_a_sweep_comes_to_what_the_local_one_does_though_a_worker_is_killed(
    cluster, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr("halfulp.sweep.run.run_cell", sweeps.killed_once)
    told: list[dict] = []
    table = run_design(whole.design, tmp_path / "sweep", ray=cluster.address, on_event=told.append)
    assert [e["message"] for e in told if e["event"] == "retry"] == [
        "its process ended (WorkerCrashedError)"
    ]
    assert facts_of(table.results) == facts_of(whole.results)


def test_workers_that_do_not_see_the_directory_send_their_files(
    cluster, whole, corpus, tmp_path, monkeypatch
):
    monkeypatch.setattr("halfulp.sweep.run.run_cell", sweeps.blind)
    design = design_of(corpus, lrs=[1e-3, 1e-2], seeds=2)
    table = run_design(design, tmp_path / "sweep", ray=cluster.address)
    assert facts_of(table.results) == facts_of(whole.results)
    for result in table.results:
        here, there = (
            sorted(p.name for p in (path / "runs" / result.id).iterdir())
            for path in (table.path, whole.path)
        )
        assert here == there


def test_tasks_of_a_node_that_leaves_are_outcomes_and_the_rest_goes_on(cluster, tmp_path):
    """The last test: the cluster has one worker from then on. That node leaves amid a task."""
    leaving, left = cluster.second.node_id, 4
    tasks = iter([(leaving, tmp_path)] * left)
    found = []
    with closing(
        run_tasks(ray_node_that_leaves, lambda: next(tasks, None), ray=cluster.address)
    ) as outcomes:
        for outcome in outcomes:
            if not found:
                cluster.remove_node(cluster.second)
            found.append(outcome)
    assert len(found) == left
    (died,) = [o for o in found if o.value is None]
    assert died.died.startswith("ended (")
    assert leaving not in {o.value for o in found}
