"""How the parameters of an efficient model follow the corpus: Kausik, arXiv:2402.14746.

N = N_ref (D/D_ref)^gamma. If the excess loss falls as D^-beta and the excess error of an efficient
model lies between orders N/D and sqrt(N/D), then 1 - 2 beta <= gamma <= 1 - beta; beta = 0.28, the
rounded exponent of Chinchilla, gives the published 0.44 and 0.72. The band is our reconstruction.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.plan.laws import load_law
from halfulp.plan.said import Said, said


@dataclass(frozen=True, kw_only=True)
class Growth:
    """gamma in N ∝ D^gamma; `low` is None where the law gives no lower bound (beta >= 1/2)."""

    low: float | None
    high: float
    beta: float | None = None  # None: the published pair

    @property
    def middle(self) -> float | None:
        """Halfway; None without a lower bound."""
        return None if self.low is None else (self.low + self.high) / 2

    @property
    def doubling(self) -> tuple[float, float]:
        """How much more corpus doubles the unique sequences: 2^(1/gamma), least and most.

        Without a lower bound of gamma the second is infinite.
        """
        return 2 ** (1 / self.high), math.inf if self.low is None else 2 ** (1 / self.low)

    def parameters(self, d: float, *, n_ref: float, d_ref: float) -> tuple[float, float]:
        """The parameters of an efficient model for a corpus of `d` tokens, least and most.

        Anchored on a model of `n_ref` parameters that is efficient on `d_ref` tokens. Without a
        lower bound of gamma it is taken as zero: N does not shrink with more corpus.
        """
        ends = [n_ref * (d / d_ref) ** gamma for gamma in (self.low or 0.0, self.high)]
        return min(ends), max(ends)


def growth_of(beta: float) -> Growth:
    """The band of gamma for a law whose excess loss falls as D^-`beta`.

    Raises PlanError for a beta outside (0, 1).
    """
    if not 0 < beta < 1:
        raise PlanError(f"beta = {beta:g} gives no band. It has to lie between 0 and 1.")
    return Growth(low=1 - 2 * beta if beta < 0.5 else None, high=1 - beta, beta=beta)


def published() -> Growth:
    """The band of the paper's later versions."""
    c = load_law("kausik").coefficients
    return Growth(low=c["gamma_low"], high=c["gamma_high"])


@dataclass(frozen=True, kw_only=True)
class Emergence:
    """Whether a corpus holds more distinct n-token sequences than a model has parameters."""

    n: int
    unique: float
    parameters: float
    unit: str = "token"
    tokenizer: str = ""

    @property
    def open(self) -> bool:
        """True where by the criterion scaling up may still uncover skills."""
        return self.parameters < self.unique

    @property
    def sentence(self) -> Said:
        """The statement with its n and its tokenizer, as it may be printed."""
        named = said("emergence_named", tokenizer=self.tokenizer) if self.tokenizer else ""
        return said(
            "emergence", n=self.n, unique=self.unique, unit=said(self.unit), named=named,
            side=said("more" if self.open else "no_more"), parameters=self.parameters,
            end=said("open" if self.open else "closed"),
        )  # fmt: skip


def emergence(
    unique: Mapping[int, float], parameters: float, *, unit: str, tokenizer: str
) -> tuple[Emergence, ...]:
    """One statement for each n of `unique`, the number of distinct n-`unit` sequences."""
    return tuple(
        Emergence(n=n, unique=u, parameters=parameters, unit=unit, tokenizer=tokenizer)
        for n, u in sorted(unique.items())
    )
