"""What depends on the step alone: the learning rate and the stage of precision."""

import math
from collections.abc import Sequence

from halfulp.train.config import Stage, TrainSection


def warmup_steps(train: TrainSection) -> int:
    """Length of the warm-up in steps; `warmup` below 1 is a share of the run, rounded up."""
    return math.ceil(train.warmup * train.steps) if train.warmup < 1 else int(train.warmup)


def lr_at(
    step: int,
    train: TrainSection,
    ratio: float = 1.0,
    *,
    stretch: bool = True,
    scaled: bool = False,
) -> float:
    """Learning rate of the 0-based `step`, of a block with this ratio to `lr`.

    Linear warm-up that never gives 0, then "constant", "cosine" down to `min_lr` × `lr`, or "wsd":
    constant until the last share `decay` of the run, then linear down to `min_lr` × `lr`.

    The peak is `ratio` × `lr`. `stretch`: the warm-up lasts `ratio` times longer, so that all
    blocks rise alike. The floor is one for all blocks, or `scaled` by the ratio.
    """
    warmup = warmup_steps(train) * (ratio if stretch else 1.0)
    if step < warmup:
        return train.lr * ratio * min(step + 1, warmup) / warmup
    floor = train.min_lr * (ratio if scaled else 1.0)
    return train.lr * (floor + (ratio - floor) * _fall(step, warmup, train))


def _fall(step: int, warmup: float, train: TrainSection) -> float:
    if train.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * _share(step, warmup, train.steps)))
    if train.schedule == "wsd":
        start = max(warmup, train.steps - math.ceil(train.decay * train.steps))
        return 1 - _share(step, start, train.steps)
    return 1.0


def _share(step: int, start: float, steps: int) -> float:
    # The last step, steps - 1, reaches the end of the fall.
    return min(1.0, max(0.0, (step - start) / max(1, steps - 1 - start)))


def stage_at(step: int, steps: int, schedule: Sequence[Stage]) -> int:
    """Index of the stage of the 0-based `step`; len(schedule) after the last stage."""
    return sum(step >= stage.last_step(steps) for stage in schedule)
