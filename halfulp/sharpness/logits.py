"""Sharpness of the loss in the space of the logits, in closed form, and log Z beside it.

Keskar et al. (arXiv:1609.04836, metric 2.1) on a vector x: φ = 100 (max f(x + z) − f(x)) / (1 +
f(x)) over the box |z_i| ≤ ε (|x_i| + 1). Lee et al. (arXiv:2405.18710) take the logits y of a
position for x and cross entropy with target t for f. Its derivative is p_i ≥ 0 in every other
logit and p_t − 1 ≤ 0 in the target's, all over the box: the maximum is the corner with y_t down
and all others up, and needs no search.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from halfulp.errors import ConfigError

EPS = 5e-4  # the smaller of the two in Keskar et al.
TOKENS = ("all", "last")
_CHUNK = 1 << 18  # logits at a time, to stay in the cache


@dataclass(frozen=True, kw_only=True)
class LogitsState:
    """Means over positions, fp64.

    * `sharpness`: φ in percent. It moves with a constant added to all logits, which changes
      neither loss nor model; `sharpness_centered` is φ of the logits minus their mean, and stays.
    * `logz`: log Σ exp(y), 0 for logits that are log-probabilities; its growth is drift.
    """

    sharpness: float
    sharpness_centered: float
    logz: float
    loss_nats: float
    positions: int

    def fields(self) -> dict[str, float]:
        """What an event records."""
        return {name: value for name, value in vars(self).items() if name != "loss_nats"}


def logits_sharpness(
    logits: Tensor,
    targets: Tensor,
    *,
    eps: float = EPS,
    tokens: str = "all",
    center: bool = False,
) -> float:
    """φ in percent of logits [..., V] with `targets` [...], exact.

    `tokens`: "all", or "last" for the last position of each sequence [..., T, V], as Lee et al.
    measure it (T times fewer values, the same mean only where positions are alike). `center`: of
    the logits minus their mean. ConfigError for eps ≤ 0, other `tokens` or shapes that do not fit.
    """
    if tokens not in TOKENS:
        raise ConfigError(f"tokens = {tokens!r} does not exist. Give one of {', '.join(TOKENS)}.")
    if tokens == "last":
        if logits.ndim < 3:
            raise ConfigError(
                f"tokens = 'last' needs logits [sequences, positions, V]; got "
                f"{tuple(logits.shape)}. Give tokens='all' for a flat list of positions."
            )
        logits, targets = logits[..., -1, :], targets[..., -1]
    state = logits_state(logits, targets, eps=eps)
    return state.sharpness_centered if center else state.sharpness


def logits_state(logits: Tensor, targets: Tensor, *, eps: float = EPS) -> LogitsState:
    """Sharpness, centered sharpness, log Z and loss of logits [..., V] with `targets` [...].

    Works in fp32, or in fp64 for fp64 logits; nothing is kept for a backward pass.
    """
    return state_of(logits_sums(logits, targets, eps=eps))


@torch.no_grad()
def logits_sums(logits: Tensor, targets: Tensor, *, eps: float = EPS) -> Tensor:
    """Sums [5] over positions, fp64, that add over batches and processes; see `state_of`."""
    if logits.shape[:-1] != targets.shape or targets.numel() == 0 or not eps > 0:
        raise ConfigError(
            f"logits {tuple(logits.shape)}, targets {tuple(targets.shape)} and eps = {eps} do not "
            "fit. Give logits [..., V], one target per position, at least one, and eps above 0."
        )
    flat_NV, flat_N = logits.reshape(-1, logits.shape[-1]), targets.reshape(-1, 1)
    rows = max(1, _CHUNK // flat_NV.shape[1])
    sums = torch.zeros(5, dtype=torch.float64, device=logits.device)
    for y_NV, t_N1 in zip(flat_NV.split(rows), flat_N.split(rows), strict=True):
        sums += _sums(y_NV if y_NV.dtype == torch.float64 else y_NV.float(), t_N1, eps)
    return sums


def state_of(sums: Tensor) -> LogitsState:
    """The means that `logits_sums`, or a total of several, stand for."""
    loss, rise, rise_centered, logz, n = sums.tolist()
    return LogitsState(
        sharpness=100 * rise / (n + loss),
        sharpness_centered=100 * rise_centered / (n + loss),
        logz=logz / n,
        loss_nats=loss / n,
        positions=round(n),
    )


def _sums(y_NV: Tensor, t_N1: Tensor, eps: float) -> Tensor:
    logp_NV = y_NV.log_softmax(-1)
    logp_N1 = logp_NV.gather(-1, t_N1)
    logz_N1 = y_NV.gather(-1, t_N1) - logp_N1
    p_NV = logp_NV.exp_()
    rises = [_rise(y, p_NV, t_N1, eps) for y in (y_NV, y_NV - y_NV.mean(-1, keepdim=True))]
    count = torch.tensor(len(y_NV), dtype=torch.float64, device=y_NV.device)
    means = [-logp_N1.sum(dtype=torch.float64), *rises, logz_N1.sum(dtype=torch.float64)]
    return torch.stack([*means, count])


def _rise(y_NV: Tensor, p_NV: Tensor, t_N1: Tensor, eps: float) -> Tensor:
    """Σ over positions of F(y + z) − F(y) = log(Σ p_i exp(z_i)) − z_t: no difference of losses."""
    r_NV = y_NV.abs().add_(1).mul_(eps)
    r_N = r_NV.gather(-1, t_N1).squeeze(-1)
    p_N = p_NV.gather(-1, t_N1).squeeze(-1)
    grown_N = (r_NV.expm1_() * p_NV).sum(-1) + p_N * (torch.expm1(-r_N) - torch.expm1(r_N))
    return (grown_N.log1p() + r_N).sum(dtype=torch.float64)
