import dataclasses
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfulp.check.detect import Finding
from halfulp.check.examine import check
from halfulp.check.report import KL_IS_CHANGE, CheckReport, Verdict
from halfulp.errors import RunError
from halfulp.report import check_words as say
from halfulp.report.check_page import render_check, write_check
from halfulp.report.check_plots import colors, depth_figure, heat_figure
from halfulp.report.check_tables import plan_table

HOSTILE = (
    "\"><script>alert(1)</script><img src=x onerror=alert(2)>'$\\frac{}{$ &amp; \u202e\x1b 日本"
)


class Page(HTMLParser):
    """Tags, attributes and text of a page, without its style sheet."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data):
        self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def report() -> CheckReport:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    for p in model.parameters():
        p.data.mul_(3.0 if p.ndim > 1 else 1.0)
    ids = torch.randint(0, 61, (2, 48))
    formats = ("bf16", "e4m3", "nvfp4")
    return check(
        model, ids, held_out=ids.flip(1), formats=formats, target="bf16", budget=1e-3, lr=1e-4
    )


@pytest.fixture(scope="module")
def text(report) -> str:
    return render_check(report, name="runs/tiny", command="halfulp check runs/tiny")


@pytest.fixture(scope="module")
def odd(report) -> CheckReport:
    """Every number that can be missing is, and every name is hostile."""
    name = HOSTILE + "x" * 200
    broken, infinite, third = report.uniform
    rows = (
        dataclasses.replace(broken, measured_kl=math.nan, measured_flips=math.nan),
        dataclasses.replace(infinite, measured_kl=math.inf, predicted_kl=math.inf),
        dataclasses.replace(third, predicted_kl=math.nan, predicted_flips=math.nan, why=name),
    )
    first = dataclasses.replace(
        report.sites[0], name=name, kl=math.inf, share=math.nan, cumulative=math.nan, reason=name
    )
    heat = {
        (f"layers.0.{name}" if block == "layers.0.qk" else block): dict(cells)
        for block, cells in report.heat.items()
    }
    heat["head"]["e4m3"], heat["norm"]["bf16"] = math.inf, math.nan
    plan = dataclasses.replace(
        report.plan, predicted_kl=math.nan, measured_kl=math.inf, held_out_kl=math.nan,
        average_bits=math.nan, formats={**report.plan.formats, name: "bf16"}, policy=name,
    )  # fmt: skip
    return dataclasses.replace(
        report,
        model=name,
        verdict=Verdict(status="could not tell", sentence=f"{name} has no price."),
        uniform=rows,
        operands=rows,
        asked=rows[0],
        sites=(first, *report.sites[1:]),
        heat=heat,
        plan=plan,
        loss_nats=math.nan,
        backward=tuple(
            dataclasses.replace(e, measured_rel=math.nan, predicted_rel=math.nan, gemm=name)
            for e in report.backward
        ),
        findings=(Finding(kind="new", site=name, format="", value=math.nan, text=name),),
        notes=(name,),
    )


def test_first_screen_answers_whether_it_is_safe_and_where_the_trouble_is(report, text):
    page = Page(text)
    start = page.text[: page.text.index("Formats, predicted and measured")]
    assert report.verdict.sentence[1:] in start
    assert text.count("<strong>") == 3
    assert text.index("<h1>") < text.index('class="numbers"') < text.index("FP8")
    rows = {row.name: row for row in report.operands}
    assert ("FP8 (e4m3): safe." in start) == (rows["e4m3"].measured_kl <= report.budget)
    assert ("FP4 (nvfp4): not safe." in start) == (rows["nvfp4"].measured_kl > report.budget)
    block, share = say.costliest(say.block_costs(report, report.focus, "stored"))
    assert block in start
    assert f"{100 * share:.0f}\u00a0%" in start


def test_everything_measured_is_on_the_page(report, text):
    page = Page(text)
    for row in (*report.uniform, *report.operands, report.asked):
        assert say.kl(row.measured_kl) in page.text
    for site in report.sites:
        assert site.name in page.text
    for part in (
        KL_IS_CHANGE, *map(str, report.what_if), *report.keep, "Backward GEMMs", "Optimizer step",
        "Errors along the depth", "Ruled out", "halfulp check runs/tiny", report.plan.policy[:300],
        f"{report.tokens} tokens", f"{report.loss_nats:.3f} nats", say.kl(report.plan.held_out_kl),
    ):  # fmt: skip
        assert part.strip("\n") in page.text
    assert page.tags["svg"] == 2


def test_page_needs_nothing_from_elsewhere_and_is_reproducible(report, text):
    page = Page(text)
    assert len(text) < 500_000
    assert not page.tags.keys() & {"script", "iframe", "object", "embed", "base", "form", "img"}
    assert [v for v in page.values("src", "href") if not v.startswith(("#", "data:"))] == []
    assert re.findall(r"(?i)https?://|url\((?!#)|@import", text) == []
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    assert render_check(report, name="runs/tiny", command="halfulp check runs/tiny") == text


def test_missing_numbers_are_dashes_with_reasons_and_names_stay_text(odd):
    text = render_check(odd, name=HOSTILE, command=HOSTILE)
    page = Page(text)
    assert not page.tags.keys() & {"script", "img"}
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in page.text
    assert "\u202e" not in text
    assert re.findall(r"(?i)\b(?:nan|inf)\b(?! or inf)", page.text.replace("NaN or inf", "")) == []
    for reason in (
        "the run gave NaN or inf",
        "withheld",
        "no held-out text",
        "average bits unknown",
    ):
        assert reason in page.text
    assert "Could not tell." in page.text


@pytest.mark.parametrize("width", [1200, 420])
def test_browser_shows_no_error_no_overflow_and_no_texts_on_one_another(
    report, odd, tmp_path, width
):
    for made in (report, odd):
        path = write_check(made, tmp_path / "page.html", name="m" * 80, force=True)
        seen = browser.measure(path, tmp_path, width=width)
        assert seen["messages"] == []
        assert seen["scroll"] <= seen["window"]
        assert (seen["scripts"], seen["images"]) == (1, 0)
        for plot in seen["plots"]:
            assert plot["height"] > 100
            assert plot["texts"] > 10
            assert plot["touching"] == []
            assert plot["outside"] == []


def test_existing_file_is_not_replaced_without_force(report, tmp_path):
    out = write_check(report, tmp_path / "deep" / "check.html", name="first")
    with pytest.raises(RunError, match="exists"):
        write_check(report, out, name="second")
    assert write_check(report, Path(out), name="second", force=True) == out
    assert "second" in out.read_text()
    with pytest.raises(RunError, match="Name a file"):
        write_check(report, tmp_path, name="second", force=True)


def test_parts_that_were_not_asked_for_are_absent(report):
    bare = dataclasses.replace(
        report, profile=None, backward=(), updates=None, asked=None, findings=(), keep={}
    )
    text = Page(render_check(bare, name="bare")).text
    for title in ("Training", "Errors along the depth", "What was asked", "Findings"):
        assert title not in text
    assert "called from Python" in text


def test_ratio_outside_its_range_is_marked_with_its_cause(report):
    row = dataclasses.replace(report.operands[1], predicted_kl=1.0, measured_kl=0.1)
    site = next(s.name for s in report.every_site if s.family == "operand")
    seen = Finding(kind="flushed", site=site, format=row.name, value=0.5, text="half")
    found = dataclasses.replace(report, operands=(row,), findings=(seen,))
    assert '<b class="fail">10.00</b>' in render_check(found, name="r")
    assert say.cause(found, row, operands=True) == "in 1 site over 1 % of the entries become 0"
    assert say.cause(found, row, operands=False).startswith("no detector")
    assert say.cause(found, dataclasses.replace(row, predicted_kl=0.15), operands=True) == ""


def test_deep_models_have_a_panel_per_format_and_short_plans(report):
    cells = {"bf16": 1e-6, "e4m3": 2e-3}
    heat = {f"layers.{n}.{kind}": cells for n in range(32) for kind in ("qk", "vo", "ffn")}
    drawing = heat_figure({**heat, "head": cells}, 1e-3)
    assert drawing is not None
    assert "e4m3: 96 of 96 above the budget</text>" in drawing
    assert "bf16: none above</text>" in drawing
    plan = {f"layers.{n}.ffn.up": "e4m3" if n != 7 else "bf16" for n in range(32)}
    made = plan_table({**plan, "head": "fp16"})
    assert re.findall(r'scope="row">([^<]*)<', made) == ["0–6", "7", "8–31"]
    assert "Outside the layers" in made
    assert heat_figure({}, 1e-3) is None


def test_colors_change_at_the_budget():
    shades = colors(np.array([[np.nan, 0.0, 1e-5, 1e-3, 1.01e-3, 1.0, np.inf]]), 1e-3)[0]
    blue = shades[:, 2] > shades[:, 0]
    assert blue.tolist() == [True, True, True, True, False, False, False]
    assert shades[0, 3] == 0
    assert (np.diff(shades[1:4, 3].astype(int)) > 0).all()
    assert (shades[5] == shades[6]).all()


def test_depth_without_errors_is_not_drawn(report):
    assert report.profile is not None
    points = tuple(dataclasses.replace(p, linf=(0.0,) * 5) for p in report.profile.points)
    assert depth_figure(dataclasses.replace(report.profile, points=points)) is None


@pytest.mark.parametrize(
    ("value", "kl", "times"),
    [
        (3.14e-5, "3.1e-5", "0.031 ×"),
        (9.96e-4, "1.0e-3", "0.996 ×"),
        (1e-3, "1.0e-3", "1.000 ×"),
        (0.04, "4.0e-2", "40 ×"),
        (0.5, "5.0e-1", "500 ×"),
        (0.0, "0", "< 0.01 ×"),
        (math.nan, "–", "not finite"),
        (math.inf, "∞", "not finite"),
        (-1e-13, "−1.0e-13", "< 0.01 ×"),
    ],
)
def test_numbers_in_words(value, kl, times):
    assert (say.kl(value), say.times(value, 1e-3)) == (kl, times)


def test_narrowest_safe_formats_are_the_best_of_the_fewest_bits(report):
    base = report.operands[0]
    rows = [
        dataclasses.replace(base, name=name, measured_kl=kl)
        for name, kl in (("bf16", 1e-6), ("fp16", 1e-8), ("e4m3", 2e-3), ("nvfp4", math.nan))
    ]
    assert [r.name for r in say.narrowest(rows, 1e-3)] == ["fp16", "bf16"]
    assert [r.name for r in say.narrowest(rows, 1e-2)] == ["e4m3"]
    assert say.narrowest(rows, 1e-12) == []
