"""A hill climber that looks for the inputs with the largest error relative to the bound."""

from collections.abc import Callable

import torch
from torch import Tensor

from halfulp.check.arithmetic import Bounded

Case = tuple[Tensor, Bounded]  # what was computed, and what was promised


def ratios(case: Case) -> Tensor:
    """|computed − reference| over the bound, flattened per row; 0 where nothing was promised."""
    computed, bound = case
    off = (computed - bound.value).abs()
    ratio = torch.where(bound.error.isfinite() & (bound.error > 0), off / bound.error, 0.0)
    return ratio.nan_to_num(nan=torch.inf).flatten(1)


def climb(
    evaluate: Callable[[Tensor], Case],
    start: Tensor,
    grid: Callable[[Tensor], Tensor],
    *,
    steps: int,
    generator: torch.Generator,
) -> float:
    """The largest ratio found from `start` [chains, n], each chain keeping what raises its own."""
    x = grid(start)
    best = ratios(evaluate(x)).amax(1)
    for step in range(steps):
        size = 2.0 ** -(1 + 9 * torch.rand(len(x), 1, generator=generator, dtype=torch.float64))
        move = torch.randn(x.shape, generator=generator, dtype=torch.float64) * size
        if step % 2:
            keep = torch.rand(x.shape, generator=generator) < 2 / x.shape[1]
            move = torch.where(keep, move * 4, 0.0)
        trial = grid(x * (1 + move) if step % 3 else x + move)
        score = ratios(evaluate(trial)).amax(1)
        better = (score > best) & trial.isfinite().all(1)
        x, best = torch.where(better[:, None], trial, x), torch.where(better, score, best)
    return best.max().item()
