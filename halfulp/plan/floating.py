"""What a floating-point format adds to the loss: Sun et al. 2025, arXiv:2501.02423."""

import math
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.plan.laws import load_law


@dataclass(frozen=True)
class Layout:
    """Exponent and mantissa bits beside the sign, and elements that share a scale.

    `block` None: one scale per channel.
    """

    exponent_bits: float
    mantissa_bits: float
    block: int | None = 128


def penalty(n: float, d: float, layout: Layout) -> float:
    """Loss in nats/token that training in `layout` adds.

    A lower bound for recipes that round every operand of every GEMM: the law was fitted with the
    weights and one activation rounded.
    """
    c = load_law("floating").coefficients
    return d ** c["beta"] / n ** c["alpha"] * _shared(layout) / _resolution(layout)


def loss(n: float, d: float, layout: Layout) -> float:
    """The whole loss in nats/token by the law's own coefficients."""
    c = load_law("floating").coefficients
    plain = c["E"] + c["A"] / n ** c["alpha"] + c["B"] / d ** c["beta"]
    return plain + penalty(n, d, layout)


def critical_tokens(n: float, layout: Layout) -> float:
    """The tokens beyond which more of them raise the loss of `n` parameters."""
    c = load_law("floating").coefficients
    square = c["B"] * n ** c["alpha"] * _resolution(layout) / _shared(layout)
    return square ** (1 / (2 * c["beta"]))


def best_layout(bits: float) -> tuple[float, float]:
    """Exponent and mantissa bits, as real numbers, of the least penalty with a sign and `bits`.

    Raises PlanError for fewer than 2 bits.
    """
    if not bits >= 2:
        raise PlanError(f"{bits:g} bits hold no sign, exponent and mantissa. Give 2 or more.")
    c = load_law("floating").coefficients
    mantissa = c["nu"] * bits / (c["delta"] + c["nu"]) - 0.5
    return bits - 1 - mantissa, mantissa


def _resolution(layout: Layout) -> float:
    c = load_law("floating").coefficients
    e, m = layout.exponent_bits + 0.5, layout.mantissa_bits + 0.5
    return c["gamma"] * e ** c["delta"] * m ** c["nu"]


def _shared(layout: Layout) -> float:
    c = load_law("floating").coefficients
    return c["channel_log2"] if layout.block is None else math.log2(layout.block)
