"""The reference run: what the model says in its own precision, and how far another run is off."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from halfulp.errors import CheckError

_ROWS = 256  # rows of logits that are held in fp64 at a time
ALTERNATIVES = 16


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Logits [N, V] of the N positions that count, and what follows from them.

    `margins` fp64 [N, 15]: logit of the first choice minus those of the next ones.
    `entropy` is the mean entropy in nats/token.
    """

    logits: Tensor
    margins: Tensor
    entropy: float

    @property
    def tokens(self) -> int:
        return self.logits.shape[0]

    @property
    def median_margin(self) -> float:
        return self.margins[:, 0].median().item()

    def loss(self, targets: Tensor) -> float:
        """Mean cross entropy in nats/token of `targets`, int [N]."""
        total = 0.0
        for a, t in zip(self.logits.split(_ROWS), targets.split(_ROWS), strict=True):
            total += -log_softmax(a).gather(1, t[:, None]).sum().item()
        return total / self.tokens


@dataclass(frozen=True, kw_only=True)
class Distance:
    """How far a run is from the reference: KL in nats/token, share of changed first choices."""

    kl: float
    flips: float
    kl_tokens: Tensor  # fp64 [N]
    margin_variance: float  # mean square change of the reference's top-2 margin


def log_softmax(logits: Tensor) -> Tensor:
    """In fp64: computed in fp32, KL has a noise floor of 6e-8 and turns negative."""
    return logits.double().log_softmax(-1)


def reference_of(logits: Tensor, keep: Tensor | None = None) -> Reference:
    """The reference that `logits` [..., V] are; `keep` bool [...] selects positions.

    Raises CheckError for logits that are not finite.
    """
    rows = _rows(logits, keep)
    if len(rows) < 2 or rows.shape[-1] < 2:
        raise CheckError(
            f"{len(rows)} positions of {rows.shape[-1]} logits count, and both must be 2 or more. "
            "Give more text, or an attention mask that keeps some of it."
        )
    if not bool(torch.isfinite(rows).all()):
        raise CheckError(
            "the reference run gives logits with NaN or inf, so there is nothing to compare with. "
            "Find the first tensor that is not finite with halfulp.check.survey.survey."
        )
    entropy = sum((-(lp := log_softmax(a)).exp() * lp).sum().item() for a in rows.split(_ROWS))
    top = rows.topk(min(ALTERNATIVES, rows.shape[-1]), -1).values.double()
    return Reference(logits=rows, margins=top[:, :1] - top[:, 1:], entropy=entropy / len(rows))


def distance(reference: Reference, logits: Tensor, keep: Tensor | None = None) -> Distance:
    """KL(p‖p̂) and flips of `logits` [..., V] against the reference; inf where not finite."""
    rows = _rows(logits, keep)
    kls, flips, margins = [], 0, 0.0
    for a, b in zip(reference.logits.split(_ROWS), rows.split(_ROWS), strict=True):
        p, q = log_softmax(a), log_softmax(b)
        kls.append((p.exp() * (p - q)).sum(-1))
        flips += int((a.argmax(-1) != b.argmax(-1)).sum())
        top = a.topk(2, -1).indices
        change = b.double().gather(1, top) - a.double().gather(1, top)
        margins += (change[:, 0] - change[:, 1]).square().sum().item()
    kl = torch.cat(kls)
    kl = torch.where(torch.isfinite(kl), kl, math.inf)
    n = reference.tokens
    return Distance(kl=kl.mean().item(), flips=flips / n, kl_tokens=kl, margin_variance=margins / n)


def predicted_flips(reference: Reference, variance: float, *, alternatives: int = 2) -> float:
    """Share of first choices that an error of the top-2 margin of that variance changes.

    Mean over tokens of Φ(−m/σ). `alternatives` above 2 uses the independent errors of that many
    logits: 1 − E_z Π_k Φ((m_k + s z)/s), s = σ/√2; better when several choices are close.
    """
    if not variance > 0:
        return 0.0 if variance == 0 else math.nan
    if math.isinf(variance):
        return math.nan
    sigma = math.sqrt(variance)
    if alternatives == 2:
        return torch.special.ndtr(-reference.margins[:, 0] / sigma).mean().item()
    z = torch.linspace(-6, 6, 121, dtype=torch.float64)
    weight = torch.exp(-z * z / 2)
    m = reference.margins[:, : alternatives - 1, None] / (sigma / math.sqrt(2))
    stays = torch.special.ndtr(m + z).prod(1)
    return 1 - ((stays * weight).sum(-1) / weight.sum()).mean().item()


def _rows(logits: Tensor, keep: Tensor | None) -> Tensor:
    rows = logits.detach() if keep is None else logits.detach()[keep]
    return rows.reshape(-1, rows.shape[-1])
