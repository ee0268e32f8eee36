"""A learning rate per block type during a run: the ratios in force, and what changes them.

`ratios = "auto"` starts from one rate for all and follows the measured sharpness: after the warm-up
and at the shares MEASURED_AT of the run, by halfulp/sharpness/ratios.py, as fast as MOST_GROWTH
allows. Ratios of any kind come down when the run suffers from them (halfulp/train/rate_guard.py).
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from halfulp.errors import ConfigError
from halfulp.pieces import Piece
from halfulp.sharpness.ratios import Ratios, lr_types, measured, resolve
from halfulp.sharpness.report import SharpnessReport
from halfulp.train.config import TrainConfig
from halfulp.train.rate_guard import Alarm, RateGuard
from halfulp.train.schedule import lr_at, warmup_steps

AUTO = "auto"
DRAWS = 16
MEASURED_AT = (0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
MOST_GROWTH = 1.25  # of a ratio, within 1 % of the run
MOST_MOVED = 3e-2  # update/weight above which a matrix's ratio does not rise
MOST_ALARMS = 2  # of one block type; then it learns at the run's rate


@dataclass
class Blockwise:
    """The ratios of a run after its finished steps; the same on every process."""

    config: TrainConfig
    kinds: Mapping[str, str]  # parameter → type that decides its rate
    chosen: Ratios  # what the ratios move to
    ratios: dict[str, float]  # in force, before alarms
    trust: dict[str, float]  # share of a ratio's excess over 1 that alarms have left
    guard: RateGuard
    held: list[str] = field(default_factory=list)  # types whose updates are too large to rise

    @property
    def auto(self) -> bool:
        return self.config.blockwise.ratios == AUTO

    @cached_property
    def measured_at(self) -> frozenset[int]:
        """Numbers of finished steps after which the sharpness is measured."""
        if not self.auto:
            return frozenset()
        train = self.config.train
        first = max(1, warmup_steps(train))
        later = (math.ceil(share * train.steps) for share in MEASURED_AT)
        return frozenset({first, *(step for step in later if step > first)})

    def lr(self, step: int, kind: str) -> float:
        """The learning rate of a block type at the 0-based `step`."""
        train, section = self.config.train, self.config.blockwise
        # The ratios of `auto` rise after the warm-up, and no faster than a stretched one.
        stretch = section.stretch_warmup and not self.auto
        full = lr_at(
            step, train, self.ratios[kind], stretch=stretch, scaled=section.floor == "scaled"
        )
        base = lr_at(step, train)
        trust = self.trust[kind]
        return full if trust == 1 or full <= base else base + trust * (full - base)

    def effective(self) -> dict[str, float]:
        """The ratio of each type after alarms."""
        return {
            kind: ratio if ratio <= 1 else 1 + self.trust[kind] * (ratio - 1)
            for kind, ratio in self.ratios.items()
        }

    def adopt(self, report: SharpnessReport) -> None:
        """Move to the ratios of `report` from here on. ConfigError where it gives none."""
        section = self.config.blockwise
        found = measured(report, power=section.power, cap=section.cap)
        self.chosen = resolve(found, self.ratios, anchor=section.anchor)

    def move(self) -> bool:
        """One step of each ratio towards its goal; whether the last of them arrives with it."""
        most = math.log(MOST_GROWTH) / (0.01 * self.config.train.steps)
        before = dict(self.ratios)
        for kind, ratio in self.ratios.items():
            gap = math.log(self.chosen[kind] / ratio)
            if gap > 0 and kind in self.held:
                continue
            near = abs(gap) <= most
            self.ratios[kind] = (
                self.chosen[kind] if near else ratio * math.exp(math.copysign(most, gap))
            )
        return before != self.ratios == dict(self.chosen.by_type)

    def heed(self, alarm: Alarm) -> bool:
        """Lower the ratios as `alarm` asks; whether there was any to lower."""
        kinds = [alarm.kind] if alarm.kind else list(self.ratios)
        raised = [k for k in kinds if self.effective()[k] > 1]
        for kind in raised:
            over = alarm.kind is not None and self.guard.norms[kind].alarms >= MOST_ALARMS
            self.trust[kind] *= 0.0 if over else 0.5
        return bool(raised)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {
            "chosen": dict(self.chosen.by_type),
            "source": self.chosen.source,
            "notes": list(self.chosen.notes),
            "ratios": dict(self.ratios),
            "trust": dict(self.trust),
            "held": list(self.held),
            "guard": self.guard.state(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.chosen = Ratios(state["chosen"], state["source"], tuple(state["notes"]))
        self.ratios, self.trust = dict(state["ratios"]), dict(state["trust"])
        self.held = list(state["held"])
        self.guard.load(state["guard"])


def open_blockwise(config: TrainConfig, parts: Sequence[Piece]) -> Blockwise | None:
    """The ratios that `config` asks for, of a model with the pieces `parts`; None where of none.

    Raises ConfigError for ratios that do not fit the model, and warm-ups that do not fit the run.
    """
    section = config.blockwise
    if not section.ratios:
        return None
    if section.ratios == AUTO:
        _check_auto(parts)
    kinds = lr_types(parts)
    types = list(dict.fromkeys(kinds.values()))
    if section.ratios == AUTO:
        chosen = Ratios(dict.fromkeys(types, 1.0), AUTO, ("One rate until the first measurement.",))
    else:
        chosen = resolve(section.ratios, types, anchor=section.anchor)
        _check_warmup(config, chosen)
        if section.guard:
            _refuse_vo_alone(chosen)
    guard = RateGuard(warmup_steps(config.train))
    full = dict.fromkeys(types, 1.0)
    return Blockwise(config, kinds, chosen, dict(chosen.by_type), full, guard)


def _check_auto(parts: Sequence[Piece]) -> None:
    if any(piece.kind == "qkvo" for piece in parts):
        raise ConfigError(
            "the model's fused projections have an unknown layout, so qk and vo cannot be measured "
            "apart. Use --lr-blocks paper, or ratios that name both."
        )


def _refuse_vo_alone(chosen: Ratios) -> None:
    """No alarm would see it: such a run shows no runaway, it is simply worse."""
    vo = chosen.by_type.get("vo", 1.0)
    flatter = {k: chosen[k] for k in ("emb", "qk", "ffn") if k in chosen.by_type}
    if flatter and vo > max(1.0, *flatter.values()):
        most = max(1.0, *flatter.values())
        raise ConfigError(
            f"vo = {vo:g} is above the ratios of all flatter blocks, at most {most:g}: vo raised "
            "alone is known to ruin runs (0.65 nats at 4 in reproduce/RESULTS.md). Raise emb, qk "
            f"and ffn with it, give vo {most:g} or less, or set blockwise.guard=false."
        )


def _check_warmup(config: TrainConfig, chosen: Ratios) -> None:
    warmup, steps = warmup_steps(config.train), config.train.steps
    kind, ratio = max(chosen.by_type.items(), key=lambda item: item[1])
    if config.blockwise.stretch_warmup and warmup * ratio >= steps:
        raise ConfigError(
            f"the warm-up of {kind} takes {warmup * ratio:g} steps (train.warmup × {ratio:g}), and "
            f"the run has {steps}. Give a shorter train.warmup, or blockwise.stretch_warmup=false."
        )


def last_ratios(config: TrainConfig, parts: Sequence[Piece], checkpoint: Path) -> dict[str, float]:
    """Parameter → its rate over the run's in the last step before `checkpoint`; {} without ratios.

    Of `auto` by the ratios that were in force after that step.
    """
    blockwise = open_blockwise(config, parts)
    if blockwise is None:
        return {}
    state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    blockwise.load(state["blockwise"])
    step = max(0, state["step"] - 1)
    base = lr_at(step, config.train)
    return {name: blockwise.lr(step, kind) / base for name, kind in blockwise.kinds.items()}


@torch.no_grad()
def squares_by_type(
    kinds: Mapping[str, str], gradients: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Sum of squares (fp64) of this process's gradients of each block type."""
    found: dict[str, torch.Tensor] = {}
    for name, gradient in gradients.items():
        square = torch.linalg.vector_norm(gradient).double().square()
        kind = kinds[name]
        found[kind] = found[kind] + square if kind in found else square
    return found
