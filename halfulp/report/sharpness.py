"""Sharpness in words: tracks of a run, estimates per block type, the paper's order."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from halfulp.block_names import block_type
from halfulp.report import words
from halfulp.report.counters import block_order
from halfulp.report.price import FAIL, PASS, UNKNOWN
from halfulp.report.read import Record
from halfulp.report.stats import student
from halfulp.sharpness.report import PAPER_TYPES, SharpnessReport

ORDER = (*PAPER_TYPES, "head", "pos", "qkvo", "router", "qk_norm", "bias")  # of rows
LEAST = 3  # measurements below which the scatter says nothing
PAPER = " < ".join(PAPER_TYPES)


@dataclass(frozen=True)
class Estimate:
    """Sharpness of a block type; `half` is half its 95 % interval on a natural-log scale."""

    sharpness: float
    half: float
    parameters: int

    @property
    def known(self) -> bool:
        return self.sharpness > 0 and math.isfinite(self.sharpness)


@dataclass(frozen=True)
class Pair:
    """Whether `low` is flatter than `high`, as the paper says; `ratio` = S(high) / S(low)."""

    low: str
    high: str
    ratio: float
    verdict: str


@dataclass(frozen=True)
class Track:
    """The sharpness of one run's blocks over its steps.

    `values` [blocks, steps], nan where a block was not measured; `logits` maps "sharpness",
    "sharpness_centered" and "logz" to [steps].
    """

    run: Record
    steps: np.ndarray
    blocks: tuple[str, ...]
    parameters: np.ndarray
    values: np.ndarray
    logits: Mapping[str, np.ndarray]

    def by_type(self) -> dict[str, np.ndarray]:
        """Trace over parameters of each type [steps], all layers pooled, in the order of rows."""
        found = {}
        for kind in kinds(self.blocks):
            rows = [i for i, block in enumerate(self.blocks) if block_type(block) == kind]
            numel = self.parameters[rows]
            found[kind] = (self.values[rows] * numel[:, None]).sum(0) / numel.sum()
        return found

    @property
    def last(self) -> int:
        """How many measurements make the estimate at the end: a quarter of them, 3 to 8."""
        return min(len(self.steps), max(LEAST, min(8, len(self.steps) // 4)))

    def at_the_end(self) -> dict[str, Estimate]:
        """Geometric means over the last measurements; their scatter is the uncertainty."""
        found = {}
        for kind, values in self.by_type().items():
            rows = [i for i, block in enumerate(self.blocks) if block_type(block) == kind]
            with np.errstate(divide="ignore", invalid="ignore"):
                logs = np.log(values[-self.last :])
            half = math.inf
            if len(logs) >= LEAST and np.isfinite(logs).all():
                half = student(len(logs) - 1) * float(logs.std(ddof=1)) / math.sqrt(len(logs))
            total = int(self.parameters[rows].sum())
            found[kind] = Estimate(float(np.exp(logs.mean())), half, total)
        return found


def track(record: Record) -> Track | None:
    """The measurements of a run; None if it took none."""
    events = [event for event in record.sharpness if event.get("blocks")]
    if not events:
        return None
    rows: dict[str, tuple[int, dict[int, float]]] = {}
    for j, event in enumerate(events):
        for row in event["blocks"]:
            _, cells = rows.setdefault(str(row["block"]), (int(row["parameters"]), {}))
            cells[j] = float(row["sharpness"])
    blocks = sorted(rows, key=_row_order)
    values = np.full((len(blocks), len(events)), np.nan)
    for i, block in enumerate(blocks):
        for j, value in rows[block][1].items():
            values[i, j] = value
    names = ("sharpness", "sharpness_centered", "logz")
    logits = {n: np.array([_number(e.get("logits"), n) for e in events]) for n in names}
    return Track(
        run=record,
        steps=np.array([int(event["step"]) for event in events]),
        blocks=tuple(blocks),
        parameters=np.array([rows[block][0] for block in blocks], float),
        values=values,
        logits=logits,
    )


def estimates(report: SharpnessReport) -> dict[str, Estimate]:
    """Per block type, with the 95 % interval of the mean over draws; eigenvalues are exact."""
    if report.eigenvalues:
        numel = {row.name: row.parameters for row in report.rows("type")} if report.draws else {}
        ordered = sorted(report.eigenvalues, key=_rank)
        return {k: Estimate(report.eigenvalues[k], 0.0, numel.get(k, 0)) for k in ordered}
    found = {}
    for row in sorted(report.rows("type"), key=lambda r: _rank(r.name)):
        half = student(report.draws - 1) * row.rel_se if report.draws >= LEAST else math.inf
        found[row.name] = Estimate(row.sharpness, half, row.parameters)
    return found


def pairs(found: Mapping[str, Estimate]) -> list[Pair]:
    """The neighbors of the paper's order among the types there are, each judged."""
    present = [kind for kind in PAPER_TYPES if kind in found and found[kind].known]
    return [_pair(found, low, high) for low, high in pairwise(present)]


