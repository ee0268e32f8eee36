"""Repeated tokens: the authors' own values, limits, and the optimum under few unique tokens."""

import math

import pytest

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import chinchilla
from halfulp.plan.repetition import repetition

PAPER = repetition()


def test_the_pair_of_the_authors_readme_to_the_last_digit():
    assert PAPER.loss(6.34e9, 242e9, 25e9) == pytest.approx(2.2256440889984477, rel=1e-12)
    assert PAPER.loss(8.67e9, 178e9, 25e9) == pytest.approx(2.2269634075087867, rel=1e-12)


@pytest.mark.parametrize(
    ("epochs", "worth"), [(1, 1.0), (2, 1.968), (4, 3.726), (8, 6.624), (16, 10.582), (40, 15.167)]
)
def test_worth_of_epochs(epochs, worth):
    _, d = PAPER.effective(1e9, epochs * 55e9, 55e9)
    assert d / 55e9 == pytest.approx(worth, abs=5e-4)


@pytest.mark.parametrize("base", ["muennighoff", "epoch"])
def test_without_a_limit_of_unique_tokens_it_is_the_plain_law(base):
    plain = chinchilla(base)
    law = repetition(plain)
    for n, d in ((1e8, 1e12), (1e10, 1e9), (3e9, 6e10)):
        assert law.loss(n, d) == pytest.approx(plain.loss(n, d), rel=1e-12)
    assert law.allocate(1e21) == plain.allocate(1e21)


def test_more_epochs_never_hurt_and_are_worth_a_bounded_number_of_tokens():
    losses = [PAPER.loss(1e9, e * 1e9, 1e9) for e in (0.5, 1, 2, 5, 20, 100, 1e4)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[1] > 0.1
    _, worth = PAPER.effective(1e9, 1e20, 1e9)
    assert 16.387 < worth / 1e9 < 16.388


@pytest.mark.parametrize(
    ("flops", "unique", "n", "epochs", "loss"),
    [
        (9.3e21, 25e9, 6.815e9, 9.1, 2.2251),
        (1e21, 1e10, 2.306e9, 7.23, 2.3851),
        (1e21, 1e9, 1.769e9, 94, 2.7620),
    ],
)
def test_optimum_under_few_unique_tokens(flops, unique, n, epochs, loss):
    found, d = PAPER.allocate(flops, unique)
    assert found == pytest.approx(n, rel=1e-3)
    assert d / unique == pytest.approx(epochs, rel=4e-3)
    best = PAPER.loss(found, d, unique)
    assert best == pytest.approx(loss, rel=1e-4)
    assert 6 * found * d / flops == pytest.approx(1, abs=1e-9)
    for factor in (0.9, 1.1):
        assert PAPER.loss(found * factor, d / factor, unique) > best


def test_plenty_of_unique_tokens_change_nothing():
    n, d = chinchilla("muennighoff").allocate(1e20)
    found, _ = PAPER.allocate(1e20, 1e4 * d)
    assert found == pytest.approx(n, rel=1e-5)


def test_no_unique_tokens_are_refused():
    for unique in (0.0, -1.0, math.nan):
        with pytest.raises(PlanError, match="unique tokens"):
            PAPER.loss(1e9, 1e9, unique)
