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
_LOSS_SPAN = 50  # steps over which the loss is averaged, and before which nothing is a spike
_NORM_SPAN = 10  # steps over which a gradient norm is averaged
_STRIDE = 10  # steps between two remembered norms


@dataclass(frozen=True)
class Alarm:
    """Why ratios must come down: those of the type `kind`, or all where it is None."""

    kind: str | None
    why: str


@dataclass
class Track:
    """The gradient norm of one block type."""

    norm: float  # exponential mean
    past: list[float] = field(default_factory=list)  # norms of the window, oldest first
    quiet_until: int = 0
    alarms: int = 0


@dataclass
class RateGuard:
    """Watches a run from step `start` on; `observe` every step that moved the weights."""

    start: int
    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    quiet_until: int = 0
    tracks: dict[str, Track] = field(default_factory=dict)

    def observe(self, step: int, loss_nats: float, norms: Mapping[str, float]) -> list[Alarm]:
        """Alarms of the finished step: a spike of the loss, gradient norms that run away."""
        alarms = []
        if (excess := self._spike(loss_nats)) and step >= max(self.start, self.quiet_until):
            self.quiet_until = step + QUIET
            why = f"the loss is {excess:.1f} standard deviations above its mean"
            alarms.append(Alarm(None, why))
        if step >= self.start:
            found = (self._runaway(step, kind, norm) for kind, norm in norms.items())
            alarms += [alarm for alarm in found if alarm is not None]
        return alarms

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        tracks = {
            kind: vars(track) | {"past": [*track.past]} for kind, track in self.tracks.items()
        }
        return {key: value for key, value in vars(self).items() if key != "start"} | {
            "tracks": tracks
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.seen, self.quiet_until = int(state["seen"]), int(state["quiet_until"])
        self.mean, self.variance = float(state["mean"]), float(state["variance"])
        self.tracks = {kind: Track(**track) for kind, track in state["tracks"].items()}

    def _spike(self, loss_nats: float) -> float:
        """By how many standard deviations the loss is too high; 0 where it is not."""
        self.seen += 1
        if self.seen == 1:
            self.mean = loss_nats
            return 0.0
        deviation, sigma = loss_nats - self.mean, math.sqrt(self.variance)
        spike = self.seen > _LOSS_SPAN and deviation > SIGMAS * sigma
        # A spike must not become the measure of the next one.
        counted = min(deviation, SIGMAS * sigma) if self.seen > _LOSS_SPAN else deviation
        share = max(1 / self.seen, 1 / _LOSS_SPAN)
        self.mean += share * counted
        self.variance += share * (counted**2 - self.variance)
        return deviation / sigma if spike and sigma else (math.inf if spike else 0.0)

    def _runaway(self, step: int, kind: str, norm: float) -> Alarm | None:
        track = self.tracks.setdefault(kind, Track(norm))
        track.norm += (norm - track.norm) / _NORM_SPAN
        lowest = min(track.past, default=math.inf)
        if (step - self.start) % _STRIDE == 0:
            track.past = [*track.past, track.norm][-WINDOW // _STRIDE :]
        if track.norm <= GROWTH * lowest or step < track.quiet_until:
            return None
        track.quiet_until, track.alarms, track.past = step + QUIET, track.alarms + 1, []
        times = track.norm / lowest
        return Alarm(kind, f"its gradient norm grew {times:.1f} times within {WINDOW} steps")
