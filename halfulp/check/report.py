"""What a check found: plain data that the command line prints, the page draws and JSON keeps."""

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfulp.check.backward import GemmError
from halfulp.check.detect import Finding
from halfulp.check.kernels import KernelReport
from halfulp.check.plan import Excluded, LowestSafe, WhatIf
from halfulp.check.profile import DepthProfile
from halfulp.check.updates import UpdateSheet
from halfulp.errors import ConfigError
from halfulp.strict_json import with_nulls

SCHEMA = 1
GRADES = (
    (1e-6, "exact"),
    (1e-4, "negligible"),
    (1e-3, "small"),
    (1e-2, "visible"),
    (5e-2, "large"),
)
KL_IS_CHANGE = "KL measures how much the model changed, not whether it became worse."


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way of running the model, predicted and measured; KL in nats/token, flips as shares.

    `predicted_kl` is NaN where a prediction must not be shown, and `why` says the reason.
    `range_events`: sites with elements beyond the largest value of their format.
    """

    name: str
    sites: int
    predicted_kl: float
    measured_kl: float
    predicted_flips: float
    measured_flips: float
    range_events: int
    why: str = ""

    @property
    def ratio(self) -> float:
        """Predicted over measured KL, the self-test; NaN where either is missing or zero."""
        usable = self.measured_kl > 0 and not math.isinf(self.measured_kl)
        return self.predicted_kl / self.measured_kl if usable else math.nan

    @property
    def grade(self) -> str:
        return grade(self.measured_kl)


@dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One costly site: its price in the format in focus, and why it costs that much.

    `share` and `cumulative` are of all prices in that format; `crosses` is the widest format in
    which this site alone exceeds the budget ("" if none does).
    """

    name: str
    block: str
    kind: str
    kl: float
    share: float
    cumulative: float
    crosses: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class SiteDetail:
    """Everything known about one site; the maps are by format.

    `kl` is NaN where no gradient reaches the site: unknown, not free. `heads`: KL of each head.
    """

    name: str
    family: str
    block: str
    kind: str
    op: str
    shape: tuple[int, ...]
    amax: float
    kl: Mapping[str, float]
    kl_stochastic: Mapping[str, float]
    flushed: Mapping[str, float]
    saturated: Mapping[str, float]
    shrinkage: Mapping[str, float]
    z: Mapping[str, float]
    heads: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class PlanRow:
    """The plan for the budget, judged by runs on the text that priced it and on held-out text.

    `tries`: budgets that were planned for; the later ones correct what the run before measured.
    """

    formats: Mapping[str, str]
    predicted_kl: float
    measured_kl: float
    measured_flips: float
    held_out_kl: float
    held_out_flips: float
    average_bits: float
    hardware: str
    tries: tuple[float, ...]
    excluded: tuple[Excluded, ...]
    policy: str  # TOML


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """pass | fail | could not tell, in a sentence with its number."""

    status: str
    sentence: str

    @property
    def exit_code(self) -> int:
        return {"pass": 0, "fail": 2}.get(self.status, 3)


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything that `halfulp check` found about one model on one text.

    `uniform`: every stored tensor of a `.to(bfloat16)` program in one format. `operands`: only the
    operands of the GEMMs, as matrix units take them. `heat`: block → format → predicted KL of the
    stored tensors. `what_if`: changes to the plan; `keep`: kind → the KL that is left of the
    format in `focus` when that kind stays exact.
    """

    model: str
    tokens: int
    loss_nats: float
    entropy_nats: float
    median_margin: float
    reference: str
    seed: int
    probes: int
    budget: float
    target: str
    verdict: Verdict
    uniform: tuple[Row, ...]
    operands: tuple[Row, ...]
    asked: Row | None
    focus: str
    sites: tuple[SiteRow, ...]
    heat: Mapping[str, Mapping[str, float]]
    confidence: Mapping[str, tuple[float, float]]  # format → lowest and highest probe's total
    lowest_safe: tuple[LowestSafe, ...]
    plan: PlanRow
    what_if: tuple[WhatIf, ...]
    keep: Mapping[str, float]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    every_site: tuple[SiteDetail, ...]
    profile: DepthProfile | None = None
    backward: tuple[GemmError, ...] = ()
    updates: UpdateSheet | None = None
    kernels: tuple[KernelReport, ...] = ()
    seconds: float = 0.0
    forwards: float = 0.0  # seconds over those of one fp32 forward pass

    @property
    def exit_code(self) -> int:
        """0 the target meets the budget, 2 it does not, 3 it could not be judged."""
        return self.verdict.exit_code

    def site(self, name: str) -> SiteDetail:
        """The site called `name`; ConfigError naming the nearest ones if there is none."""
        found = {s.name: s for s in self.every_site}
        if name not in found:
            inside = [n for n in found if name in n][:3]
            near = inside or difflib.get_close_matches(name, found, 3, 0.3) or list(found)[:3]
            raise ConfigError(f"there is no site {name!r}. Nearest: {', '.join(near)}.")
        return found[name]

    def row(self, format: str) -> Row:
        """The uniform row of a format; KeyError if it was not asked for."""
        return {r.name: r for r in self.uniform}[format]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, schema `SCHEMA`; numbers that are not finite become null."""
        content = dataclasses.asdict(dataclasses.replace(self, updates=None))
        content |= {
            "schema": SCHEMA,
            "exit_code": self.exit_code,
            "uniform": {r.name: _row(r) for r in self.uniform},
            "operands": {r.name: _row(r) for r in self.operands},
            "asked": self.asked and _row(self.asked),
            "updates": self.updates and _updates(self.updates),
        }
        return with_nulls(content)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)


def grade(kl: float) -> str:
    """The word for a measured KL in nats per token (round-off spec 5.2)."""
    return next((word for limit, word in GRADES if kl < limit), "broken")


def _row(row: Row) -> dict[str, Any]:
    return dataclasses.asdict(row) | {"ratio": row.ratio, "grade": row.grade}


def _updates(sheet: UpdateSheet) -> dict[str, Any]:
    def weight(row: Any) -> dict[str, Any]:
        names = ("block", "format", "elements", "lost_updates", "lost_decay", "relative_update")
        return {n: getattr(row, n) for n in (*names, "lr_half", "lr_stop")}

    return {
        "lr": sheet.lr,
        "weight_decay": sheet.weight_decay,
        "betas": sheet.betas,
        "eps": sheet.eps,
        "grad_norm": sheet.grad_norm,
        "weights": [weight(row) for row in sheet.weights],
        "moments": [dataclasses.asdict(row) for row in sheet.moments],
        "floors": [dataclasses.asdict(row) for row in sheet.floors],
    }
