import math
import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import browser
import judged_sweeps as sweeps
import pytest
from test_page import HOSTILE, Page

from halfulp.errors import ConfigError, RunError
from halfulp.report.sweep_bars import bill_figure, figure_of, parts, times
from halfulp.report.sweep_executive import write_executive
from halfulp.report.sweep_page import headline, judge, render_sweep, write_sweep
from halfulp.report.sweep_plots import _limits, rate, rate_figure
from halfulp.report.sweep_tables import amount, failures
from halfulp.sweep.failures import Failures
from halfulp.sweep.inputs import Inputs
from halfulp.sweep.money import Cost
from halfulp.sweep.ranges import Range, exactly

GIVEN = Inputs(gpu="H200", price_usd=3.5, gpu_hours=12_000, speedup=1.35, tokens=2e12)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """Of every recipe: one run lost, one not done, one recipe refused."""
    made = sweeps.design([*sweeps.CURVES, "nvfp4"])
    found = []
    for result in sweeps.results(made):
        at = (result.recipe, result.lr, result.seed)
        if at == ("te_current", 1e-1, 1):
            stalled = {"status": "stalled", "message": "no step for 600 s"}
            result = replace(result, **stalled, loss_nats=math.nan, initial_nats=math.nan)
        if at != ("mask_e8m2", 1e-1, 2):
            found.append(result)
    return sweeps.write(tmp_path_factory.mktemp("sweep") / "grid", made, found)


@pytest.fixture(scope="module")
def judged(sweep):
    return judge(sweep, inputs=GIVEN)


@pytest.fixture(scope="module")
def path(judged, tmp_path_factory):
    return write_sweep(judged, tmp_path_factory.mktemp("page") / "sweep.html")


@pytest.fixture(scope="module")
def text(path):
    return path.read_text()


def test_verdicts_stand_first_and_name_every_recipe(judged, path, text):
    page = Page(path)
    assert text.index("<h1>") < text.index('class="findings"') < text.index("<svg")
    assert "fp8_unscaled, mask_e4m7 and mask_e8m2 fail" in headline(judged)
    assert "could not be told" in headline(judged)
    for verdict in judged.verdicts:
        assert verdict.sentence in page.text
        assert all(change in page.text for change in verdict.changes)


def test_what_is_lost_missing_or_refused_is_named(text, judged):
    assert "104 of 105 runs done, 1 lost" in text
    assert "mask_e8m2 on stdlib: 1 of 15" in text
    assert "no step for 600 s" in text
    assert sweeps.REFUSED in text
    assert "with 1 lost: 0/15 … 1/15" in text  # of te_current, at all rates


def test_damaged_records_are_named(tmp_path):
    made = sweeps.design(["bf16_amp", "te_current"])
    path = sweeps.write(tmp_path / "torn", made, sweeps.results(made)[:8])
    with open(path / "events.jsonl", "a") as file:
        file.write('{"event": "result", "id": "x", "recipe"\n')
    assert "1 damaged in the record" in render_sweep(judge(path))


def test_failed_runs_stand_in_the_matrix_with_their_reasons(text):
    row = next(r for r in re.findall(r"<tr>.*?</tr>", text) if ">fp8_unscaled</th>" in r)
    cells = re.findall(r'class="cell"[^>]*title="([^"]*)"[^>]*>(\d/\d)', row)
    assert cells == [
        *[("none failed", "0/3")] * 3,
        *[("3 not finite", "3/3")] * 2,
    ]  # it diverges above 2e-2


def test_every_statistic_is_in_the_table_with_its_n(text):
    table = text[text.index("Everything in one table") :]
    for recipe in sweeps.CURVES:
        assert table.count(f'scope="row">{recipe}<') == 1
    assert "n = 3" in table
    assert "too short" in table


def test_the_split_says_how_much_of_the_gap_is_bias(text):
    part = text[text.index("Truncation bias and resolution") :]
    gap, bias = (float(x) for x in re.findall(r">\+(\d\.\d+)<small>", part)[:2])
    assert gap == pytest.approx(0.060, abs=0.01)
    assert bias == pytest.approx(0.056, abs=0.01)


def test_the_bill_is_there_only_when_money_was_named(sweep, text):
    assert "What it costs until one run has succeeded" in text
    assert "no bill" not in text
    without = render_sweep(judge(sweep))
    assert "so there is no bill" in without
    assert "US dollars" not in without


def test_the_page_is_the_same_for_the_same_sweep_and_is_not_replaced(judged, path, text):
    assert render_sweep(judged) == text
    with pytest.raises(RunError, match="exists"):
        write_sweep(judged, path)


def test_a_plain_run_is_no_sweep(tmp_path):
    import synthetic

    with pytest.raises(RunError, match="no sweep"):
        judge(synthetic.write_run(tmp_path / "run", "fp32"))


