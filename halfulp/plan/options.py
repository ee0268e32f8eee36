"""One budget spent in several precisions: what each would reach, and where they cross."""

import math
from dataclasses import dataclass
from itertools import pairwise

from halfulp.plan.cost import Price
from halfulp.plan.inference import SERVING_FLOPS
from halfulp.plan.optimum import Setting
from halfulp.plan.precisions import Precision
from halfulp.plan.search import root_log
from halfulp.speedups import Speed

_WHOLE_LAYER = 2.0  # operands of a layer's three GEMMs over those that the law of formats rounds
_FASTEST = 16.0  # ratio of step times up to which a break-even is looked for
_DECADES_BELOW, _DECADES_ABOVE, _PER_DECADE = 3, 4, 3  # of the budgets that are compared


@dataclass(frozen=True, kw_only=True)
class Option:
    """A budget in one precision. Losses in nats per token; FLOPs and hours of training alone."""

    precision: str
    recipe: str
    speed: Speed
    parameters: float
    tokens: float
    unique_tokens: float | None  # None: as many as are needed
    flops: float
    gpu_hours: float
    cost_usd: float | None
    cost_range_usd: tuple[float, float] | None
    loss_nats: float
    band_nats: tuple[float, float] | None  # of the law; the penalty of the format is added
    penalty_nats: float
    serving_flops: float
    serving_gpu_hours: float  # at the same rate

    @property
    def tokens_per_parameter(self) -> float:
        """D / N."""
        return self.tokens / self.parameters

    @property
    def epochs(self) -> float | None:
        """How often each unique token is seen; None where their number is not limited."""
        return None if self.unique_tokens is None else self.tokens / self.unique_tokens


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a budget is spent in one precision: what is optimized, and how fast FLOPs are made."""

    precision: Precision
    speed: Speed
    setting: Setting
    flops_per_hour: float
    price: Price | None

    def option(self, flops: float) -> Option:
        """The optimum of `flops` of training."""
        n, d = self.setting.optimum(flops)
        hours = flops / self.flops_per_hour
        unique, penalty = self.setting.unique, self.setting.penalty(n, d)
        band = self.setting.law.band(n, d, unique)
        serving = SERVING_FLOPS * n * self.setting.served
        price = self.price
        return Option(
            precision=self.precision.name,
            recipe=self.precision.recipe,
            speed=self.speed,
            parameters=n,
            tokens=d,
            unique_tokens=unique if math.isfinite(unique) else None,
            flops=flops,
            gpu_hours=hours,
            cost_usd=None if price is None else hours * price.usd,
            cost_range_usd=price and (hours * price.low_usd, hours * price.high_usd),
            loss_nats=self.setting.loss(n, d),
            band_nats=None if band is None else (band[0] + penalty, band[1] + penalty),
            penalty_nats=penalty,
            serving_flops=serving,
            serving_gpu_hours=serving / self.flops_per_hour,
        )

    def gain_of_twice(self, flops: float) -> float:
        """What twice the compute lowers the loss by, in nats per token."""
        return self.setting.least_loss(flops) - self.setting.least_loss(2 * flops)

    def optimum_after(self, gpu_hours: float) -> tuple[float, float]:
        """Parameters and tokens of `gpu_hours`."""
        return self.setting.optimum(gpu_hours * self.flops_per_hour)

    def loss_after(self, gpu_hours: float) -> float:
        """The least loss of `gpu_hours`."""
        return self.setting.loss(*self.optimum_after(gpu_hours))


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A precision against the reference at equal GPU time.

    `gain_nats` at the budget of the plan; `break_even_speed` is the ratio of step times at which
    both reach the same loss there (None: no ratio up to 16 does); `penalty_margin` is how many
    times as large as the law's the loss added by the format may be before the gain is gone;
    `crossings_gpu_hours` are the budgets at which the sign of the gain changes; `curve` holds
    (GPU-hours, gain) over seven decades.
    """

    precision: str
    speed: Speed
    gain_nats: float
    break_even_speed: float | None
    penalty_margin: float
    crossings_gpu_hours: tuple[float, ...]
    curve: tuple[tuple[float, float], ...]

    @property
    def verdict(self) -> str:
        """Whether the precision pays at this budget: pass, fail or could not tell.

        It passes if even the slowest step time on record is beyond the break-even, and the format
        may add twice what the law says: the law rounds three of the six operands of a layer.
        """
        if self.break_even_speed is None or self.break_even_speed > self.speed.high:
            return "fail"
        sure = self.break_even_speed < self.speed.low and self.penalty_margin >= _WHOLE_LAYER
        return "pass" if sure else "could not tell"


def compare(way: Way, reference: Way, gpu_hours: float) -> Comparison:
    """`way` against `reference`, around a budget of `gpu_hours`."""

    def gain(hours: float) -> float:
        return reference.loss_after(hours) - way.loss_after(hours)

    steps = range(-_DECADES_BELOW * _PER_DECADE, _DECADES_ABOVE * _PER_DECADE + 1)
    curve = [(h, gain(h)) for h in (gpu_hours * 10 ** (k / _PER_DECADE) for k in steps)]
    crossings = [root_log(gain, a, b) for (a, x), (b, y) in pairwise(curve) if x * y < 0]
    here, added = gain(gpu_hours), way.setting.penalty(*way.optimum_after(gpu_hours))
    return Comparison(
        precision=way.precision.name,
        speed=way.speed,
        gain_nats=here,
        penalty_margin=max(0.0, 1 + here / added),
        break_even_speed=_break_even(way, reference, gpu_hours),
        crossings_gpu_hours=tuple(c for c in crossings if c is not None),
        curve=tuple(curve),
    )


def _break_even(way: Way, reference: Way, gpu_hours: float) -> float | None:
    target = reference.loss_after(gpu_hours)
    flops = gpu_hours * reference.flops_per_hour
    return root_log(lambda r: way.setting.least_loss(flops * r) - target, 1 / _FASTEST, _FASTEST)
