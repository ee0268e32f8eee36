"""Between two steps: what the ratios of the learning rates make of the step before."""

import math
import time
from typing import Any

import torch
from torch import Tensor

from halfulp.errors import ConfigError
from halfulp.optim.adamw import update_of
from halfulp.processes import local
from halfulp.train.blockwise import DRAWS, MOST_MOVED, Blockwise
from halfulp.train.session import Session
from halfulp.train.sharpness import measure_gnb
from halfulp.train.step import Outcome

MEASURED = 1  # the key of the measurements that decide ratios
_EVERY = 10  # steps between two looks at the size of the updates


def begin(s: Session) -> None:
    """The event of the ratios that the run begins with."""
    if s.blockwise is not None and s.step == 0:
        chosen = s.blockwise.chosen
        _emit(s, s.blockwise, f"{chosen.source}. {' '.join(chosen.notes)}".rstrip(), step=1)


def adapt(s: Session, outcome: Outcome) -> None:
    """Heed alarms, measure where it is due and move the ratios, with an event for each change."""
    b = s.blockwise
    if b is None:
        return
    if s.config.blockwise.guard and not outcome.skipped:
        for alarm in b.guard.observe(s.step, outcome.loss_nats, outcome.norms):
            if b.heed(alarm):
                _emit(s, b, f"{alarm.kind or 'all'} lowered: {alarm.why}")
    if s.step in b.measured_at:
        _measure(s, b)
    if b.auto:
        if s.step % _EVERY == 0:
            _hold(s, b)
        if b.move():
            _emit(s, b, "the ratios have arrived")


def facts_of(s: Session) -> dict[str, Any]:
    """The fields of summary.json: the ratios at the end and their source; none without ratios."""
    b = s.blockwise
    if b is None:
        return {}
    return {"lr_ratios": b.effective(), "lr_ratios_from": b.chosen.source}


def _emit(s: Session, b: Blockwise, why: str, *, step: int | None = None, **more: Any) -> None:
    goal = dict(b.chosen.by_type)
    s.emit(
        "lr_ratios", step=step or s.step, ratios=b.effective(), goal=goal, why=why, **more
    )  # fmt: skip


def _measure(s: Session, b: Blockwise) -> None:
    start = time.perf_counter()
    report = measure_gnb(s, draws=DRAWS, key=MEASURED)
    try:
        b.adopt(report)
        why = " ".join(b.chosen.notes)
    except ConfigError as error:
        why = f"The ratios stay: {error}"
    sharpness = {row.name: row.sharpness for row in report.rows()}
    if not all(map(math.isfinite, sharpness.values())):
        sharpness = {}
    _emit(s, b, why, sharpness=sharpness, seconds=time.perf_counter() - start)


def _hold(s: Session, b: Blockwise) -> None:
    """Types that want to rise and whose updates are too large for it wait."""
    rising = {k for k in b.ratios if b.chosen[k] > b.ratios[k]}
    moved = _updates_over_weights(s, rising) if rising else {}
    held = [kind for kind, share in moved.items() if share > MOST_MOVED]
    for kind in held:
        if kind not in b.held:
            _emit(s, b, f"{kind} waits: update/weight is {moved[kind]:.2g} > {MOST_MOVED:g}")
    b.held = held


@torch.no_grad()
def _updates_over_weights(s: Session, kinds: set[str]) -> dict[str, float]:
    """RMS of the last update over that of the weight, of the matrices of each type."""
    squares: dict[str, Tensor] = {}
    for group in s.precision.optimizer.param_groups:
        if group["lr_type"] not in kinds:
            continue
        for p in group["params"]:
            if p.ndim >= 2 and s.precision.optimizer.state.get(p):
                pair = (local(update_of(s.precision.optimizer, group, p)), local(p))
                both = torch.stack([torch.linalg.vector_norm(t).double().square() for t in pair])
                kind = group["lr_type"]
                squares[kind] = squares[kind] + both if kind in squares else both
    if not squares:
        return {}
    packed = torch.stack(list(squares.values()))
    if s.world.mode == "fsdp2":
        packed = s.world.sum(packed)
    pairs = zip(squares, packed.tolist(), strict=True)
    return {k: math.sqrt(u / w) if w else 0.0 for k, (u, w) in pairs}
