import numpy as np
import pytest

from halfulp.sweep.sensitivity import sensitivity

LRS = np.array([1e-3, 2e-3, 4e-3, 8e-3])
NAN = float("nan")


def test_a_hand_computed_grid():
    losses = np.array([[3.0, 3.2], [2.0, 2.2], [2.0, 2.4], [5.0, 5.2]])
    found = sensitivity(losses, losses, LRS)
    assert found is not None
    # Trapezoids over 3 octaves: (1.5 + 2 + 2 + 2.5) / 3 and (1.6 + 2.2 + 2.4 + 2.6) / 3.
    assert found.own.value == pytest.approx(((8 / 3 - 2.0) + (8.8 / 3 - 2.2)) / 2)
    assert found.own == found.reference
    assert found.own.n == 2


def test_a_recipe_that_is_equally_bad_everywhere_is_insensitive_to_its_own_best_only():
    reference = np.array([[2.5, 2.5], [2.0, 2.1], [2.2, 2.2], [4.0, 4.0]])
    found = sensitivity(reference + 1, reference, LRS)
    base = sensitivity(reference, reference, LRS)
    assert found is not None
    assert base is not None
    assert found.own.value == pytest.approx(base.own.value)
    assert found.reference.value == pytest.approx(base.reference.value + 1)


def test_rates_weigh_by_their_distance_in_octaves():
    lrs = np.array([1e-3, 2e-3, 16e-3])
    losses = np.array([[4.0, 4.0], [2.0, 2.0], [4.0, 4.0]])
    found = sensitivity(losses, losses, lrs)
    assert found is not None
    assert found.own.value == pytest.approx(1.0)  # a triangle of height 2, however wide its sides
    uneven = np.array([[2.0, 2.0], [2.0, 2.0], [4.0, 4.0]])
    found = sensitivity(uneven, uneven, lrs)
    assert found is not None
    assert found.own.value == pytest.approx(3 / 4)


def test_only_seeds_with_a_run_at_every_rate_count():
    losses = np.array([[3.0, 3.2, NAN], [2.0, 2.2, 1.0], [2.0, 2.4, 9.0], [5.0, 5.2, 9.0]])
    reference = np.array([[3.0] * 3, [2.0] * 3, [2.5] * 3, [5.0] * 3])
    found, two = (
        sensitivity(losses, reference, LRS),
        sensitivity(losses[:, :2], reference[:, :2], LRS),
    )
    assert found is not None
    assert two is not None
    assert found.reference == two.reference
    assert found.reference.n == 2


def test_nothing_is_said_without_a_known_run_or_with_one_rate():
    none = np.full((4, 3), NAN)
    some = np.ones((4, 3))
    assert sensitivity(none, some, LRS) is None
    assert sensitivity(some, none, LRS) is None
    assert sensitivity(some[:1], some[:1], LRS[:1]) is None