def _pair(found: Mapping[str, Estimate], low: str, high: str) -> Pair:
    a, b = found[low], found[high]
    gap = math.log(b.sharpness / a.sharpness)
    half = math.hypot(a.half, b.half)
    verdict = UNKNOWN if not abs(gap) > half else (PASS if gap > 0 else FAIL)
    return Pair(low, high, math.exp(gap), verdict)


def overall(judged: Sequence[Pair]) -> str:
    """The verdict on the paper's whole order."""
    verdicts = {pair.verdict for pair in judged}
    if FAIL in verdicts:
        return FAIL
    return PASS if verdicts == {PASS} else UNKNOWN


def order(found: Mapping[str, Estimate]) -> str:
    """The paper's types, flattest first: "<" where their intervals tell them apart, else "~"."""
    ranked = sorted(
        (k for k in PAPER_TYPES if k in found and found[k].known),
        key=lambda k: found[k].sharpness,
    )
    text = ranked[0] if ranked else "none measured"
    for low, high in pairwise(ranked):
        text += f" {'<' if _pair(found, low, high).verdict == PASS else '~'} {high}"
    return text


def on_the_paper(judged: Sequence[Pair]) -> str:
    """Which parts of the paper's order hold, in a sentence."""
    if not judged:
        return "There are not two of the paper's block types to compare."
    if overall(judged) == PASS:
        return f"The paper's order {PAPER} holds."
    named = {
        v: words.listing([f"{p.low} < {p.high}" for p in judged if p.verdict == v])
        for v in (PASS, FAIL, UNKNOWN)
    }
    parts = [
        f"{named[PASS]} {_hold(named[PASS])}" if named[PASS] else "",
        f"{named[FAIL]} {'are' if ' and ' in named[FAIL] else 'is'} reversed"
        if named[FAIL]
        else "",
        f"{named[UNKNOWN]} could not be told" if named[UNKNOWN] else "",
    ]
    return f"Of the paper's order {PAPER}: {'; '.join(p for p in parts if p)}."


def _hold(listed: str) -> str:
    return "hold" if " and " in listed else "holds"


def extremes(found: Mapping[str, Estimate]) -> tuple[str, str, float]:
    """(flattest type, sharpest type, their ratio) among the paper's types; nan for fewer than 2."""
    known = [k for k in PAPER_TYPES if k in found and found[k].known]
    if len(known) < 2:
        return "", "", math.nan
    low = min(known, key=lambda k: found[k].sharpness)
    high = max(known, key=lambda k: found[k].sharpness)
    return low, high, found[high].sharpness / found[low].sharpness


def kinds(blocks: Sequence[str]) -> list[str]:
    """The block types among `blocks`, in the order of rows."""
    return sorted({block_type(block) for block in blocks}, key=_rank)


def number(value: float) -> str:
    """Two significant digits: 8.9e−3, 12, 0.45, 2,800; "–" for what is not finite."""
    if not math.isfinite(value):
        return "–"
    if value == 0 or 0.1 <= abs(value) < 1e5:
        return f"{float(f'{value:.2g}'):,g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}".replace("-", "−")


def times(ratio: float) -> str:
    """A ratio as "25×"."""
    return f"{number(ratio)}×" if math.isfinite(ratio) else "–"


def _rank(kind: str) -> int:
    return ORDER.index(kind) if kind in ORDER else len(ORDER)


def _row_order(block: str) -> tuple[Any, ...]:
    return _rank(block_type(block)), block_order(block)


def _number(fields: Any, name: str) -> float:
    value = fields.get(name) if isinstance(fields, Mapping) else None
    return float(value) if isinstance(value, (int, float)) else math.nan


def within(one: Estimate) -> str:
    """The 95 % interval as a factor in percent: "12 %"."""
    if not math.isfinite(one.half):
        return "unknown"
    return "exact" if one.half == 0 else f"{100 * math.expm1(one.half):.0f}\u00a0%"
