import math

import browser
import numpy as np
import pytest
import synthetic
import torch
from test_page import HOSTILE, Page

from halfulp.errors import RunError
from halfulp.pieces import Piece
from halfulp.report import sharpness as say
from halfulp.report import write_report
from halfulp.report.price import price_all
from halfulp.report.read import read_runs
from halfulp.report.sharpness import Estimate, estimates, on_the_paper, order, overall, pairs, track
from halfulp.report.sharpness_page import headline, render_sharpness, write_sharpness
from halfulp.report.sharpness_plots import colors, layer_figure
from halfulp.sharpness.report import SharpnessReport

SHARP = {"emb": 1e-4, "qk": 5e-4, "ffn": 1e-3, "vo": 4e-3, "norm": 2e-2}


def report(sharp=None, *, draws=16, layers=3, scatter=0.1, name="w", **options) -> SharpnessReport:
    parts, means = [], []
    for kind, value in (sharp or SHARP).items():
        for layer in [None] if kind in ("emb", "pos", "head") else range(layers):
            parts.append(Piece(f"{name}.{layer}.{kind}", kind, layer, 100))
            means.append(100 * value * (1 + (layer or 0) / 10))
    noise = np.random.default_rng(0).lognormal(0, scatter, (draws, len(parts)))
    fields = {"model": "Tiny", "estimator": "gnb", "positions": 512, "loss_nats": 3.2, "seed": 0}
    traces = torch.tensor(noise * means, dtype=torch.float64)
    return SharpnessReport(**{**fields, **options}, pieces=tuple(parts), traces=traces)


@pytest.fixture(scope="module")
def sharp_runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("sharp")
    early = lambda block, t: synthetic.sharpness_of(block, 0.6 * t)  # noqa: E731
    back = lambda block, t: synthetic.sharpness_of(block, 1 - t)  # noqa: E731
    return [
        synthetic.write_run(root / "fp32", "fp32", scatter=0.0, sharp=synthetic.sharpness_of),
        synthetic.write_run(root / "te", "te_current", price=0.003, sharp=early),
        synthetic.write_run(root / "back", "nvfp4", price=0.008, sharp=back),
        synthetic.write_run(root / "none", "bf16_weights", price=0.2),
    ]


def test_a_run_says_whether_the_order_of_the_paper_holds(sharp_runs, tmp_path):
    text = Page(write_report(sharp_runs, tmp_path / "report.html")).text
    assert (
        "fp32. Over the last six measurements, up to step 500: emb < qk < ffn < vo < norm." in text
    )
    assert "The paper's order emb < qk < ffn < vo < norm holds." in text
    assert "qk < ffn and vo < norm are reversed" in text
    records = read_runs(sharp_runs)
    verdicts = [overall(pairs(t.at_the_end())) for t in map(track, records) if t]
    assert verdicts[0] == "pass"
    assert verdicts[2] == "fail"
    assert track(records[3]) is None


def test_types_pool_layers_by_traces_over_parameters(sharp_runs):
    found = track(read_runs(sharp_runs)[0])
    assert found is not None
    rows = [i for i, block in enumerate(found.blocks) if block.endswith("norm")]
    assert len(rows) == synthetic.LAYERS + 1  # the final norm is one of them
    pooled = (found.values[rows] * found.parameters[rows, None]).sum(0)
    assert found.by_type()["norm"] == pytest.approx(pooled / found.parameters[rows].sum())
    end = found.at_the_end()["norm"]
    values = np.log(found.by_type()["norm"][-6:])
    assert end.sharpness == pytest.approx(math.exp(values.mean()))
    assert end.half == pytest.approx(2.571 * values.std(ddof=1) / math.sqrt(6), rel=0.01)


@pytest.mark.parametrize(
    ("half", "verdict", "said"),
    [
        (0.1, "pass", "emb < qk"),
        (2.0, "could not tell", "emb ~ qk"),
        (math.inf, "could not tell", "~"),
    ],
)
def test_intervals_decide_what_is_told_apart(half, verdict, said):
    found = {"emb": Estimate(1.0, half, 1), "qk": Estimate(2.0, half, 1)}
    assert overall(pairs(found)) == verdict
    assert said in order(found)
    back = {"emb": Estimate(2.0, half, 1), "qk": Estimate(1.0, half, 1)}
    assert overall(pairs(back)) == ("fail" if verdict == "pass" else verdict)


def test_a_measurement_that_did_not_take_place_or_is_zero_is_not_ranked():
    found = {"emb": Estimate(0.0, 0.1, 1), "qk": Estimate(math.nan, 0.1, 1)}
    assert order(found) == "none measured"
    assert on_the_paper(pairs(found)).startswith("There are not two")
    assert overall(pairs(found)) == "could not tell"
    assert "no two of the paper's block types" in headline(found)


