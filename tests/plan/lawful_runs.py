"""Runs that follow a law exactly, but for a given scatter of their loss."""

import numpy as np

from halfulp.plan.chinchilla import Chinchilla, chinchilla
from halfulp.plan.runs_table import Runs

SIZES, LENGTHS = np.geomspace(1e7, 1e9, 6), np.geomspace(2e8, 2e10, 7)


def truth() -> Chinchilla:
    return chinchilla("epoch")


def grid(scatter: float = 0.0, seed: int = 0) -> Runs:
    """42 runs, 6 sizes × 7 lengths; `scatter` is the standard deviation of ln L."""
    n, d = (x.ravel() for x in np.meshgrid(SIZES, LENGTHS, indexing="ij"))
    noise = scatter * np.random.default_rng(seed).standard_normal(n.size)
    loss = np.asarray(truth().loss(n, d)) * np.exp(noise)
    return Runs(parameters=n, tokens=d, loss_nats=loss)
