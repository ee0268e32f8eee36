"""Training in processes of its own: to be killed, or to share the work."""

import multiprocessing
import os
import signal
import socket
import traceback
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

from halfulp.errors import HalfulpError
from halfulp.guard.faults import Fault

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.models.llama.modeling_llama", "halfulp.train.loop"])


def start(task, *arguments) -> BaseProcess:
    """Run `task(*arguments)` in a new process."""
    process = CONTEXT.Process(target=task, args=arguments, daemon=True)
    process.start()
    return process


def train_or_resume(raw: dict, path: Path, faults=()) -> None:
    """Train the configuration `raw` at `path`, from its last checkpoint if it was begun."""
    from halfulp.train.config import load_config
    from halfulp.train.loop import config_of, train

    if (path / "config.toml").exists():
        train(config_of(path), resume=path, faults=faults)
    else:
        train(load_config(raw), faults=faults)


def train_together(
    raw: dict, size: int = 2, resume: Path | None = None, prepare=None, faults=()
) -> list[str]:
    """Train `raw` with `size` processes, as torchrun would start them.

    Each calls `prepare(rank)` first and has the same `faults`. The reason or the HalfulpError of
    each process, by rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = CONTEXT.SimpleQueue()
    more = (size, port, resume, prepare, queue, faults)
    ranks = [start(_rank, raw, rank, *more) for rank in range(size)]
    for process in ranks:
        process.join(120)
        if process.is_alive():
            process.kill()
    said = dict(queue.get() for _ in ranks if not queue.empty())
    assert len(said) == size, f"a process hangs or died: {said}"
    return [said[rank] for rank in range(size)]


def _rank(
    raw: dict, rank: int, size: int, port: int, resume: Path | None, prepare, queue, faults=()
) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        from halfulp.train.config import load_config
        from halfulp.train.loop import train

        if prepare is not None:
            prepare(rank)
        queue.put((rank, train(load_config(raw), resume=resume, faults=faults).reason))
    except HalfulpError as error:
        queue.put((rank, f"{type(error).__name__}: {error}"))
    except BaseException:
        queue.put((rank, traceback.format_exc()))


@dataclass
class OnRank1(Fault):
    """`fault` hits the copy of the model that rank 1 holds, and no other."""

    fault: Fault | None = None

    def damage(self, model, handle, optimizer) -> None:
        if self.fault is not None and os.environ["RANK"] == "1":
            self.fault.damage(model, handle, optimizer)


@dataclass
class Killed(Fault):
    """The process is killed."""

    def damage(self, model, handle, optimizer) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def poison_rank_1(rank: int) -> None:
    """From the fifth forward pass on, the FFN of layer 1 overflows on rank 1 alone."""
    from halfulp.train import step
    from halfulp.train.model import next_token_loss

    calls = [0]

    def loss(model, batch_BT):
        calls[0] += 1
        if rank == 1 and calls[0] == 5:
            inner = getattr(model, "module", model).get_submodule("model.layers.1.mlp.up_proj")
            inner.register_forward_hook(lambda module, inputs, output: output / 0.0)
        return next_token_loss(model, batch_BT)

    step.next_token_loss = loss


def stop_rank_1(rank: int) -> None:
    """Rank 1 alone receives SIGTERM in its fifth forward pass."""
    from halfulp.train import step
    from halfulp.train.model import next_token_loss

    calls = [0]

    def loss(model, batch_BT):
        calls[0] += 1
        if rank == 1 and calls[0] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return next_token_loss(model, batch_BT)

    step.next_token_loss = loss


def watch_together(store: str) -> list[list[float]]:
    """Traces of a SharpnessMonitor on a DDP model of two processes, one micro-batch each."""
    queue = CONTEXT.SimpleQueue()
    ranks = [start(_watch, rank, store, queue) for rank in range(2)]
    for process in ranks:
        process.join(60)
        if process.is_alive():
            process.kill()
    return [queue.get() for _ in ranks if not queue.empty()]


def _watch(rank: int, store: str, queue) -> None:
    import torch
    import torch.distributed as dist

    from halfulp.sharpness.noise import SharpnessMonitor

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        model, batches = watched_model()
        shared = torch.nn.parallel.DistributedDataParallel(model)
        monitor = SharpnessMonitor(shared)
        shared(input_ids=batches[rank], labels=batches[rank]).loss.backward()
        monitor.on_microbatch(batches[rank].numel() - len(batches[rank]))
        monitor.on_step()
        queue.put(monitor.report().traces[0].tolist())
    finally:
        del shared, monitor
        dist.destroy_process_group()


def watched_model():
    """A small model and a micro-batch for each of two processes."""
    import torch

    from halfulp.train.config import ModelConfig
    from halfulp.train.model import build_model

    model = build_model(ModelConfig(preset="gpt2-tiny"), vocab=64, length=16, seed=0).model
    generator = torch.Generator().manual_seed(2)
    return model, [torch.randint(0, 64, (3, 16), generator=generator) for _ in range(2)]