def test_the_first_screen_is_a_verdict_and_three_numbers(tmp_path):
    ratios = {"paper": {"emb": 10.0, "qk": 8.0}}
    rounding = [{"block": "emb", "e4m3": 1.5e-3, "int4": None}]
    made = report(notes=("Parameters are bfloat16.",), cost_steps=18.2)
    path = write_sharpness(
        made,
        tmp_path / "s.html",
        name="tiny",
        ratios=ratios,
        rounding=rounding,
        command="halfulp x",
    )
    page = Page(path)
    text = path.read_text()
    assert text.index("<h1>") < text.index('class="numbers"') < text.index("<table>")
    assert text.count("<strong>") == 3
    assert "emb is the flattest block type and norm the sharpest, 2" in page.text
    assert "The paper's order emb < qk < ffn < vo < norm holds." in page.text
    for said in ("16 draws of 512 positions", "Parameters are bfloat16.", "18.2 forward", "10×"):
        assert said in page.text
    assert "1.5e−3" in page.text  # of the rounding forecast
    assert page.tags["svg"] == 2
    with pytest.raises(RunError, match="exists"):
        write_sharpness(made, path, name="tiny")
    assert render_sharpness(made, name="a") == render_sharpness(made, name="a")


def test_estimates_are_means_with_intervals_of_student():
    made = report(draws=9, scatter=0.3)
    row = made.by_type["vo"]
    assert estimates(made)["vo"].sharpness == row.sharpness
    assert estimates(made)["vo"].half == pytest.approx(2.306 * row.rel_se, rel=0.01)
    assert math.isinf(estimates(report(draws=2))["vo"].half)


def test_eigenvalues_stand_beside_the_traces_or_alone():
    values = {"emb": 1.0, "qk": 3.1, "ffn": 2.1, "vo": 6.1, "norm": 0.09}
    both = render_sharpness(report(eigenvalues=values, estimator="lanczos"), name="m")
    assert "largest eigenvalue" in both
    assert "norm is the flattest block type and vo the sharpest, 68× apart" in both
    alone = report(eigenvalues=values, estimator="lanczos")
    empty = SharpnessReport(**{**vars(alone), "traces": torch.empty(0, len(alone.pieces))})
    assert "precision of the eigenvalues" in render_sharpness(empty, name="m")


@pytest.mark.parametrize("draws", [1, 2])
def test_few_draws_are_shown_without_an_interval(draws):
    text = render_sharpness(report(draws=draws), name="m")
    assert "some neighbors cannot be told apart" in text


def test_hostile_names_stay_text(tmp_path):
    made = report(name=HOSTILE, notes=(HOSTILE,))
    path = write_sharpness(
        made, tmp_path / "h.html", name=HOSTILE, command=HOSTILE,
        ratios={HOSTILE: {"emb": 2.0}}, rounding=[{HOSTILE: HOSTILE}],
    )  # fmt: skip
    page = Page(path)
    assert not page.tags.keys() & {"script", "img"}
    assert "<script>alert(1)</script>" in page.text


def test_deep_models_have_rows_that_fit(tmp_path):
    def fields(block, progress):
        return 1e-3 * (1 + int(block.split(".")[1]) if "." in block else 1)

    run = synthetic.write_run(tmp_path / "deep", "fp32", sharp=fields)
    events = run / "events.jsonl"
    lines = events.read_text().replace("layers.3.", "layers.47.")
    events.write_text(lines)
    text = write_report([run], tmp_path / "deep.html").read_text()
    assert "layers.47.qk" in text
    wide = layer_figure({"qk": {i: 1e-3 * (i + 1) for i in range(96)}})
    assert wide is not None


def test_colors_grow_with_sharpness_and_are_blank_where_there_is_none():
    shades = colors(np.array([[np.nan, 0.0, 1e-5, 1e-4, 1e-3, 1e-1]]), 1e-4, 1e-2)[0]
    assert shades[:2, 3].tolist() == [0, 0]
    assert (np.diff(shades[2:, 3].astype(int)) >= 0).all()
    assert shades[-1, 3] == 255 > shades[2, 3] > 0


@pytest.mark.parametrize(
    ("value", "text"),
    [(8.9e-3, "8.9e−3"), (0.45, "0.45"), (78925.0, "79,000"), (12.3, "12"), (math.nan, "–")],
)
def test_numbers_have_two_digits(value, text):
    assert say.number(value) == text


@pytest.fixture(scope="module")
def pages(sharp_runs, tmp_path_factory):
    root = tmp_path_factory.mktemp("pages")
    wide = report({**SHARP, "pos": 0.3, "head": 2e-4}, layers=12)
    return {
        "runs": write_report(sharp_runs, root / "runs.html"),
        "one": write_report(sharp_runs[:1], root / "one.html"),
        "measured": write_sharpness(wide, root / "m.html", name="tiny", ratios={"paper": SHARP}),
    }


@pytest.mark.parametrize("width", [1280, 420])
@pytest.mark.parametrize("name", ["runs", "one", "measured"])
def test_pages_have_no_texts_on_one_another(pages, tmp_path, name, width):
    seen = browser.measure(pages[name], tmp_path, width=width)
    assert seen["messages"] == []
    assert seen["scroll"] <= seen["window"]
    assert len(seen["plots"]) == {"runs": 4, "one": 4, "measured": 2}[name]
    for plot in seen["plots"]:
        assert plot["touching"] == []
        assert plot["outside"] == []


def test_how_often_a_run_measures_itself_makes_it_no_other_run(tmp_path):
    settings = {r: synthetic.config(r) for r in ("fp32", "te_current")}
    settings["te_current"]["sharpness"] = {"every": 7, "draws": 1}
    runs = [synthetic.write_run(tmp_path / r, r, settings=s) for r, s in settings.items()]
    prices = price_all(read_runs(runs), 0.01)
    assert prices[1].verdict == "pass"
