"""Results of sweeps as training would give them, for pages: no model is trained."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from halfulp.sweep.design import Design, make_design
from halfulp.sweep.result import Result
from halfulp.sweep.store import open_store
from halfulp.train.config import load_config

LRS = (1e-3, 3.2e-3, 1e-2, 3.2e-2, 1e-1)
INITIAL, UNIGRAM = 5.55, 3.2

# recipe → loss at its best learning rate, log2 of that rate against 1e-2, where it diverges
CURVES: Mapping[str, tuple[float, float, float]] = {
    "bf16_amp": (2.400, 0.0, math.inf),
    "te_current": (2.401, 0.0, math.inf),
    "fp8_unscaled": (2.620, -1.0, 2e-2),
    "mask_e4m7": (5.540, 0.0, 0.0),
    "mask_e8m2": (2.460, -0.3, math.inf),
    "mask_e8m2_nearest": (2.404, 0.0, math.inf),
}
ALIKE = (2.402, 0.0, math.inf)  # any other recipe
REFUSED = "nvfp4 takes blocks of 16; layers.0.qk.k_proj has 24 columns"


def design(recipes: Sequence[str] = tuple(CURVES), *, seeds: int = 3, lrs=LRS, **options) -> Design:
    config = load_config({"model": {"preset": "llama-tiny"}, "train": {"steps": 80}})
    return make_design(config, recipes=recipes, lrs=lrs, seeds=seeds, **options)


def results(made: Design, *, scatter: float = 0.002) -> list[Result]:
    """One result per cell, noise shared by the recipes of a seed, as pairs have it."""
    found = []
    for cell in made.cells():
        if cell.recipe == "nvfp4":
            found.append(_refused(cell))
            continue
        best, at, limit = CURVES.get(cell.recipe, ALIKE)
        noise = np.random.default_rng(cell.seed).normal(0, 0.03)
        own = np.random.default_rng([cell.seed, len(cell.recipe)]).normal(0, scatter)
        octaves = math.log2(cell.lr / 1e-2) - at
        loss = best + 0.012 * octaves**2 + noise + own
        found.append(_result(made, cell, loss, diverged=cell.lr > limit))
    return found


def _result(made: Design, cell, loss: float, *, diverged: bool) -> Result:
    steps = made.config.train.steps
    whole = Result(
        id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
        status="finished", steps=steps, planned_steps=steps, tokens=steps * 2048,
        parameters=135_000, seconds=4.0, wall_seconds=5.0, loss_nats=loss, loss_nats_fp32=loss,
        initial_nats=INITIAL, tail_nats=loss, best_nats=loss - 0.01, unigram_nats=UNIGRAM,
        sharpness=0.08 * (loss / 2.4) ** 8, sharpness_centered=0.07 * (loss / 2.4) ** 8, logz=0.4,
    )  # fmt: skip
    if not diverged:
        return whole
    if cell.recipe == "mask_e4m7":
        return replace(whole, loss_nats=5.54, tail_nats=5.54, best_nats=5.54)
    broken = {"status": "nonfinite", "message": "the loss at step 31 is not finite (layers.1.ffn)"}
    return replace(whole, **broken, steps=31, loss_nats=math.nan, loss_nats_fp32=math.nan)


def _refused(cell) -> Result:
    return Result(
        id=cell.id, recipe=cell.recipe, lr=cell.lr, seed=cell.seed, data=cell.data,
        status="refused", message=REFUSED,
    )  # fmt: skip


def write(path: Path, made: Design, found: Sequence[Result]) -> Path:
    store, _ = open_store(path, made, command=["halfulp", "sweep", "run.toml", "-o", path.name])
    for result in found:
        store.add(result)
    store.close()
    return path
