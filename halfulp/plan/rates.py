"""Learning rate and batch size for a run, by published laws that do not agree."""

import math
from dataclasses import dataclass

from halfulp.plan.laws import load_law


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Peak learning rate of AdamW, and tokens per optimizer step, by one law."""

    law: str
    lr: float
    batch_tokens: float


def steplaw(n: float, d: float) -> Rates:
    """Li et al. 2025, arXiv:2503.04715: from parameters and tokens."""
    c = load_law("steplaw").coefficients
    lr = c["c_lr"] * n ** c["x_N"] * d ** c["x_D"]
    return Rates(law="steplaw", lr=lr, batch_tokens=c["c_batch"] * d ** c["x_batch"])


def deepseek(flops: float) -> Rates:
    """DeepSeek-AI 2024, arXiv:2401.02954: from the training compute alone."""
    c = load_law("deepseek").coefficients
    return Rates(
        law="deepseek",
        lr=c["c_lr"] * flops ** c["x_lr"],
        batch_tokens=c["c_batch"] * flops ** c["x_batch"],
    )


def between(rates: tuple[Rates, ...]) -> tuple[float, float]:
    """The geometric means of the learning rates and of the batches: halfway between two laws."""
    count = len(rates)
    lr = math.prod(r.lr for r in rates) ** (1 / count)
    return lr, math.prod(r.batch_tokens for r in rates) ** (1 / count)
