"""Updates that the device itself withholds, so that no step waits for it."""

import math
from typing import Any

import torch
from torch import Tensor

from halfulp.guard.detect import ACTIVE, Detector


def why_waiting(optimizer: torch.optim.Optimizer, scaler: Any) -> str:
    """Why the host has to wait for the device in each step; "" if the device can withhold."""
    able = getattr(optimizer, "_step_supports_amp_scaling", False)
    if able and scaler is None:
        return ""
    why = "a GradScaler is used" if able else f"{type(optimizer).__name__} is not fused"
    return (
        f"each step waits once for the GPU, because {why}; torch.optim.AdamW(…, fused=True) "
        "without a GradScaler need not"
    )


def withhold(optimizer: torch.optim.Optimizer, held: Tensor) -> None:
    """Let a fused optimizer skip its next step where `held`: as a GradScaler tells it."""
    vars(optimizer)["found_inf"] = held.float()


def allow(optimizer: torch.optim.Optimizer) -> None:
    """Undo `withhold`."""
    vars(optimizer).pop("found_inf", None)


def abnormal(detector: Detector, loss: Tensor, square: Tensor) -> Tensor:
    """Whether a step is not finite or a spike, on the device; `square` of the gradient norm."""
    z = []
    for window, value in ((detector.loss, loss), (detector.norm, square.log() / 2)):
        active = len(window.values) >= ACTIVE
        middle, spread = window.scale() if active else (0.0, math.inf)
        z.append((value - middle) / spread)
    finite = torch.isfinite(loss) & torch.isfinite(square)
    return ~finite | detector.is_spike(*z)


def sent(values: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the CPU, and the event after which it is complete."""
    if values.device.type != "cuda":
        return values.clone(), None
    copied = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copied.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copied, event
