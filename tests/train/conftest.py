import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from halfulp.train.config import TrainConfig, load_config
from halfulp.train.tree import merge

WORDS = ["loss", "round", "off", "error", "step", "bit", "scale", "block", "norm", "head"]


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 24 small texts with something to learn in them."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    for i in range(24):
        text = " ".join(chance.choice(WORDS) for _ in range(600))
        (folder / f"{i}.txt").write_text(text)
    return folder


@pytest.fixture
def make_config(corpus, tmp_path) -> Callable[..., TrainConfig]:
    """A run of 12 steps of a model with two layers and 37 thousand parameters, under tmp_path."""
    base = {
        "model": {"preset": "llama-tiny", "hidden": 32},
        "data": {"source": [str(corpus)], "length": 32, "val_fraction": 0.1},
        "train": {
            "steps": 12,
            "rows": 2,
            "lr": 0.01,
            "eval_every": 4,
            "eval_batches": 2,
            "checkpoint_every": 4,
            "count_every": 6,
            "threads": 1,
            "device": "cpu",
        },
    }

    def make(name: str = "run", **sections: Any) -> TrainConfig:
        return load_config(merge(base, {"run": {"out": str(tmp_path / name)}}), sections)

    return make
