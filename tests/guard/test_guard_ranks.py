"""The guard around a loop in two processes: the same decisions everywhere, from reduced values."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from own_loops import act_early, batches, loss_of, model_trained, noise

import halfulp

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.models.llama.modeling_llama", "halfulp.train.loop"])


def together(mode: str, fault: str, folder: Path) -> list[dict]:
    """What each of two processes has found."""
    processes = [
        CONTEXT.Process(target=_rank, args=(mode, fault, rank, folder, sys.path), daemon=True)
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(600)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def _rank(mode: str, fault: str, rank: int, folder: Path, path: list[str]) -> None:
    sys.path[:] = path
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        with pytest.MonkeyPatch.context() as patch:
            act_early(patch)
            torch.save(_loop(mode, fault, rank), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _loop(mode: str, fault: str, rank: int) -> dict:
    torch.set_num_threads(1)
    bare = model_trained()
    halfulp.quantize(bare, "te_delayed")
    model = _shared(bare, mode)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    events: list[dict] = []
    guard = halfulp.Guard(model, optimizer, log=events.append, snapshot_every=5)
    answers, data = [], batches(32, seed=rank + 1)
    for step, batch in enumerate(data, 1):
        if step == 30 and fault == "bad batch" and rank == 1:
            batch = noise()  # one process alone gets it
        if step == 30 and fault == "weight":
            with torch.no_grad():
                bare.get_parameter("lm_head.weight").mul_(8)
        loss = loss_of(model, batch)
        loss.backward()
        answers.append(guard.step(loss))
        if answers[-1]:
            optimizer.step()
        optimizer.zero_grad()
        if not answers[-1]:
            kept = {n: _whole(p) for n, p in bare.named_parameters()}
    assert len(guard.incidents) == 1, guard.incidents
    incident = guard.incidents[0]
    return {
        "answers": answers,
        "verdict": incident.verdict.kind,
        "action": incident.action,
        "to": incident.step,
        "logged": len(events),
        "kept": kept,
        "weights": {n: _whole(p) for n, p in bare.named_parameters()},
    }


def _shared(model, mode: str):
    if mode == "ddp":
        return torch.nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def _whole(p: torch.Tensor) -> torch.Tensor:
    full = getattr(p, "full_tensor", None)
    return (full() if full else p).detach().clone()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mode", "fault", "action"),
    [
        ("ddp", "bad batch", "skip"),
        ("fsdp2", "weight", "roll back"),
        pytest.param("ddp", "weight", "roll back", marks=SLOW),
        pytest.param("fsdp2", "bad batch", "skip", marks=SLOW),
    ],
)
def test_both_processes_decide_alike(mode, fault, action, tmp_path):
    a, b = together(mode, fault, tmp_path)
    assert a["answers"] == b["answers"] == [step != 30 for step in range(1, 33)]
    assert a["action"] == b["action"] == action
    assert a["verdict"] == b["verdict"]
    assert (a["logged"], b["logged"]) == (1, 0)
    assert all(torch.equal(a["weights"][n], b["weights"][n]) for n in a["weights"])
    if action == "roll back":
        assert a["to"] == b["to"] < 30
        most = model_trained().get_parameter("lm_head.weight").abs().max()
        assert a["kept"]["lm_head.weight"].abs().max() < 2 * most
