"""What a drill requires of the guard after each fault."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from halfulp.run import Run
from halfulp.train.checkpoint import path_of

AFTER = 50  # steps after the incident at which the loss is compared


@dataclass(frozen=True)
class Gate:
    """One requirement and what was found; `passed` is None where that could not be told."""

    asked: str
    found: str
    passed: bool | None


@dataclass(frozen=True)
class Look:
    """The run with the fault, the fault-free one, and one that never sees the batch of the fault.

    `at` is the step of the fault; `incidents` are the events of the guard since.
    """

    at: int
    steps: int
    path: Path
    reason: str  # how the run ended
    incidents: Sequence[Mapping[str, Any]]
    clean: Path
    skipping: Callable[[], Path]

    @property
    def first(self) -> Mapping[str, Any]:
        """The first incident; {} without one."""
        return self.incidents[0] if self.incidents else {}

    @property
    def delay(self) -> int | None:
        """Steps from the fault to the first incident."""
        return self.first["step"] - self.at if self.first else None


Judge = Callable[[Look], Gate]


def noticed(within: int) -> Judge:
    """The guard acts at most so many steps after the fault."""

    def judge(look: Look) -> Gate:
        delay, asked = look.delay, f"noticed within {within} steps"
        if delay is None:
            return Gate(asked, "unnoticed", False)
        return Gate(asked, f"after {delay}, {look.first['trigger']}", delay <= within)

    return judge


def triggered(kind: str) -> Judge:
    """The first incident has a trigger of this kind."""
    return lambda look: _same(f"trigger {kind}", look.first.get("trigger", "none"), kind)


def verdict(kind: str) -> Judge:
    """The first incident has this verdict."""
    return lambda look: _same(f"verdict {kind}", look.first.get("verdict", "none"), kind)


def named(unit: str) -> Judge:
    """The first incident names this unit and no other; with "" no unit at all."""

    def judge(look: Look) -> Gate:
        found, asked = ", ".join(look.first.get("units", [])), f"names {unit or 'no unit'}"
        return Gate(asked, found or "none", bool(look.first) and found == unit)

    return judge


def ahead(least: float) -> Judge:
    """Leave-one-in: the first unit removes so many times as much of the excess as the next."""

    def judge(look: Look) -> Gate:
        margin, asked = look.first.get("margin", math.nan), f"margin of {least:g} or more"
        return Gate(asked, f"{margin:.3g}", None if math.isnan(margin) else margin >= least)

    return judge


def done(action: str) -> Judge:
    """The first answer is this action."""
    return lambda look: _same(f"answer {action}", look.first.get("action", "none"), action)


def ended(reason: str) -> Judge:
    """The run ends like this."""
    return lambda look: _same(f"run {reason}", look.reason, reason)


def unsaturated(gemm: str, share: float) -> Judge:
    """At the last count, no more than `share` of this GEMM's input lies beyond its scale."""

    def judge(look: Look) -> Gate:
        asked = f"at the end no more than {share:g} of the input saturates"
        event = list(Run.open(look.path, writer=False).events("counters"))[-1]
        rows = [r for r in event["gemms"] if (r["gemm"], r["operand"]) == (gemm, "fprop.x")]
        if event["step"] <= look.at or not rows:
            return Gate(asked, "not counted", None)
        found = rows[0]["saturated"] / rows[0]["n"]
        return Gate(asked, f"{found:.2g}", found <= share)

    return judge


def recovered(nats: float) -> Judge:
    """The last held-out loss is this close to that of the fault-free run."""

    def judge(look: Look) -> Gate:
        return _close(look, f"final loss within {nats:g}", look.steps, nats)

    return judge


def recovered_soon(nats: float) -> Judge:
    """AFTER steps after the guard has acted, the held-out loss is this close at the same step."""

    def judge(look: Look) -> Gate:
        asked = f"loss {AFTER} steps later within {nats:g}"
        later = [s for s in held_out(look.clean) if s >= look.first.get("step", math.inf) + AFTER]
        return _close(look, asked, min(later), nats) if later else Gate(asked, "not known", None)

    return judge


def same_as_clean(look: Look) -> Gate:
    """The parameters are bit for bit those of the fault-free run."""
    return _same_bits("parameters of the fault-free run", look, look.clean)


def same_as_skipping(look: Look) -> Gate:
    """The parameters are bit for bit those of a run with this batch in train.skip."""
    return _same_bits("parameters of a run that skips the batch", look, look.skipping())


def held_out(path: Path) -> dict[int, float]:
    """Held-out loss by step; of steps that were replayed the last."""
    events = Run.open(path, writer=False).events("eval")
    return {event["step"]: event["loss_nats"] for event in events}


def _same(asked: str, found: str, wanted: str) -> Gate:
    return Gate(asked, found, found == wanted)


def _close(look: Look, asked: str, step: int, nats: float) -> Gate:
    mine, clean = held_out(look.path), held_out(look.clean)
    if step not in mine or step not in clean:
        return Gate(asked, f"no loss at step {step}", None)
    gap = mine[step] - clean[step]
    return Gate(asked, f"{gap:+.4f} at step {step}", gap <= nats)


def _same_bits(asked: str, look: Look, other: Path) -> Gate:
    folders = [path_of(p / "checkpoints", look.steps) for p in (look.path, other)]
    if not all(folder.is_dir() for folder in folders):
        return Gate(asked, "no last checkpoint", None)
    mine, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    same = all(torch.equal(mine[name], theirs[name]) for name in theirs)
    return Gate(asked, "the same" if same else "others", same)
