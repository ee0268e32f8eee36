"""The band of gamma: published values, the table by beta, and what may be said."""

import math

import pytest

from halfulp.errors import PlanError
from halfulp.plan.kausik import emergence, growth_of, published
from halfulp.plan.laws import load_law


def test_rounded_chinchilla_gives_the_published_band():
    band = growth_of(0.28)
    assert (band.low, band.high, band.middle) == pytest.approx((0.44, 0.72, 0.58), abs=1e-12)
    assert (published().low, published().high) == pytest.approx((band.low, band.high), abs=1e-12)
    least, most = band.doubling
    assert most == pytest.approx(4.832, abs=1e-3)
    assert pytest.approx(3.304, abs=1e-3) == 2 ** (1 / 0.58)
    assert least == pytest.approx(2.619, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "low", "high", "least", "most"),
    [
        ("hoffmann", 0.440, 0.720, 2.62, 4.83),
        ("hoffmann_tex", 0.430, 0.715, 2.64, 5.01),
        ("muennighoff", 0.295, 0.647, 2.92, 10.5),
        ("epoch", 0.268, 0.634, 2.98, 13.2),
        ("precision", 0.007, 0.504, 3.96, None),
        ("floating", None, 0.484, 4.19, math.inf),
    ],
)
def test_the_band_moves_with_the_exponent_of_the_law(name, low, high, least, most):
    band = growth_of(load_law(name).coefficients["beta"])
    assert band.high == pytest.approx(high, abs=6e-4)
    assert band.low == (None if low is None else pytest.approx(low, abs=6e-4))
    assert band.doubling[0] == pytest.approx(least, rel=2e-3)
    if most is not None:
        assert band.doubling[1] == pytest.approx(most, rel=4e-3)
    else:
        assert band.doubling[1] > 1e30


def test_parameters_are_anchored_on_the_reference():
    band = published()
    assert band.parameters(2e10, n_ref=1e9, d_ref=2e10) == (1e9, 1e9)
    low, high = band.parameters(2e11, n_ref=1e9, d_ref=2e10)
    assert (low / 1e9, high / 1e9) == pytest.approx((10**0.44, 10**0.72))
    low, high = band.parameters(2e9, n_ref=1e9, d_ref=2e10)
    assert (low / 1e9, high / 1e9) == pytest.approx((10**-0.72, 10**-0.44))
    assert growth_of(0.6).parameters(2e11, n_ref=1e9, d_ref=2e10)[0] == 1e9


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.2, math.nan])
def test_an_exponent_that_gives_no_band_is_refused(beta):
    with pytest.raises(PlanError, match="between 0 and 1"):
        growth_of(beta)


def test_emergence_always_names_its_n_and_tokenizer():
    found = emergence({8: 128e6, 5: 86e6}, 100e6, unit="token", tokenizer="bpe:32768")
    assert [e.n for e in found] == [5, 8]
    assert [e.open for e in found] == [False, True]
    for e in found:
        assert e.sentence.startswith(f"n = {e.n}: ")
        assert "bpe:32768" in e.sentence
    assert "may still uncover" in found[1].sentence
    assert "may still uncover" not in found[0].sentence
