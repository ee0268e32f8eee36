"""What a recipe costs: the held-out loss above that of a paired reference, and its verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from halfulp.report.read import Curve, Record
from halfulp.report.stats import Mean, mean

PASS, FAIL, UNKNOWN = "pass", "fail", "could not tell"

TAIL = 0.2  # last share of the run whose step differences give the uncertainty
FEWEST = 8  # paired steps needed in the tail
# Options that change what is measured, kept or how fast it goes, not what is computed.
_HARMLESS = frozenset(
    f"train.{name}"
    for name in (
        *("eval_every", "count_every", "checkpoint_every", "keep"),
        *("device", "threads", "parallel", "compile", "activation_checkpointing"),
    )
)
_OTHER_SECTIONS = ("run", "policy", "name", "sharpness", "guard")


@dataclass(frozen=True)
class Price:
    """`nats` = held-out loss minus the reference's at `step`; nan where it is not known."""

    run: Record
    reference: Record | None
    verdict: str
    why: str  # empty unless the verdict is "could not tell" or the run broke down
    nats: float
    nats_fp32: float  # the same, both models evaluated in fp32
    half_width: float  # 95 %, from the scatter of the paired step differences
    scatter: Mean
    step: int
    is_reference: bool  # others are compared with it
    caught_up: int  # step at which the reference already had the run's last held-out loss; 0 = none


def price_all(records: Sequence[Record], bar_nats: float) -> list[Price]:
    """The price of every run, in order; a reference "could not tell" and has no nats."""
    references = [reference_of(record, records) for record in records]
    prices = [price(*pair, bar_nats) for pair in zip(records, references, strict=True)]
    used = [reference for reference in references if reference is not None]
    return [replace(p, is_reference=any(p.run is reference for reference in used)) for p in prices]


def reference_of(record: Record, records: Sequence[Record]) -> Record | None:
    """The fp32 run that shares most of `record`'s configuration; without any, the first run.

    None for a run that is itself a reference.
    """
    candidates = [r for r in records if r.recipe == "fp32"] or list(records[:1])
    if any(record is candidate for candidate in candidates):
        return None
    return min(candidates, key=lambda r: len(differences(record, r)))


def price(record: Record, reference: Record | None, bar_nats: float) -> Price:
    """Pass below the bar, fail above it, could not tell if the uncertainty straddles it.

    A run that broke down fails; one without a comparable, finished reference could not tell.
    """
    common = _common_step(record, reference)
    delta = _delta(record.held_out, reference and reference.held_out, common)
    scatter = tail_scatter(record, reference)
    if record.diverged:
        verdict, why = FAIL, "broke down"
    else:
        why = _obstacle(record, reference, common, scatter)
        verdict = UNKNOWN if why else judge(delta, scatter.half_width, bar_nats)
    return Price(
        run=record,
        reference=reference,
        verdict=verdict,
        why=why,
        nats=delta,
        nats_fp32=_delta(record.held_out_fp32, reference and reference.held_out_fp32, common),
        half_width=scatter.half_width,
        scatter=scatter,
        step=common,
        is_reference=False,
        caught_up=_caught_up(record, reference, common, delta),
    )


def judge(nats: float, half_width: float, bar_nats: float) -> str:
    """Where the interval `nats` ± `half_width` lies relative to the bar."""
    if nats + half_width < bar_nats:
        return PASS
    return FAIL if nats - half_width > bar_nats else UNKNOWN


def differences(record: Record, reference: Record) -> list[str]:
    """Options, the precision aside, in which two runs differ: they are not paired then."""
    mine, theirs = flatten(record.config), flatten(reference.config)
    return [
        key
        for key in sorted({*mine, *theirs})
        if key.partition(".")[0] not in _OTHER_SECTIONS
        and key not in _HARMLESS
        and mine.get(key) != theirs.get(key)
    ]