def test_inputs_for_a_recipe_that_is_not_there_are_refused(sweep):
    with pytest.raises(ConfigError, match="te_curent"):
        judge(sweep, inputs=Inputs(speedup={"te_curent": 1.3}))


@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_sweep_that_has_just_begun_has_a_page(tmp_path, done):
    made = sweeps.design(["bf16_amp", "te_current"])
    path = sweeps.write(tmp_path / "begun", made, sweeps.results(made)[:done])
    found = judge(path, inputs=GIVEN)
    assert "te_current could not be told" in headline(found)
    assert f"{done} of 30 runs done" in render_sweep(found)


def test_the_curve_is_seen_where_most_runs_failed():
    def outcome(loss: float, failure: str | None) -> SimpleNamespace:
        return SimpleNamespace(score_nats=loss, failure=failure)

    def point(mean: float, *outcomes: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(mean_nats=mean, outcomes=outcomes)

    best = point(3.24, outcome(3.19, None), outcome(3.29, "no better than unigrams"))
    far = point(5.5, outcome(5.5, "not finite"))
    row: Any = SimpleNamespace(points=[best, far])
    limits = _limits([row])
    assert limits is not None
    low, high = limits
    assert 3.1 < low < 3.19
    assert 3.24 < high < 3.3


def test_two_data_sets_have_a_figure_and_a_row_each(tmp_path):
    made = sweeps.design(["bf16_amp", "te_current"], data={"a": ["stdlib"], "b": ["text"]})
    text = render_sweep(judge(sweeps.write(tmp_path / "two", made, sweeps.results(made))))
    assert text.count('aria-labelledby="rates-') == 2
    assert text.count("te_current<small>a</small>") == 1
    assert text.count("te_current<small>b</small>") == 1


def test_text_from_outside_stays_text(tmp_path):
    data = HOSTILE + "x" * 300
    made = sweeps.design(["bf16_amp", "te_current"], data={data: ["text"]}, seeds=2)
    broken = {"status": "nonfinite", "message": HOSTILE, "loss_nats": math.nan}
    found = [replace(r, **broken) for r in sweeps.results(made)]
    judged = judge(sweeps.write(tmp_path / "hostile", made, found), inputs=GIVEN)
    page = Page(write_sweep(judged, tmp_path / "s.html", title=HOSTILE))
    decision = Page(write_executive(judged, tmp_path / "e.html", title=HOSTILE, command=HOSTILE))
    for made_page in (page, decision):
        assert not made_page.tags.keys() & {"script", "img", "iframe"}
    assert "alert(1)" in page.text


def test_a_window_at_the_edge_of_the_grid_is_a_lower_bound(tmp_path):
    made = sweeps.design(["bf16_amp", "te_current"], lrs=(5e-3, 1e-2, 2e-2))
    found = judge(sweeps.write(tmp_path / "edge", made, sweeps.results(made)))
    drawing = rate_figure(found.table.rows(), found.table.seeds)
    assert drawing is not None
    assert drawing.count("≥ 2.0 octaves") == 2


def test_a_bar_is_split_in_proportion_and_an_infinite_one_is_not_drawn():
    whole = Range(value=1.25, low=1.0, high=2.0)
    cost = Cost(recipe="a", retries=whole, search=exactly(1.25), ratio=exactly(0.5))
    assert parts(cost) == pytest.approx((0.4, 0.1, 0.5))
    endless = replace(cost, recipe="b", search=exactly(math.inf), ratio=exactly(math.inf))
    one, two = bill_figure([cost], "x"), bill_figure([cost, endless], "x")
    assert one is not None
    assert two is not None
    assert one.count("var(--series-1)") == two.count("var(--series-1)") == 1
    assert bill_figure([replace(cost, ratio=None)], "x") is None


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (times(Range(value=0.79, low=0.7, high=0.914)), "0.79× [0.70, 0.91]"),
        (times(exactly(math.inf)), "∞"),
        (figure_of(math.nan), "–"),
        (rate(3.16e-3), "3.2e−3"),
        (rate(1e-2), "1e−2"),
        (amount(44_432.0), "44,400"),
        (re.sub("<.*?>", " ", str(failures(Failures(0, 5)))), "0/5 p ≤ 45\u00a0% "),
    ],
)
def test_numbers_as_a_reader_wants_them(found, said):
    assert found == said


@pytest.mark.parametrize("width", [1280, 480])
def test_the_page_opens_in_a_browser_and_nothing_overlaps(path, tmp_path, width):
    found = browser.measure(path, tmp_path, width=width)
    assert not found["messages"]
    assert found["scroll"] <= found["window"]
    assert len(found["plots"]) == 3
    for plot in found["plots"]:
        assert plot["texts"] > 5
        assert not plot["touching"]
        assert not plot["outside"]
