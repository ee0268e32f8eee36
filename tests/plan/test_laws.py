"""The table of laws: complete, sourced, and the only place of its coefficients."""

import re
from collections import Counter
from pathlib import Path

import pytest

import halfulp
from halfulp.errors import PlanError
from halfulp.plan.laws import LOSS_KINDS, law_names, load_law

ROOT = Path(halfulp.__file__).parent


def test_every_law_has_a_formula_and_a_source():
    assert len(law_names()) >= 14
    for name in law_names():
        law = load_law(name)
        assert law.formula
        assert law.source
        assert law.read in ("source", "second hand")
        for low, high in law.ranges.values():
            assert 0 < low < high
        assert law.errors.keys() <= law.coefficients.keys()
        if law.kind != "form":
            assert law.coefficients
    assert set(law_names(*LOSS_KINDS)) == {"epoch", "hoffmann", "hoffmann_tex", "muennighoff"}


def test_published_coefficients_are_typed_once():
    """A coefficient of four digits or more that stands in two files will drift apart."""
    table = (ROOT / "plan" / "laws.toml").read_text()
    numbers = re.findall(r"\d+\.\d+", " ".join(re.findall(r"coefficients = .*", table)))
    digits = Counter(n for n in numbers if len(n.replace(".", "").lstrip("0")) >= 4)
    assert len(digits) > 20
    # alpha and beta of these two laws are equal.
    assert {n for n, times in digits.items() if times > 1} == {"0.3526596", "0.4965"}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("plan/*.py"), *ROOT.glob("cli/plan*.py")]:
        assert not set(re.findall(r"\d+\.\d+", file.read_text())) & digits.keys(), file


def test_a_law_that_is_like_another_keeps_what_it_does_not_change():
    printed, exact = load_law("hoffmann"), load_law("hoffmann_tex")
    assert exact.coefficients["A"] == printed.coefficients["A"]
    assert exact.coefficients["beta"] != printed.coefficients["beta"]
    assert exact.ranges == printed.ranges
    assert exact.warning
    assert printed.warning
    assert not load_law("epoch").warning


def test_outside_says_which_and_by_how_much():
    law = load_law("epoch")
    assert law.outside(N=1e9, D=2e10, C=1e20) == ()
    above, below = law.outside(N=3.2e10, D=1e8)
    assert "N = 3.2e+10 is 2 times above" in above
    assert "D = 1e+08 is below" in below
    assert load_law("kausik").outside(N=1e30) == ()


def test_unknown_law_names_the_nearest():
    with pytest.raises(PlanError, match="hoffmann"):
        load_law("hofmann")
