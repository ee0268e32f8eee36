"""Training in processes of its own: to be killed, or to share the work."""

import multiprocessing
import os
import socket
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["transformers.models.llama.modeling_llama", "halfulp.train.loop"])


def start(task, *arguments) -> BaseProcess:
    """Run `task(*arguments)` in a new process."""
    process = CONTEXT.Process(target=task, args=arguments, daemon=True)
    process.start()
    return process


def train_or_resume(raw: dict, path: Path) -> None:
    """Train the configuration `raw` at `path`, from its last checkpoint if it was begun."""
    from halfulp.train.config import load_config
    from halfulp.train.loop import config_of, train

    if (path / "config.toml").exists():
        train(config_of(path), resume=path)
    else:
        train(load_config(raw))


def train_together(raw: dict, size: int = 2, resume: Path | None = None) -> None:
    """Train `raw` with `size` processes, as torchrun would start them; raises if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = CONTEXT.SimpleQueue()
    ranks = [start(_rank, raw, rank, size, port, resume, queue) for rank in range(size)]
    for process in ranks:
        process.join(60)
    problems = "" if queue.empty() else queue.get()
    for process in ranks:
        if process.is_alive():
            process.kill()
            problems += "a process hangs"
    assert not problems, problems
    assert [process.exitcode for process in ranks] == [0] * size


def _rank(raw: dict, rank: int, size: int, port: int, resume: Path | None, queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        from halfulp.train.config import load_config
        from halfulp.train.loop import train

        train(load_config(raw), resume=resume)
    except BaseException:
        queue.put(f"rank {rank}:\n{traceback.format_exc()}")
        raise