def flatten(config: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{where}{key}.")
        else:
            flat[f"{where}{key}"] = value
    return flat


def step_differences(record: Record, reference: Record | None) -> Curve:
    """Training loss minus the reference's at every step that both recorded as a finite number."""
    if reference is None:
        return Curve(np.array([], int), np.array([], float))
    steps, mine, theirs = np.intersect1d(
        record.loss.steps, reference.loss.steps, assume_unique=True, return_indices=True
    )
    with np.errstate(invalid="ignore"):
        return Curve(steps, record.loss.values[mine] - reference.loss.values[theirs]).finite()


def tail_scatter(record: Record, reference: Record | None) -> Mean:
    """Mean step difference over the last part of the run, with its autocorrelation-aware error."""
    values = step_differences(record, reference).values
    return mean(values[-max(math.ceil(TAIL * len(values)), min(FEWEST, len(values))) :])


def _obstacle(record: Record, reference: Record | None, common: int, scatter: Mean) -> str:
    """Why no price can be told; empty if it can."""
    if record.state == "empty":
        return "it recorded no step"
    if record.state != "finished":
        return f"it is not finished: {progress(record)}"
    if reference is None:
        return (
            "it is the reference" if record.recipe == "fp32" else "there is no fp32 run beside it"
        )
    if reference.diverged or reference.state != "finished":
        what = "broke down" if reference.diverged else f"is not finished: {progress(reference)}"
        return f"its reference {reference.label} {what}"
    apart = differences(record, reference)
    if apart:
        return f"it differs from {reference.label} in more than precision: {', '.join(apart[:4])}"
    if _other_data(record, reference):
        return f"it did not see the same tokens as {reference.label}"
    if not common or common < record.last_step:
        return "there is no held-out loss of both runs after the last step"
    if scatter.count < FEWEST or not math.isfinite(scatter.half_width):
        return f"only {scatter.count} paired steps tell how much the difference scatters"
    return ""


def progress(record: Record) -> str:
    """ "step 310 of 500"."""
    planned = f" of {record.planned_steps:,}" if record.planned_steps else ""
    return f"step {record.last_step:,}{planned}"


def _other_data(record: Record, reference: Record) -> bool:
    mine, theirs = _digest(record), _digest(reference)
    if mine and theirs and mine != theirs:
        return True
    steps, i, j = np.intersect1d(
        record.tokens.steps, reference.tokens.steps, assume_unique=True, return_indices=True
    )
    return bool(len(steps)) and not np.array_equal(
        record.tokens.values[i], reference.tokens.values[j]
    )


def _digest(record: Record) -> str:
    data = record.summary.get("data")
    return str(data.get("digest") or "") if isinstance(data, Mapping) else str(data or "")


def _common_step(record: Record, reference: Record | None) -> int:
    """The last step at which both runs have a finite held-out loss; 0 if there is none."""
    if reference is None:
        return 0
    steps = np.intersect1d(record.held_out.finite().steps, reference.held_out.finite().steps)
    return int(steps[-1]) if len(steps) else 0


def _delta(mine: Curve, theirs: Curve | None, step: int) -> float:
    return math.nan if theirs is None else value_at(mine, step) - value_at(theirs, step)


def value_at(curve: Curve, step: int) -> float:
    """The value recorded at `step`; nan if there is none."""
    found = np.flatnonzero(curve.steps == step)
    return float(curve.values[found[0]]) if len(found) else math.nan


def _caught_up(record: Record, reference: Record | None, step: int, delta: float) -> int:
    """First step at which the reference's held-out loss, interpolated, was as low as the run's."""
    if reference is None or not delta > 0:
        return 0
    curve = reference.held_out.finite()
    target = value_at(record.held_out, step)
    below = np.flatnonzero(curve.values <= target)
    if len(curve.steps) < 4 or not len(below) or below[0] == 0:
        return 0
    i = int(below[0])
    high, low = curve.values[i - 1], curve.values[i]
    part = (high - target) / (high - low) if high > low else 1.0
    return round(curve.steps[i - 1] + part * (curve.steps[i] - curve.steps[i - 1]))
