"""Critical sharpness: how far along its own update a model can go before the loss rises.

η_c is the smallest factor on the update direction d from which L(w + η d) ≥ L(w), and λ_c = 2 / η_c
(Kalra et al., arXiv:2601.16979). For a quadratic loss and d = −∇L it is the curvature along the
gradient, ∇ᵀH∇ / ‖∇‖². A run whose learning rate exceeds η_c overshoots.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, predict
from halfulp.errors import CheckError, NonFiniteError


@dataclass(frozen=True, kw_only=True)
class CriticalSharpness:
    """The step lies in `bracket`: the loss has not risen at its lower end and has at its upper.

    `step` is their geometric mean, and `sharpness` = 2 / step. An infinite step means that the loss
    never rose; a step of 0 that it rose at the shortest one tried.
    """

    step: float
    sharpness: float
    bracket: tuple[float, float]
    forwards: int
    loss_nats: float


@torch.no_grad()
def critical_sharpness(
    model: nn.Module,
    direction: Mapping[str, Tensor],
    batch: Batch,
    *,
    start: float,
    forwards: int = 6,
    loss: Callable[[], float] | None = None,
) -> CriticalSharpness:
    """Search η_c from `start`, the learning rate in use, with `forwards` passes of `batch`.

    `direction`: parameter name → what a learning rate of 1 would add to it (for AdamW −m̂ /
    (√v̂ + ε)); parameters that it leaves out stay. Steps double or halve until the loss changes
    sides, then halve the bracket on a logarithmic scale. `loss` replaces the mean cross entropy of
    `batch`. Weights come back with the bits that they had.

    CheckError for names or shapes that the model does not have, NonFiniteError where the direction
    is not finite, or the loss before any step.
    """
    named = dict(model.named_parameters())
    moved = {n: (p, direction[n], p.detach().clone()) for n, p in named.items() if n in direction}
    _check(named, direction, start, forwards)
    measure = loss or (lambda: _loss(model, batch))

    def at(eta: float) -> float:
        for p, d, before in moved.values():
            p.copy_(torch.add(before, d.to(before), alpha=eta))
        return measure()

    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        here = measure()
        if not math.isfinite(here):
            raise NonFiniteError(f"the loss is {here} before any step. Give another batch.")
        # A loss that is not finite has risen.
        low, high = _search(lambda eta: not at(eta) <= here, start, forwards - 1)
    finally:
        for p, _, before in moved.values():
            p.copy_(before)
        for module, mode in modes:
            module.training = mode
    step = math.inf if high == math.inf else math.sqrt(low * high)
    return CriticalSharpness(
        step=step,
        sharpness=2 / step if step else math.inf,
        bracket=(low, high),
        forwards=forwards,
        loss_nats=here,
    )


def adam_direction(
    checkpoint: str | Path, *, betas: tuple[float, float], eps: float
) -> dict[str, Tensor]:
    """The direction of the last update of a run: −m̂ / (√v̂ + ε), without weight decay.

    From the optimizer's state in a checkpoint of `halfulp train`, with the betas and eps of its
    [train] section. CheckError if there is none.
    """
    from safetensors.torch import load_file

    file = Path(checkpoint) / "optimizer.safetensors"
    if not file.is_file():
        raise CheckError(f"{file} does not exist. Give a checkpoint of `halfulp train`.")
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(file).items():
        name, _, field = key.rpartition("/")
        states.setdefault(name, {})[field] = tensor
    return {name: _adam(s, betas, eps) for name, s in states.items() if "v" in s}


def _adam(state: Mapping[str, Tensor], betas: tuple[float, float], eps: float) -> Tensor:
    rests = [1 - beta ** int(state["step"]) for beta in betas]
    m, v = state["m"].float() / rests[0], state["v"].float() / rests[1]
    return -m / (v.sqrt() + eps)


def _search(rises: Callable[[float], bool], start: float, calls: int) -> tuple[float, float]:
    """(largest step known not to raise the loss, smallest known to), in `calls` tries."""
    low, high, eta = 0.0, math.inf, start
    for _ in range(calls):
        if rises(eta):
            high = eta
        else:
            low = eta
        if low == 0:
            eta = high / 2
        elif high == math.inf:
            eta = low * 2
        else:
            eta = math.sqrt(low * high)
    return low, high


def _loss(model: nn.Module, batch: Batch) -> float:
    predictions = predict(model, batch)
    return nn.functional.cross_entropy(predictions.logits_NV.float(), predictions.targets_N).item()


def _check(
    named: Mapping[str, Tensor], direction: Mapping[str, Tensor], start: float, forwards: int
) -> None:
    shapes = {name: p.shape for name, p in named.items()}
    unknown = [n for n, d in direction.items() if shapes.get(n) != getattr(d, "shape", None)]
    if unknown or not direction:
        raise CheckError(
            f"the direction has {len(unknown)} tensors that fit no parameter, "
            f"{', '.join(unknown[:3]) or 'and none that does'}. Give name → tensor of the "
            "parameter's shape, as model.named_parameters() names them."
        )
    for name, d in direction.items():
        if not bool(torch.isfinite(d).all()):
            raise NonFiniteError(
                f"the direction of {name} holds inf or NaN. Take that of an update before the run "
                "diverged."
            )
    if forwards < 3 or not 0 < start < math.inf:
        raise CheckError(
            f"forwards = {forwards} and start = {start} give no bracket. Give 3 or more and the "
            "learning rate in use."
        )
