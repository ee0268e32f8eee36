"""Bits and floating-point layouts: golden values, optima and what is unstable."""

import math

import pytest

from halfulp.errors import PlanError
from halfulp.plan import floating
from halfulp.plan.chinchilla import chinchilla
from halfulp.plan.precision import (
    PARTS,
    Bits,
    least_bits,
    optimal_bits,
    parameter_share,
    precision_loss,
    ptq_loss,
)

LAYOUTS = {"bf16": (8, 7, 128), "e4m3": (4, 3, 128), "e2m1": (2, 1, 128)}


@pytest.mark.parametrize(
    ("bits", "everywhere", "weights"),
    [
        (16, 0.9937, 0.9966),
        (8, 0.8278, 0.9320),
        (7, 0.7404, 0.9011),
        (6, 0.6113, 0.8563),
        (5, 0.4271, 0.7911),
        (4, 0.1910, 0.6964),
    ],
)
def test_effective_parameters(bits, everywhere, weights):
    assert parameter_share(Bits(bits, bits, bits)) == pytest.approx(everywhere, abs=5e-5)
    assert parameter_share(Bits(w=bits)) == pytest.approx(weights, abs=5e-5)


def test_sixteen_bits_are_nearly_all_of_them_and_infinite_bits_are_all():
    assert 0.99 < parameter_share(Bits(16, 16, 16)) < 1
    assert parameter_share(Bits()) == 1.0
    assert precision_loss(1e8, 1e10, Bits()) == chinchilla("precision").loss(1e8, 1e10)
    assert precision_loss(1e8, 1e10, Bits(4, 4, 4)) > precision_loss(1e8, 1e10, Bits(8, 8, 8))


def test_optimal_bits_with_and_without_the_shifts():
    assert optimal_bits() == pytest.approx(7.00, abs=0.05)
    assert optimal_bits(shifted=False) == pytest.approx(3.47, abs=0.05)


def test_too_few_bits_are_unstable_and_not_a_number():
    with pytest.raises(PlanError, match=r"unstable: 3 bits of a .* more than 3\.11"):
        parameter_share(Bits(a=3))
    for part in PARTS:
        least = least_bits(part)
        with pytest.raises(PlanError, match="unstable"):
            parameter_share(Bits(**{part: least}))
        assert 0 < parameter_share(Bits(**{part: least + 0.01})) < 0.02


def test_quantizing_later_hurts_models_trained_for_longer():
    assert ptq_loss(1e9, 2e10, 3) > 3 * ptq_loss(1e9, 2e10, 4)
    assert ptq_loss(1e9, 2e11, 4) > ptq_loss(1e9, 2e10, 4) > ptq_loss(1e10, 2e10, 4) > 0


@pytest.mark.parametrize(
    ("name", "tokens"), [("bf16", 1.73e15), ("e4m3", 2.73e13), ("e2m1", 3.93e11)]
)
def test_critical_tokens(name, tokens):
    layout = floating.Layout(*LAYOUTS[name])
    found = floating.critical_tokens(1e9, layout)
    assert found == pytest.approx(tokens, rel=0.01)
    losses = [floating.loss(1e9, found * factor, layout) for factor in (0.9, 1.0, 1.1)]
    assert losses[1] == min(losses)


@pytest.mark.parametrize(("bits", "layout"), [(4, (2, 1)), (8, (4, 3)), (16, (8, 7))])
def test_best_layouts(bits, layout):
    exponent, mantissa = floating.best_layout(bits)
    assert exponent + mantissa + 1 == pytest.approx(bits)
    assert (round(exponent), round(mantissa)) == layout
    best = floating.penalty(1e9, 1e11, floating.Layout(exponent, mantissa))
    for step in (-0.05, 0.05):
        moved = floating.Layout(exponent + step, mantissa - step)
        assert floating.penalty(1e9, 1e11, moved) > best


@pytest.mark.parametrize(
    ("layout", "speed", "nats"), [((4, 3, 128), 1.4, 4e-4), ((2, 1, 16), 2.0, 1.8e-2)]
)
def test_penalty_of_formats_where_their_speed_takes_the_optimum(layout, speed, nats):
    n, d = chinchilla("epoch").allocate(speed * 1e22)
    assert floating.penalty(n, d, floating.Layout(*layout)) == pytest.approx(nats, rel=0.07)


def test_larger_blocks_and_channels_cost_more():
    costs = [floating.penalty(1e9, 1e11, floating.Layout(4, 3, b)) for b in (16, 32, 128, None)]
    assert costs == sorted(costs)
    assert costs[2] / costs[0] == pytest.approx(math.log2(128) / 4)
    with pytest.raises(PlanError, match="2 or more"):
        floating.best_layout(1.5)
