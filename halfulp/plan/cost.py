"""From FLOPs to GPU-hours and money: hours = FLOPs / (peak x MFU x speed)."""

import math
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.hardware import Gpu
from halfulp.plan.said import said
from halfulp.speedups import Speed

SECONDS_PER_HOUR = 3600.0


def rate_flops(gpu: Gpu, mfu: float, speed: Speed, precision: str) -> float:
    """Training FLOPs per GPU-hour: the BF16 peak times MFU, times the speed of the precision.

    MFU is the share of the BF16 peak that training in BF16 reaches.
    Raises PlanError for an MFU outside (0, 1] and a speed beyond the peak of the precision;
    ConfigError for a precision that the GPU does not multiply.
    """
    if not (math.isfinite(mfu) and 0 < mfu <= 1):
        raise PlanError(
            f"an MFU of {mfu:g} is impossible: it is a share of the peak, above 0 and at most 1. "
            "Usual: 0.3 to 0.5."
        )
    if not (math.isfinite(speed.ratio) and speed.ratio > 0):
        raise PlanError(f"a speed of {speed.ratio:g} is impossible. Give a positive ratio.")
    reached = gpu.peak_flops() * mfu * speed.ratio
    peak = gpu.peak_flops(precision)
    if reached > peak:
        raise PlanError(
            f"{precision} at {speed.ratio:g} times BF16 with an MFU of {mfu:g} would be "
            f"{reached / 1e12:.4g} TFLOP/s, more than the {peak / 1e12:.4g} of {gpu.name}. "
            "Give a smaller --speed or --mfu."
        )
    return reached * SECONDS_PER_HOUR


def attention_share(width: float, parameters: float, layers: float, length: int) -> float:
    """FLOPs of attention scores over 6 N, for sequences of `length` tokens: 12 L d s / 6 N."""
    return 2 * layers * width * length / parameters


@dataclass(frozen=True, kw_only=True)
class Price:
    """Dollars per GPU-hour: what is reckoned with, and the ends of the listings."""

    usd: float
    low_usd: float
    high_usd: float
    source: str


def price_of(gpu: Gpu, own_usd: float | None = None) -> Price | None:
    """The user's price, or the middle of the listings; None where there are neither.

    Raises PlanError for a price that is not positive.
    """
    if own_usd is not None:
        if not (math.isfinite(own_usd) and own_usd > 0):
            raise PlanError(f"a price of {own_usd:g} $/GPU-hour is impossible. Give more than 0.")
        return Price(usd=own_usd, low_usd=own_usd, high_usd=own_usd, source=said("yours"))
    if gpu.price_usd is None:
        return None
    low, high = gpu.price_usd
    source = said("listings", date=gpu.price_date, source=gpu.price_source)
    return Price(usd=gpu.price_middle_usd, low_usd=low, high_usd=high, source=source)
