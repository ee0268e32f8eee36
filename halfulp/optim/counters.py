"""What rounding the weight did to one update.

* asked: share of weights with a nonzero change before rounding.
* unchanged: of those, the share whose stored weight is what it was.
* lost_updates: the same where the rounding is deterministic: those changes are gone. Zero for
  stochastic rounding, which moves each weight in expectation by what was asked.
* lost_decay: share of the nonzero weights on which decoupled decay alone rounds to no change.
* update_rms: root mean square of the change before rounding.
* v_underflow: share of elements whose stored second moment is zero under a nonzero gradient.
"""

import torch
from torch import Tensor

from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import Quantizer


def update_counters(
    old: Tensor, exact: Tensor, new: Tensor, q: Quantizer, rounding: str, decay: float
) -> dict[str, float]:
    """Counters of one parameter: `old` weights, `exact` next ones and `new` as stored, all fp32."""
    asked = exact != old
    n, changes = old.numel(), int(asked.sum())
    unchanged = int((asked & (new == old)).sum()) / max(changes, 1)
    deterministic = rounding != "stochastic"
    return {
        "n": n,
        "asked": changes / max(n, 1),
        "unchanged": unchanged,
        "lost_updates": unchanged if deterministic else 0.0,
        "lost_decay": _lost_decay(old, q, decay) if deterministic and decay != 1 else 0.0,
        "update_rms": float(torch.linalg.vector_norm(exact - old)) / max(n, 1) ** 0.5,
    }


def _lost_decay(old: Tensor, q: Quantizer, decay: float) -> float:
    decayed = old * decay
    row = torch.atleast_1d(decayed).contiguous()
    stored = decayed if q.is_identity else apply_quantizer(row, q).view(old.shape)
    nonzero = old != 0
    return int((nonzero & (stored == old)).sum()) / max(int(nonzero.sum()), 1)
