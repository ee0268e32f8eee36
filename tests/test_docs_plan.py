"""The figures in docs/plan.md are those that the commands beside them print."""

from pathlib import Path

import pytest

from halfulp.plan.budget import plan
from halfulp.plan.kausik import growth_of
from halfulp.plan.laws import load_law
from halfulp.report.amounts import digits
from halfulp.report.plan_tables import plan_rows

TEXT = (Path(__file__).parents[1] / "docs" / "plan.md").read_text(encoding="utf-8")


def test_the_example_is_what_the_planner_says():
    for what, value in plan_rows(plan("h100", gpu_hours=1000, gpus=8)):
        assert f"{what:<16}  {value}".replace("\u00a0", " ")[:90] in TEXT


@pytest.mark.parametrize("name", ["hoffmann", "hoffmann_tex", "muennighoff", "epoch", "floating"])
def test_the_table_of_bands_is_what_the_laws_give(name):
    beta = load_law(name).coefficients["beta"]
    band = growth_of(beta)
    low, high = band.doubling
    if band.low is None:
        row = f"no lower bound to {band.high:.3f} | at least {digits(low)} |"
    else:
        row = f"{band.low:.3f} to {band.high:.3f} | {digits(low)} to {digits(high)} |"
    assert f"| {name}, {round(beta, 4):g} | {row}" in TEXT
