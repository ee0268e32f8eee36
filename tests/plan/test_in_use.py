"""Laws that a plan uses: bands, fits in files, and what is refused."""

import json

import pytest

from halfulp.errors import PlanError
from halfulp.plan.chinchilla import chinchilla
from halfulp.plan.in_use import FEWEST_DRAWS, open_law

INF = float("inf")
COEFFICIENTS = {"E": 1.8, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.36}


def write(path, **changes):
    rows = [[1.8 + k / 1000, 400.0, 1500.0, 0.34, 0.36] for k in range(-60, 61)]
    table = {
        "kind": "fit", "coefficients": COEFFICIENTS, "draws": rows, "runs": 42,
        "ranges": {"N": [1e7, 1e9], "D": [1e8, 1e10], "C": [1e16, 1e19]}, "source": "runs.csv",
    }  # fmt: skip
    path.write_text(json.dumps(table | changes))
    return str(path)


def test_the_band_of_the_default_law_is_that_of_its_runs():
    """The specification's own bootstrap gave 1.958 to 1.992 there, around 1.973."""
    law = open_law("epoch")
    low, high = law.band(70e9, 1.4e12, INF)
    assert low == pytest.approx(1.959, abs=3e-3)
    assert high == pytest.approx(1.993, abs=3e-3)
    # Independent errors of the published size would make it many times wider.
    assert high - low < 0.05
    assert law.center.loss(70e9, 1.4e12) == pytest.approx(1.973, abs=5e-4)
    assert law.law.errors["A"] == pytest.approx(
        (sum((d.A - law.center.A) ** 2 for d in law.draws) / len(law.draws)) ** 0.5, rel=0.1
    )


def test_laws_without_published_errors_have_no_band():
    for name in ("hoffmann", "hoffmann_tex", "muennighoff"):
        law = open_law(name)
        assert law.band(1e9, 2e10, INF) is None
        assert "no errors" in law.about_band
        assert law.plain == chinchilla(name)


def test_a_fit_of_ones_own_runs_is_a_law(tmp_path):
    law = open_law(write(tmp_path / "fit.json"))
    assert law.loss(1e9, 2e10, INF) == pytest.approx(chinchilla_of().loss(1e9, 2e10))
    low, high = law.band(1e9, 2e10, INF)
    assert high - low == pytest.approx(0.096, abs=1e-9)
    assert law.law.outside(N=1e10, D=1e9) != ()
    assert law.law.title == "fit of 42 runs"


def chinchilla_of():
    from halfulp.plan.chinchilla import Chinchilla

    return Chinchilla(**COEFFICIENTS)


def test_too_few_refits_make_no_band(tmp_path):
    few = [[1.8, 400.0, 1500.0, 0.34, 0.36]] * (FEWEST_DRAWS - 1)
    law = open_law(write(tmp_path / "fit.json", draws=few))
    assert law.band(1e9, 1e10, INF) is None
    assert "--bootstrap 100 or more" in law.about_band
    assert open_law(write(tmp_path / "fit.json", draws=[])).band(1e9, 1e10, INF) is None


@pytest.mark.parametrize(
    "changes",
    [{"kind": "plan"}, {"coefficients": {"E": 1.0}}, {"draws": [[1.0]]}, {"draws": 3},
     {"ranges": None}, {"ranges": {"N": [1e9, 1e7], "D": [1e8, 1e10], "C": [1e16, 1e19]}},
     {"ranges": {"N": [1e7, 1e9]}}, {"runs": "many"}, {"notes": 5},
     {"coefficients": COEFFICIENTS | {"A": 1e300}}, {"coefficients": COEFFICIENTS | {"E": True}}],
)  # fmt: skip
def test_what_is_no_fit_is_refused(tmp_path, changes):
    with pytest.raises(PlanError, match="no fit"):
        open_law(write(tmp_path / "fit.json", **changes))


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(PlanError):
        open_law(str(tmp_path / "missing.json"))
    (tmp_path / "torn.json").write_text('{"kind": "fit", ')
    with pytest.raises(PlanError):
        open_law(str(tmp_path / "torn.json"))
    with pytest.raises(PlanError):
        open_law(str(tmp_path / "missing.csv"))
