"""When a block learns too fast: rules on the loss and on each block type's gradient norm.

A function of what the steps report, which is the same on every process; no random numbers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SIGMAS = 6.0  # a loss this far above its mean is a spike
GROWTH = 3.0  # a gradient norm that grows so much within WINDOW steps is a runaway
WINDOW = 100
QUIET = 200  # steps after an alarm in which the same rule stays silent
_MEAN_SPAN = 50  # steps over which the loss is averaged, and before which nothing is a spike
_SHORT_SPAN = 10  # steps over which gradient norms are averaged, and the loss beside them
_STRIDE = 10  # steps between two remembered values


@dataclass(frozen=True)
class Alarm:
    """Why ratios must come down: those of the type `kind`, or all where it is None."""

    kind: str | None
    why: str


@dataclass
class Track:
    """A short mean, and what it was within the last WINDOW steps."""

    value: float
    past: list[float] = field(default_factory=list)  # oldest first
    quiet_until: int = 0
    alarms: int = 0

    def add(self, value: float, *, keep: bool) -> None:
        """Average `value` in; `keep`: remember the mean as it was."""
        if keep:
            self.past = [*self.past, self.value][-WINDOW // _STRIDE :]
        self.value += (value - self.value) / _SHORT_SPAN


@dataclass
class RateGuard:
    """Watches a run from step `start` on; `observe` every step that moved the weights."""

    start: int
    seen: int = 0
    mean: float = 0.0  # of the loss
    noise: float = 0.0  # mean square of the difference of two losses in a row
    last: float = 0.0
    quiet_until: int = 0
    loss: Track | None = None
    norms: dict[str, Track] = field(default_factory=dict)

    def observe(self, step: int, loss_nats: float, norms: Mapping[str, float]) -> list[Alarm]:
        """Alarms of the finished step.

        * A spike: the loss is SIGMAS standard deviations above its mean.
        * A runaway: a type's gradient norm has grown by GROWTH within WINDOW steps, and the loss
          has not fallen in that time. (While it falls, early in a run, norms grow as much.)
        """
        alarms = []
        excess = self._excess(loss_nats)
        if excess > SIGMAS and step >= max(self.start, self.quiet_until):
            self.quiet_until = step + QUIET
            why = f"the loss is {excess:.1f} standard deviations above its mean"
            alarms.append(Alarm(None, why))
        keep = step % _STRIDE == 0
        self.loss = self.loss or Track(loss_nats)
        self.loss.add(loss_nats, keep=keep)
        for kind, norm in norms.items():
            track = self.norms.setdefault(kind, Track(norm))
            track.add(norm, keep=keep and step >= self.start)
            if alarm := self._runaway(step, kind, track):
                alarms.append(alarm)
        return alarms

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        plain = {key: value for key, value in vars(self).items() if key != "start"}
        loss = dict(vars(self.loss)) if self.loss else None
        return plain | {"loss": loss, "norms": {k: dict(vars(t)) for k, t in self.norms.items()}}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.seen, self.quiet_until = int(state["seen"]), int(state["quiet_until"])
        self.mean, self.noise, self.last = (float(state[k]) for k in ("mean", "noise", "last"))
        self.loss = Track(**state["loss"]) if state["loss"] else None
        self.norms = {kind: Track(**track) for kind, track in state["norms"].items()}

    def _excess(self, loss_nats: float) -> float:
        """By how many standard deviations the loss is above its mean; 0 before there is a mean.

        The deviation is that of the noise: differences of two losses in a row do not see the fall
        of their mean.
        """
        self.seen += 1
        if self.seen == 1:
            self.mean = self.last = loss_nats
            return 0.0
        known, sigma = self.seen > _MEAN_SPAN, math.sqrt(self.noise / 2)
        deviation, change = loss_nats - self.mean, loss_nats - self.last
        excess = deviation / sigma if known and sigma else 0.0
        if known:  # a spike must not become the measure of the next one
            deviation = min(deviation, SIGMAS * sigma)
            change = math.copysign(min(abs(change), SIGMAS * sigma), change)
        share = max(1 / self.seen, 1 / _MEAN_SPAN)
        self.mean += share * deviation
        self.noise += share * (change**2 - self.noise)
        self.last = loss_nats
        return excess

    def _runaway(self, step: int, kind: str, track: Track) -> Alarm | None:
        assert self.loss is not None
        if not track.past or step < max(self.start, track.quiet_until):
            return None
        falls = bool(self.loss.past) and self.loss.value < self.loss.past[0]
        times = track.value / min(track.past) if min(track.past) else math.inf
        if falls or times <= GROWTH:
            return None
        track.quiet_until, track.alarms, track.past = step + QUIET, track.alarms + 1, []
        why = f"its gradient norm grew {times:.1f} times within {WINDOW} steps"
        return Alarm(kind, f"{why}, and the loss is no lower")
