import math
import re
import string
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import browser
import judged_sweeps as sweeps
import pytest

from halfulp.errors import ConfigError
from halfulp.report import sweep_words
from halfulp.report.sweep_choice import Choice, runs_to_show
from halfulp.report.sweep_executive import render_executive, write_executive
from halfulp.report.sweep_page import judge
from halfulp.report.sweep_plan import STAGES
from halfulp.report.sweep_words import LANGUAGES, TEXTS
from halfulp.sweep.cost import expected_runs
from halfulp.sweep.inputs import Inputs

GIVEN = Inputs(gpu="H200", price_usd=3.5, gpu_hours=12_000, speedup=1.35, tokens=2e12)
LISTED = Inputs(gpu="H200", gpu_hours=1_200_000, tokens=15e12)


def choice(tmp_path, recipes, *, seeds=3, inputs: Inputs | None = GIVEN, language="en") -> Choice:
    made = sweeps.design(recipes, seeds=seeds)
    path = sweeps.write(tmp_path / "sweep", made, sweeps.results(made))
    return Choice(judge(path, inputs=inputs), language)


def plain(text: str) -> str:
    body = re.sub(r"<svg.*?</svg>|<style.*?</style>", " ", text, flags=re.DOTALL)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", body)).replace("\u00a0", " ")


def test_the_languages_say_the_same_with_the_same_numbers():
    def fields(text: str) -> set[str]:
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}

    english, japanese = TEXTS["en"], TEXTS["ja"]
    assert set(TEXTS) == set(LANGUAGES)
    assert list(english) == list(japanese)
    assert all(fields(english[key]) == fields(japanese[key]) for key in english)
    same = [key for key in english if english[key] == japanese[key]]
    assert not same, f"not translated: {same}"
    assert all(text.count("|") == japanese[key].count("|") for key, text in english.items())


@pytest.mark.parametrize(
    ("value", "english", "japanese"),
    [
        (3e11, "300 billion", "3,000\u00a0億"),
        (8.53e12, "8.53 trillion", "8.53\u00a0兆"),
        (9.997e11, "1 trillion", "1\u00a0兆"),
        (163_840, "163,840", "16.4\u00a0万"),
        (512, "512", "512"),
    ],
)
def test_large_counts_have_no_exponents(tmp_path, value, english, japanese):
    judged = choice(tmp_path, ["bf16_amp", "te_current"]).judged
    assert (Choice(judged, "en").large(value), Choice(judged, "ja").large(value)) == (
        english,
        japanese,
    )


