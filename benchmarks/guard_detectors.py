"""The alarms that users have today, each by its published rule: peers of halfulp's guard.

Every class reads one run, step by step, and answers whether its rule calls the step abnormal. What
a rule does while it warms up and with values that are not finite is what the named release does.
Their actions are left out: a rule that would have ended the run goes on observing.
"""

import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class Detector(Protocol):
    """A rule over the loss, the gradient norm (before clipping) and the norm of each unit."""

    @property
    def name(self) -> str: ...

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        """True if this step is an alarm; to be called once for every step, in order."""
        ...


def peers(steps: int) -> list[Detector]:
    """Every peer at its defaults, fresh, for a run of `steps` steps."""
    ratios = (2.0, 3.0, 5.0)
    rules = (OlmoSkipStep(), LightningSpike(), MegatronSpiky(), FoundryLossSpike.of_run(steps))
    return [*rules, *(Gnmr(ratio) for ratio in ratios), ZClip()]


@dataclass
class OlmoSkipStep:
    """The loss or the gradient norm lies more than 6 standard deviations above its mean.

    allenai/OLMo-core 3.0.0, olmo_core/optim/skip_step_optimizer.py, SkipStepOptimizer.

    * Mean and corrected standard deviation of up to `window` values before this one.
    * Active once half a window is seen, this step included.
    * Skipped steps enter the window as any other.
    * A value that is not finite is skipped, and so is every step until it has left the window:
      no comparison with its mean holds.
    """

    window: int = 128
    sigmas: float = 6.0
    losses: deque[float] = field(init=False)
    norms: deque[float] = field(init=False)

    @property
    def name(self) -> str:
        return f"OLMo-core {self.sigmas:g}σ"

    def __post_init__(self) -> None:
        self.losses, self.norms = deque(maxlen=self.window), deque(maxlen=self.window)

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        active = len(self.losses) + 1 >= max(2, self.window // 2)
        alarm = active and not (self._within(loss, self.losses) and self._within(norm, self.norms))
        self.losses.append(loss)
        self.norms.append(norm)
        return alarm

    def _within(self, value: float, past: deque[float]) -> bool:
        mean = _mean(past)
        squares = sum((x - mean) ** 2 for x in past)
        deviation = math.sqrt(squares / (len(past) - 1)) if len(past) > 1 else math.nan
        return value - mean <= self.sigmas * deviation


@dataclass
class LightningSpike:
    """The loss has risen, and is 3 times the running mean of 10 or more (`rtol` 2 above it).

    lightning 2.6.6, lightning/fabric/utilities/spike.py, SpikeDetection, also the callback of
    lightning.pytorch; the mean is torchmetrics 1.9.0's Running(MeanMetric).

    * Never while the loss is no higher than the last one; `atol` and `rtol` must both be exceeded.
    * The loss of an alarm does not enter the mean.
    * `finite_only` (their default) calls every loss that is not finite a spike; without it such a
      NaN is none, and does not enter the mean. (Their docstring says the reverse.)
    * The first `warmup` steps are never judged. A NaN among them leaves the mean alone, but takes a
      place of the window.
    """

    window: int = 10
    warmup: int = 1
    atol: float | None = None
    rtol: float | None = 2.0
    finite_only: bool = True
    past: deque[float] = field(init=False)
    last: float = field(default=0.0, init=False)
    seen: int = field(default=0, init=False)
    name: str = field(default="Lightning SpikeDetection", init=False)

    def __post_init__(self) -> None:
        self.past = deque(maxlen=self.window)

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        judged = self.seen >= self.warmup
        self.seen += 1
        if judged and self._is_spike(loss):
            return True
        if self.finite_only or math.isfinite(loss):
            self.past.append(loss)
            self.last = loss
        return False

    def _is_spike(self, loss: float) -> bool:
        if self.finite_only and not math.isfinite(loss):
            return True
        if loss - self.last <= 0:
            return False
        mean = _mean(x for x in self.past if not math.isnan(x))
        far = abs(loss - mean)
        absolute = self.atol is None or far >= abs(self.atol)
        return absolute and (self.rtol is None or far >= abs(self.rtol * mean))


@dataclass
class MegatronSpiky:
    """A loss or gradient norm of 10 times the largest of the first 100, or one that is not finite.

    megatron-core 0.16.1, core/rerun_state_machine.py (is_unexpectedly_large, validate_result) and
    core/distributed/param_and_grad_buffer.py (check_grads): --check-for-spiky-loss and
    --check-for-large-grads with the NaN check and the rerun mode that are on by default.

    * The first step is not validated at all, so the sample is that of steps 2 to 101.
    * Values that are not finite stay out of the sample. The largest is never sampled again.
    * A loss that is rejected ends the validation of its step: its gradients are not looked at.
    * Theirs judges each micro-batch and each bucket of gradients; here the step has one of both.
    """

    factor: float = 10.0
    sample: int = 100
    first: bool = field(default=True, init=False)
    counts: dict[str, int] = field(default_factory=dict, init=False)
    largest: dict[str, float] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        return f"Megatron {self.factor:g}× largest"

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        if self.first:
            self.first = False
            return False
        return self._rejects("loss", loss) or self._rejects("norm", norm)

    def _rejects(self, kind: str, value: float) -> bool:
        if not math.isfinite(value):
            return True
        count, largest = self.counts.get(kind, 0), self.largest.get(kind, 0.0)
        if count >= self.sample:
            return abs(value) >= self.factor * largest
        self.counts[kind], self.largest[kind] = count + 1, max(largest, abs(value))
        return False


@dataclass
class FoundryLossSpike:
    """The loss is twice the mean of its window for 5 steps in a row, or half the window is high.

    llm-foundry 0.22.0, llmfoundry/callbacks/kill_loss_spike_callback.py, KillLossSpike.

    * The window holds the losses before this one, outliers too; silent until it is full.
    * High: above `cap`, judged from step 2 `window` on. The rule as written lowers the cap to the
      largest loss of the first window. As released it stays at 10: the test for that moment asks
      for step number `window`, and the first step that is judged is the one after.
    * A NaN is no outlier, ends a row of them, and makes every mean NaN while in the window: no row
      can begin.
    """

    window: int = 100
    patience: int = 4
    multiplier: float = 2.0
    cap: float = 10.0
    past: deque[float] = field(init=False)
    seen: int = field(default=0, init=False)
    row: int = field(default=0, init=False)

    @property
    def name(self) -> str:
        return f"llm-foundry {self.multiplier:g}× mean, {self.patience + 1} steps"

    @classmethod
    def of_run(cls, steps: int) -> "FoundryLossSpike":
        """With the window that a run of `steps` steps gets: 5 % of it, 100 at least."""
        return cls(window=max(100, round(0.05 * steps)))

    def __post_init__(self) -> None:
        self.past = deque(maxlen=self.window)

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        self.seen += 1
        alarm = len(self.past) == self.window and (self._in_row(loss) or self._is_high())
        self.past.append(loss)
        return alarm

    def _in_row(self, loss: float) -> bool:
        self.row = self.row + 1 if loss >= self.multiplier * _mean(self.past) else 0
        return self.row > self.patience

    def _is_high(self) -> bool:
        high = sum(loss > self.cap for loss in self.past)
        return self.seen >= 2 * self.window and high >= self.window / 2


@dataclass
class Gnmr:
    """The gradient norm of some unit is more than `threshold` times its mean so far.

    GNMR, arXiv:2606.00539: a unit's gradient norm over its historical mean. Only the abstract was
    at hand; thresholds, history and the rest are this project's reading:

    * The mean is over all finite values before this one; silent until there are `warmup` of them.
    * From then on a norm that is not finite is an alarm; it never enters the mean.
    * Δ-GNMR, their second test for abrupt rises within a short window, is left out.
    """

    threshold: float
    warmup: int = 64
    sums: dict[str, float] = field(default_factory=dict, init=False)
    counts: dict[str, int] = field(default_factory=dict, init=False)

    @property
    def name(self) -> str:
        return f"GNMR > {self.threshold:g}"

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        over = [self._exceeds(unit, value) for unit, value in units.items()]
        return any(over)

    def _exceeds(self, unit: str, value: float) -> bool:
        total, count = self.sums.get(unit, 0.0), self.counts.get(unit, 0)
        if not math.isfinite(value):
            return count >= self.warmup
        self.sums[unit], self.counts[unit] = total + value, count + 1
        return count >= self.warmup and value * count > self.threshold * total


@dataclass
class ZClip:
    """The gradient norm is more than 2.5 standard deviations above its moving mean, and clipped.

    ZClip, arXiv:2504.02507, bluorion-com/ZClip 1acb085, zclip/zclip.py at its defaults. It clips
    such a gradient rather than skip it: its "alarms" are cheap, and meant to be frequent.

    * Mean and (uncorrected) variance of the first `warmup` norms, then moving by 1 - `alpha`; a
      clipped step moves them by its clipped norm.
    * An infinite norm is an alarm, and clipped to the mean. A NaN is none, and leaves both NaN for
      good: no alarm ever after.
    """

    alpha: float = 0.97
    sigmas: float = 2.5
    warmup: int = 25
    first: list[float] = field(default_factory=list, init=False)
    mean: float = field(default=math.nan, init=False)
    variance: float = field(default=math.nan, init=False)

    @property
    def name(self) -> str:
        return f"ZClip {self.sigmas:g}σ"

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        if len(self.first) < self.warmup:
            self.first.append(norm)
            self.mean = _mean(self.first)
            self.variance = _mean((x - self.mean) ** 2 for x in self.first)
            return False
        deviation = math.sqrt(self.variance)
        z = (norm - self.mean) / (deviation + 1e-6)
        alarm = z > self.sigmas
        self._move(self.mean + self.sigmas**2 * deviation / z if alarm else norm)
        return alarm

    def _move(self, norm: float) -> None:
        self.mean = self.alpha * self.mean + (1 - self.alpha) * norm
        self.variance = self.alpha * self.variance + (1 - self.alpha) * (norm - self.mean) ** 2


def _mean(values: Iterable[float]) -> float:
    """NaN of nothing; not finite if a value is not."""
    known = list(values)
    return sum(known) / len(known) if known else math.nan
