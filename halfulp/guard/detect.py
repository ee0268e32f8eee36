"""Spikes, slow worsening and divergence in the loss and the gradient norm of each step.

A function of what the steps report, which is the same on every process; no random numbers.
Gradient norms of healthy runs have heavy tails, so a norm that is an outlier is a spike only beside
a raised loss. And weights are watched themselves: their norms move slowly, whatever the optimizer
does.
"""

import math
import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

WINDOW = 128  # accepted steps that a new one is compared with
ACTIVE = 64  # of them before anything is called an outlier
SPIKE = 8.0  # robust standard deviations
_RAISED, _ALONE = 3.0, 32.0  # a gradient norm counts with a loss above this, or alone above that
_JUMP = 0.5  # least jump of the logarithm of a weight's norm that is called one
QUIET = 4.0  # below this everywhere, a step is quiet
_FLOORS = {"loss": 0.01, "norm": 0.05}  # least deviation: share of the median loss; log norm
_SHORT, _LONG = 10, 200  # spans of the two means of the loss
_SUSTAINED = 20  # steps in a row above the long mean
_DIVERGED_NATS = 0.5
_RECENT = 5  # steps whose median must be as high as their mean
_MANY, _WITHIN = 5, 50  # so many spikes within so many steps are a divergence


@dataclass(frozen=True)
class Trigger:
    """Why step `step` (1-based) is held: the rule, where the trouble began, and the numbers.

    `level` is the rung of the answer: 0 raise a precision, 1 withhold, 2 roll back, 3 roll back and
    change something.
    """

    kind: str  # nonfinite | weight | spike | sustained | divergence | numeric | irreproducible
    step: int
    onset: int
    level: int
    evidence: Mapping[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        numbers = ", ".join(f"{key} {value:.4g}" for key, value in self.evidence.items())
        return f"{self.kind} at step {self.step}" + (f" ({numbers})" if numbers else "")


@dataclass
class Window:
    """Accepted values, newest last, and how far a new one is from them."""

    kind: str  # loss | norm
    values: list[float] = field(default_factory=list)

    def scale(self) -> tuple[float, float]:
        """Median and robust standard deviation, 1.4826 times the median absolute deviation."""
        middle = statistics.median(self.values)
        spread = 1.4826 * statistics.median(abs(v - middle) for v in self.values)
        floor = _FLOORS[self.kind] * (abs(middle) if self.kind == "loss" else 1.0)
        return middle, max(spread, floor)

    def z(self, value: float) -> float:
        """Robust standard deviations above the median; 0 before the window is active."""
        if len(self.values) < ACTIVE:
            return 0.0
        middle, spread = self.scale()
        return (value - middle) / spread

    def add(self, value: float) -> None:
        """Take a value in, no higher than 3 standard deviations once the window is active."""
        if len(self.values) >= ACTIVE:
            middle, spread = self.scale()
            value = min(value, middle + 3 * spread)
        self.values = [*self.values, value][-WINDOW:]


@dataclass
class Detector:
    """Judges each step before its update; `accept` follows every update that was made."""

    loss: Window = field(default_factory=lambda: Window("loss"))
    norm: Window = field(default_factory=lambda: Window("norm"))
    seen: int = 0  # accepted steps
    recent: list[float] = field(default_factory=list)  # losses of the last steps
    short: float = math.nan  # mean of the loss over the last _SHORT steps
    long: float = math.nan  # the same, slower
    best_long: float = math.inf
    best_short: float = math.inf
    noise: float = 0.0  # standard deviation of the loss before this phase
    above: int = 0  # steps in a row that were above the long mean
    spikes: list[int] = field(default_factory=list)  # steps
    units: dict[str, float] = field(default_factory=dict)  # mean gradient norm per unit
    weights: dict[str, float] = field(default_factory=dict)  # last norm of each weight
    moved: dict[str, float] = field(default_factory=dict)  # its largest change so far, slowly less

    def judge(self, step: int, loss: float, norm: float) -> Trigger | None:
        """The worst that the (1-based) `step` shows, before its update."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return Trigger("nonfinite", step, step, 1, {"loss": loss, "gradient norm": norm})
        z = self.deviations(loss, norm)
        if self.is_spike(z["z loss"], z["z log norm"]):
            earlier = {s for s in self.spikes if step - s < _WITHIN}
            self.spikes = sorted(earlier | {step})
            if len(self.spikes) >= _MANY:
                first, self.spikes = self.spikes[0], []
                return Trigger("divergence", step, first, 3, {"spikes": _MANY, **z})
            return Trigger("spike", step, step, 1, z)
        return self._slow(step, loss)

    def jump(self, step: int, weights: Mapping[str, float]) -> tuple[Trigger, str] | None:
        """A weight whose norm is not what the last updates can have made of it, and its name.

        `weights` are the norms of the matrices before the update of `step`. Corrupted memory and
        wrong rescalings do this; an optimizer does not, whose steps have a usual size.
        """
        if self.seen < ACTIVE:
            return None
        for name, value in weights.items():
            if not math.isfinite(value):
                return Trigger("weight", step, step, 1, {"norm": value}), name
            change = self._change(name, value)
            if change > max(_JUMP, 4 * self.moved.get(name, math.inf)):
                evidence = {"norm": value, "norm before": self.weights[name]}
                return Trigger("weight", step, step, 1, evidence), name
        return None

    @staticmethod
    def is_spike(z_loss: Any, z_norm: Any) -> Any:
        """Whether deviations (numbers, or tensors on any device) are those of a spike."""
        return (z_loss > SPIKE) | (z_norm > _ALONE) | ((z_norm > SPIKE) & (z_loss > _RAISED))

    def deviations(self, loss: float, norm: float) -> dict[str, float]:
        """Robust z of the loss and of the logarithm of the gradient norm."""
        return {"z loss": self.loss.z(loss), "z log norm": self.norm.z(_log(norm))}

    def is_outlier(self, loss: float, norm: float) -> bool:
        """Whether a replay is as abnormal as a spike, by half of its threshold or more."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return True
        z = self.deviations(loss, norm)
        return self.is_spike(2 * z["z loss"], 2 * z["z log norm"])

    def is_quiet(self, loss: float, norm: float) -> bool:
        """Whether a step is unremarkable."""
        return max(self.deviations(loss, norm).values()) <= QUIET

    def accept(
        self,
        loss: float,
        norm: float,
        units: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Take a step that was made into the windows and means; `weights` as `jump` had them."""
        for name, value in (weights or {}).items():
            if self.weights.get(name):  # what has just left zero doubles at first
                moved = self.moved.get(name, 0.0) * (1 - 1 / WINDOW)
                self.moved[name] = max(moved, self._change(name, value))
            self.weights[name] = value
        self.recent = [*self.recent, loss][-_RECENT:]
        self.loss.add(loss)
        self.norm.add(_log(norm))
        self.seen += 1
        self.short = _mean(self.short, loss, _SHORT)
        # The long mean is as young as the run: at first it must not remember the beginning.
        self.long = _mean(self.long, loss, min(_LONG, max(_SHORT, self.seen // 4)))
        self.best_long, self.best_short = (
            min(self.best_long, self.long),
            min(self.best_short, self.short),
        )
        for unit, value in units.items():
            self.units[unit] = _mean(self.units.get(unit, math.nan), value, WINDOW)

    def growth(self, units: Mapping[str, float]) -> dict[str, float]:
        """Each unit's gradient norm over its mean (GNMR, arXiv:2606.00539), largest first."""
        known = {u: g / self.units[u] for u, g in units.items() if self.units.get(u)}
        return dict(sorted(known.items(), key=lambda item: -_rank(item[1])))

    def begin_phase(self) -> None:
        """Forget the windows: the learning rate has entered another phase."""
        self.noise = _noise(self.loss.values) or self.noise
        self.loss.values, self.norm.values, self.above = [], [], 0

    def state(self) -> dict[str, Any]:
        """Everything it knows, as plain values."""
        plain = {key: value for key, value in vars(self).items() if key not in ("loss", "norm")}
        return deepcopy(plain | {"loss": self.loss.values, "norm": self.norm.values})

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        for key, value in state.items():
            if key in ("loss", "norm"):
                getattr(self, key).values = list(value)
            else:
                kind = type(value)
                setattr(self, key, kind(value) if kind in (list, dict) else value)

    def _change(self, name: str, value: float) -> float:
        """How far the logarithm of a weight's norm has moved since the last step; 0 from zero."""
        before = self.weights.get(name)
        return abs(_log(value) - _log(before)) if before else 0.0

    def _slow(self, step: int, loss: float) -> Trigger | None:
        """Sustained worsening and divergence: of the mean that this step would give."""
        if self.seen < ACTIVE:
            return None
        short = _mean(self.short, loss, _SHORT)
        active = len(self.loss.values) >= ACTIVE  # not where a phase has just begun
        spread = self.loss.scale()[1] if active else max(self.noise, _noise(self.loss.values))
        # The best of noisy means lies below what is usual, by more the smaller the batch.
        bar = self.best_short + max(_DIVERGED_NATS, 3 * spread)
        # A single bad batch lifts the mean, but not the median.
        if min(short, statistics.median([*self.recent, loss][-_RECENT:])) > bar:
            evidence = {"mean loss": short, "best": self.best_short}
            return Trigger("divergence", step, step - self.above - _SHORT, 3, evidence)
        if not active:
            return None
        bar = self.best_long + max(4 * spread, 0.02 * abs(self.best_long))
        self.above = self.above + 1 if short > bar else 0
        if self.above < _SUSTAINED:
            return None
        onset, self.above = step - self.above - _SHORT, 0
        return Trigger("sustained", step, onset, 2, {"mean loss": short, "bar": bar})


def _mean(mean: float, value: float, span: int) -> float:
    return value if math.isnan(mean) else mean + (value - mean) * 2 / (span + 1)


def _noise(losses: list[float]) -> float:
    """Robust standard deviation of losses about their trend, from differences; 0 of too few."""
    steps = [abs(b - a) for a, b in pairwise(losses)]
    return 1.4826 * statistics.median(steps) / math.sqrt(2) if len(steps) >= _SHORT else 0.0


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf
