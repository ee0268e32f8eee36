"""Small byte models trained by `halfulp train` on the standard library; kept in the user's cache.

The two models of the round-off study (GPT-2 and Llama style: d = 128, T = 128) and a Qwen3, in two
sizes: "small" (2 layers, 250 steps, tens of seconds) and "full" (6 layers, 1000 steps, minutes).
"""

import fcntl
import hashlib
import json
import multiprocessing
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.data import open_data
from halfulp.numerics.kernel import cache_directory
from halfulp.train.config import TrainConfig, load_config

LENGTH = 128
SIZES = {"small": (2, 250, 8), "full": (6, 1000, 8)}  # layers, steps, rows of a step
_COMMON = {"vocab_size": 257, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
_LLAMA = {
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 344,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {
        "n_embd": 128,
        "n_head": 4,
        "n_inner": 512,
        "n_positions": 1024,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "llama": _LLAMA,
    "qwen3": _LLAMA | {"tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Toy:
    """A trained model in eval mode and held-out text: `batch(n)` gives token ids [n, 128]."""

    name: str
    model: nn.Module
    config: TrainConfig

    def batch(self, rows: int, *, index: int = 0) -> Tensor:
        data = open_data(self.config.data.corpus(), cache_directory() / "data")
        ids = data.batch("val", index, rows=rows, length=LENGTH, seed=1)
        return ids[:, :LENGTH]


def toy(family: str, size: str = "small") -> Toy:
    """The trained model, from the cache or trained here and kept there."""
    layers, steps, rows = SIZES[size]
    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    shape = {"model_type": family, depth: layers, **_COMMON, **SHAPES[family]}
    settings = {
        "data": {"length": LENGTH, "max_tokens": 4_000_000},
        "train": {
            "steps": steps,
            "rows": rows,
            "lr": 2e-3,
            "eval_every": 0,
            "checkpoint_every": 0,
            "keep": 1,
            "count_every": 0,
        },
    }
    key = hashlib.sha256(json.dumps([shape, settings], sort_keys=True).encode()).hexdigest()[:12]
    home = cache_directory() / "toys" / f"{family}-{size}-{key}"
    with _only_one(home):
        config = _config(home, shape, settings)
        if not list(home.glob("run/checkpoints/*/model.safetensors")):
            _train(config)
    return Toy(f"{family}-{size}", _load(home), config)


def prepare(*families: str, size: str) -> None:
    """Train the toys that are missing side by side, one process each."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(len(families), mp_context=context) as pool:
        list(pool.map(_prepare, families, [size] * len(families)))


def _prepare(family: str, size: str) -> None:
    toy(family, size)


def _train(config: TrainConfig) -> None:
    """On one thread, so that the same machine always makes the same toy."""
    from halfulp.train.loop import train

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        train(config, force=True, command=("reproduce", "toy"))
    finally:
        torch.set_num_threads(threads)


def untrained(family: str, *, layers: int = 2, seed: int = 0) -> nn.Module:
    """A model of the same shape with random weights, in eval mode."""
    from halfulp.train.config import ModelConfig
    from halfulp.train.model import build_model

    depth = "n_layer" if family == "gpt2" else "num_hidden_layers"
    shape = {"model_type": family, depth: layers, **_COMMON, **SHAPES[family]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(shape), encoding="utf-8")
        model = build_model(ModelConfig(preset=str(path)), vocab=257, length=LENGTH, seed=seed)
    return model.model.eval()


def _config(home: Path, shape: dict[str, Any], settings: dict[str, Any]) -> TrainConfig:
    path = home / "shape" / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(shape), encoding="utf-8")
    run = {"model": {"preset": str(path)}, "run": {"out": str(home / "run")}}
    run |= {"guard": {"on": False}}
    return load_config(settings | run)


def _load(home: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder = sorted(home.glob("run/checkpoints/*/model.safetensors"))[-1].parent
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype=torch.float32
    )
    return loaded.eval()


@contextmanager
def _only_one(home: Path) -> Iterator[None]:
    """Other processes that want the same model wait until it is there."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