def test_a_recipe_that_passes_is_introduced_in_stages(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current", "mask_e4m7"], seeds=12)
    assert found.subject == "te_current"
    text = plain(render_executive(found.judged))
    assert "Introduce te_current in stages, in place of bf16_amp." in text
    for said in (
        "expected to cost $",
        "0 / 12",
        "1 Reference",
        "2 Pilot",
        "3 One real run",
        "4 Standard",
    ):
        assert said in text


def test_what_could_not_be_told_is_not_claimed(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"])
    text = plain(render_executive(found.judged))
    assert "Could not tell yet: stay with bf16_amp, and let a pilot of te_current decide." in text
    assert "at most 63 % fail (95 % confidence); bf16_amp: 0 / 3" in text
    assert "29 runs without a further failure" in text
    assert "under 0.001 % of the tokens" in text
    assert "Introduce te_current in stages" not in text


def test_where_all_fail_the_reference_stays_and_nothing_is_planned(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "mask_e4m7", "fp8_unscaled"])
    assert found.subject == ""
    text = plain(render_executive(found.judged))
    assert "Stay with bf16_amp: no lower precision came through." in text
    assert "There is nothing to introduce." in text
    assert "2 Pilot" not in text


def test_without_money_nothing_is_said_about_it(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"], inputs=None)
    text = plain(render_executive(found.judged))
    assert "this page says nothing about money" in text
    assert "$" not in text
    assert "What is assumed" not in text


def test_figures_that_nobody_gave_have_a_source_and_a_date(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"], inputs=LISTED)
    text = plain(render_executive(found.judged))
    assert (
        "Given: GPU NVIDIA H200 141 GB SXM, 1,200,000 GPU-hours per run, 15 trillion tokens" in text
    )
    assert re.search(
        r"price 2\.50 to 7\.00 dollars per hour of NVIDIA H200.*\(.*, 20\d\d-\d\d\)", text
    )
    assert re.search(r"speed-up of te_current 1\.\d\d \(1\.\d\d to 1\.\d\d\) \(", text)


DEARER = replace(GIVEN, extra_tokens={"te_current": 0.06}, adoption_usd=2_000)


@pytest.mark.parametrize("inputs", [GIVEN, DEARER], ids=["plain", "more tokens and people"])
def test_the_gates_are_where_it_pays(tmp_path, inputs):
    """The costs on either side of each gate, by the formula of the bill."""
    found = choice(tmp_path, ["bf16_amp", "te_current"], inputs=inputs)
    text = plain(render_executive(found.judged))
    own, base = found.cost("te_current"), found.cost("bf16_amp")
    assert own is not None
    assert base is not None
    assert own.search is not None
    assert base.search is not None
    search, tokens = own.search.value, 1 + inputs.extra_tokens.get("te_current", 0.0)
    people = inputs.adoption_usd / (12_000 * 3.5)

    def cost(failing, speed):
        return tokens * (expected_runs(1 - failing) + search) / speed + people

    share = float(re.search(r"At most ([\d.]+) % of the runs fail", text)[1]) / 100
    reference = base.retries.value + base.search.value
    assert cost(share - 0.01, 1.35) < reference < cost(share + 0.01, 1.35)
    speed = float(re.search(r"measured step is at least ([\d.]+) times as fast", text)[1])
    assert cost(0.1, speed + 0.006) < 1 + base.search.value < cost(0.1, speed - 0.006)


def test_the_first_gate_allows_no_larger_share_of_failures_than_the_sweep(tmp_path):
    made = sweeps.design(["bf16_amp", "te_current"], seeds=3, data={"a": ("a",), "b": ("b",)})
    broken = {"status": "nonfinite", "message": "broken", "loss_nats": math.nan}
    fails = {("a", 0), ("a", 1), ("b", 0)}  # 3 of 6: one and a half of three
    found = [replace(r, **broken) if (r.data, r.seed) in fails else r for r in sweeps.results(made)]
    judged = judge(sweeps.write(tmp_path / "sweep", made, found), inputs=GIVEN)
    assert "Of 3 runs at most 1 fail;" in plain(render_executive(judged))


def test_the_first_gate_leaves_room_for_chance(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"])
    row = found.rows("bf16_amp")[0]
    scores = [o.score_nats for p in row.points if p.lr == row.best_lr for o in p.outcomes]
    said = re.search(r"differ by less than ([\d.]+) nats", plain(render_executive(found.judged)))
    assert said is not None
    # √19: the ratio of two standard deviations of three values exceeds it one time in twenty.
    assert float(said[1]) == pytest.approx((max(scores) - min(scores)) * 19**0.5, abs=0.0006)


def test_what_is_shown_needs_no_more_runs(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"], seeds=30)
    text = plain(render_executive(found.judged))
    assert "te_current: 0 of 30 runs failed at its best learning rate." in text
    assert "without a further failure" not in text


def test_of_two_data_sets_the_one_that_decides_is_shown(tmp_path):
    made = sweeps.design(["bf16_amp", "te_current"], seeds=3, data={"a": ("a",), "b": ("b",)})
    more = {"a": (0.03, 0.03, 0.03), "b": (0.0, 0.05, 0.1)}  # b is worse on average, a for certain
    found = [
        replace(r, loss_nats=r.loss_nats + more[r.data][r.seed]) if r.recipe == "te_current" else r
        for r in sweeps.results(made)
    ]
    judged = judge(sweeps.write(tmp_path / "sweep", made, found), inputs=GIVEN)
    row = Choice(judged, "en").worst("te_current")
    assert row is not None
    assert row.data == "a"
    assert judged.verdicts[0].status == "fail"


def test_whose_window_is_unknown_is_named(tmp_path):
    made = sweeps.design(["bf16_amp", "te_current"])
    died = {"status": "died", "message": "killed", "loss_nats": math.nan}
    found = [replace(r, **died) if r.recipe == "bf16_amp" else r for r in sweeps.results(made)]
    text = plain(render_executive(judge(sweeps.write(tmp_path / "s", made, found), inputs=GIVEN)))
    assert "the range of safe learning rates of bf16_amp is not known" in text


def test_japanese_is_japanese(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"], language="ja")
    page = render_executive(found.judged, language="ja")
    text = plain(page)
    assert 'lang="ja"' in page
    assert "現時点では判定できない" in text
    assert "判定できず" in text
    english = [word for word in ("could not tell", "pass", "fail", "reference") if word in text]
    assert not english, english


def test_another_language_is_refused(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "te_current"])
    with pytest.raises(ConfigError, match="en and ja"):
        render_executive(found.judged, language="fr")


@pytest.mark.parametrize(("runs", "failed", "needed"), [(3, 0, 29), (29, 0, 29), (3, 1, 46)])
def test_runs_that_show_a_success_of_nine_in_ten(runs, failed, needed):
    assert runs_to_show(runs, failed) == needed  # exact binomial bound, as in the usual tables


def test_no_number_of_runs_shows_what_always_fails():
    assert runs_to_show(990, 900) is None


def test_a_staged_recipe_brings_its_own_stages(tmp_path):
    found = choice(tmp_path, ["bf16_amp", "bf16_amp:0.2+te_current"])
    text = plain(render_executive(found.judged))
    assert "bf16_amp:0.2+te_current from its first stage on" in text
    assert "First 10 %" not in text


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("inputs", [GIVEN, LISTED], ids=["given", "listed"])
def test_it_prints_on_one_sheet(tmp_path, language, inputs):
    """Also with more recipes than it shows, long names, all published sources, and lost runs."""
    names = ["bf16_amp", "bf16_amp:0.2+te_current", "te_current", "mxfp8", "te_blockwise", "nvfp4"]
    made = sweeps.design([*names, "fp8_unscaled"])
    died = {"status": "died", "message": "killed", "loss_nats": math.nan}
    found = [replace(r, **died) if r.seed == 1 else r for r in sweeps.results(made)][:-4]
    judged = judge(sweeps.write(tmp_path / "sweep", made, found), inputs=inputs)
    page = write_executive(judged, tmp_path / "page.html", language=language)
    assert _pages(page) == 1


def _pages(page: Path) -> int:
    pdf = page.with_suffix(".pdf")
    with tempfile.TemporaryDirectory() as profile:
        options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}")
        target = (f"--print-to-pdf={pdf}", page.resolve().as_uri())
        subprocess.run(
            [browser.find(), *options, *target], check=True, capture_output=True, timeout=300
        )
    content = pdf.read_bytes()
    assert re.search(rb"/MediaBox \[0 0 59\d\.\d+ 84\d\.\d+\]", content), "not A4"
    return len(re.findall(rb"/Type /Page\b(?!s)", content))


def test_every_text_is_used():
    folder = Path(sweep_words.__file__).parent
    sources = [p.read_text() for p in folder.glob("sweep_*.py") if p.stem != "sweep_words"]
    made = {f"{part}_{stage}" for part in ("stage", "do", "gate", "back") for stage in STAGES}
    made |= {"pass", "fail", "could not tell"}  # the verdicts themselves
    unused = [
        key for key in TEXTS["en"] if key not in made and not any(f'"{key}"' in s for s in sources)
    ]
    assert not unused
