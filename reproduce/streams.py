"""Changes to a running model: scaled sublayers, a rounded residual stream, rounded scores."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Round = Callable[[Tensor], Tensor]


@contextmanager
def residual(model: nn.Module, *, scale: float = 1.0, store: Round | None = None) -> Iterator[None]:
    """Both sublayer outputs of every layer times `scale`; the stream stored as `store` says."""
    handles, body = [], _layers(model)
    stream: dict[str, Tensor] = {}

    def begin(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        x = args[0]
        stream["x"] = x if store is None or stream else store(x)
        return (stream["x"], *args[1:])

    def sublayer(_: nn.Module, __: Any, output: Any) -> Any:
        y = (output[0] if isinstance(output, tuple) else output) * scale
        if store is not None:
            # x + (stored − x) is the stored sum: both are on the grid.
            total = store(stream["x"] + y)
            y, stream["x"] = total - stream["x"], total
        return (y, *output[1:]) if isinstance(output, tuple) else y

    for layer in body:
        handles.append(layer.register_forward_pre_hook(begin))
        for name in ("attn", "self_attn", "mlp"):
            if hasattr(layer, name):
                handles.append(getattr(layer, name).register_forward_hook(sublayer))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


Recompute = Callable[[Tensor], Tensor]  # probabilities → which scores are computed exactly


@contextmanager
def rounded_scores(rounding: Round, recompute: Recompute | None = None) -> Iterator[list[float]]:
    """Attention scores rounded before the softmax, but for those that `recompute` selects.

    Yields a list that collects the recomputed share of each call. Needs eager attention.
    """
    shares: list[float] = []
    original = nn.functional.softmax

    def softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        hidden = x < -1e30
        low = torch.where(hidden, x, rounding(x))
        if recompute is not None:
            keep = recompute(original(low, -1)) & ~hidden
            shares.append((keep.sum() / (~hidden).sum()).item())
            low = torch.where(keep, x, low)
        return original(low, *args, **kwargs)

    nn.functional.softmax = softmax
    try:
        yield shares
    finally:
        nn.functional.softmax = original


def few_scores(tau: float) -> Recompute:
    """LAMP's rule: the largest p (1 − p) of each row until the rest adds up to at most `tau`."""

    def select(p: Tensor) -> Tensor:
        weight = p * (1 - p)
        order = weight.argsort(-1, descending=True)
        sorted_weight = weight.gather(-1, order)
        left = sorted_weight.flip(-1).cumsum(-1).flip(-1)  # what stays if this one stays
        return torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, left > tau)

    return select


def random_scores(tau: float, generator: torch.Generator) -> Recompute:
    """As many scores of each row as LAMP recomputes, at random among those that matter."""
    choose = few_scores(tau)

    def select(p: Tensor) -> Tensor:
        count = choose(p).sum(-1, keepdim=True)
        noise = torch.rand(p.shape, generator=generator).masked_fill(p == 0, -1.0)
        rank = noise.argsort(-1, descending=True).argsort(-1)
        return rank < count

    return select
