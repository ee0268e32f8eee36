"""AdamW in numpy fp32, one operation at a time, with the weight rounded by the grid oracle."""

import math
from dataclasses import dataclass

import numpy as np

from oracles.grids import F32, Grid, round_array
from oracles.hashing import fold, key_of, words_at


@dataclass
class AdamWOracle:
    """One parameter: fp32 weight, m and v; `grid` None keeps the weight in fp32."""

    w: np.ndarray
    name: str
    grid: Grid | None = None
    rounding: str = "nearest"
    seed: int = 0
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        self.m, self.v, self.t = np.zeros_like(self.w), np.zeros_like(self.w), 0

    def step(self, g: np.ndarray) -> None:
        """Moments, decoupled decay, bias-corrected update, rounding."""
        self.t += 1
        beta1, beta2 = self.betas
        self.m = self.m + (g - self.m) * F32(1 - beta1)
        self.v = self.v * F32(beta2) + (g * g) * F32(1 - beta2)
        root = np.sqrt(self.v) * F32(1 / math.sqrt(1 - beta2**self.t)) + F32(self.eps)
        update = self.m / root * F32(self.lr / (1 - beta1**self.t))
        new = self.w * F32(1 - self.lr * self.weight_decay) - update
        self.w = new if self.grid is None else self._rounded(new)

    def _rounded(self, new: np.ndarray) -> np.ndarray:
        assert self.grid is not None
        key = fold(key_of(self.seed, f"{self.name}/update"), self.t)
        words = words_at(key, 0, new.size).reshape(new.shape)
        return round_array(new, self.grid, self.rounding, False, words).astype(F32)
