import pytest

from halfulp.train.counters import added, counts, shares


def test_energies_of_processes_add_and_their_shares_follow():
    """A process whose tensor is tiny loses all of it, and that is next to nothing of the whole."""
    row = {"gemm": "a", "n": 100, "saturated": 0.1, "underflow": 0.0, "amax": 2.0}
    large = row | {"energy": 99.0, "underflow_energy": 0.0}
    small = row | {"energy": 1.0, "underflow_energy": 1.0, "amax": 0.1}
    (both,) = added([[counts(large)], [counts(small)]])
    assert both["energy"] == 100
    assert both["underflow_energy"] == pytest.approx(0.01)
    assert (both["n"], both["saturated"], both["amax"]) == (200, 20, 2.0)
    assert shares(both)["saturated"] == pytest.approx(0.1)


def test_no_energy_loses_nothing():
    row = {"n": 4, "saturated": 0.0, "underflow": 0.0, "energy": 0.0, "underflow_energy": 0.0}
    assert added([[row], [row]])[0]["underflow_energy"] == 0
