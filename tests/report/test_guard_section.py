"""Incidents of the guard in reports: what counts after a rollback, what is drawn, what is said."""

import json
import math
from pathlib import Path

import browser
import numpy as np
import pytest
import synthetic
from synthetic import act
from test_page import HOSTILE, Page

from halfulp.report import findings, write_report
from halfulp.report.course import course_of, courses
from halfulp.report.guard_plots import Span, labels, spans
from halfulp.report.incidents import afterwards, explain
from halfulp.report.read import read_runs
from halfulp.report.signs import signs_before

HIGHER = {"layers.1.ffn": "te_current"}


def three(step: int = 250) -> list[dict]:
    """A raise, a skip and a rollback."""
    later = HIGHER | {"layers.2.vo": "bf16_amp"}
    return [
        act(150, "raise", above=HIGHER),
        act(step, "skip", units=[], above=HIGHER),
        act(300, "roll back", to=200, above=later, raised={"layers.2.vo": "bf16_amp"}),
    ]


@pytest.fixture(scope="module")
def guarded(tmp_path_factory) -> Path:
    return synthetic.write_guarded(
        tmp_path_factory.mktemp("guarded") / "run", "te_delayed", three()
    )


@pytest.fixture(scope="module")
def thirty(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("thirty")
    acts = synthetic.thirty_acts()
    return synthetic.write_guarded(root / "run", "fp8_unscaled", acts, rows=synthetic.unscaled_rows)


def events_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]


# What counts.


def test_steps_that_were_rolled_back_do_not_count(guarded):
    events = events_of(guarded)
    course = course_of(events)
    steps = [e["step"] for e in course.events if e["event"] == "step"]
    assert steps == list(range(1, 501))
    assert [e["step"] for e in course.withdrawn[0] if e["event"] == "step"] == [*range(201, 300)]
    assert [e["step"] for e in course.withdrawn[0] if e["event"] == "eval"] == [250]
    assert sum(e["event"] == "guard" for e in course.events) == 3
    assert len(course.events) + len(course.withdrawn[0]) == len(events)
    (record,) = read_runs([guarded])
    again = {e["step"]: e["loss_nats"] for e in events if e["event"] == "step"}
    assert record.loss.values.tolist() == [again[step] for step in range(1, 501)]
    assert record.withdrawn[0].steps.tolist() == [*range(201, 300)]
    assert record.withdrawn[0].values[0] != record.loss.values[200]


def test_steps_that_were_never_redone_are_no_part_of_the_run(tmp_path):
    run = synthetic.write_guarded(tmp_path / "run", "te_current", [act(300, "roll back", to=200)])
    lines = (run / "events.jsonl").read_text().splitlines(keepends=True)
    last = next(i for i, line in enumerate(lines) if '"event": "guard"' in line)
    (run / "events.jsonl").write_text("".join(lines[: last + 1]))  # killed right after it
    (run / "summary.json").unlink()
    (record,) = read_runs([run])
    assert (record.last_step, record.state) == (200, "unfinished")
    assert record.held_out.steps.tolist() == [50, 100, 150, 200]
    assert len(record.withdrawn[0].steps) == 99


def test_courses_are_those_right_before_each_incident(guarded):
    before = [c.events[-1] for c in courses(events_of(guarded))]
    assert [e["step"] for e in before[:3]] == [150, 249, 299]
    assert before[-1]["event"] == "end"


def test_a_stopped_run_is_a_state_of_its_own(thirty):
    (record,) = read_runs([thirty])
    assert (record.state, record.broke_at, record.last_step) == ("stopped", 490, 489)
    assert record.diverged
    assert record.stopped is not None


# The precision map.


def incident(step: int, action: str, above: dict, **more):
    from halfulp.report.incidents import Story

    fields = act(step, action, above=above, **more)
    return Story({**fields, "above": list(above), "map": {"a": "low", "b": "low"} | above}, ())


def test_spans_say_which_block_stood_higher_when():
    stories = [
        incident(10, "raise", {"a": "mid"}),
        incident(30, "raise", {"a": "mid", "b": "high"}),
    ]
    assert spans(stories, 50) == [Span("a", "mid", 10, 50), Span("b", "high", 30, 50)]
    assert spans([*stories, incident(40, "lower", {"b": "high"})], 50) == [
        Span("a", "mid", 10, 40), Span("b", "high", 30, 50),
    ]  # fmt: skip
    assert spans([], 50) == []


def test_a_rollback_takes_the_map_back_with_it_and_keeps_what_is_raised():
    stories = [incident(30, "raise", {"a": "mid"}), incident(41, "roll back", {"a": "mid"}, to=10)]
    assert spans(stories, 50) == [Span("a", "mid", 10, 50)]


def test_labels_of_near_incidents_are_joined():
    assert labels([10, 500, 900], 1000) == [(10.0, "1"), (500.0, "2"), (900.0, "3")]
    joined = labels([100, 101, 102, 103, 900], 1000)
    assert [text for _, text in joined] == ["1–4", "5"]
    assert [text for _, text in labels([100, 900, 101], 1000)] == ["1,3", "2"]
    places = [x for x, _ in labels(list(range(0, 1000, 5)), 1000)]
    assert np.diff(places).min() > 20


# Signs.


def steps_of(losses, norm=1.0):
    return [
        {"event": "step", "step": i, "loss_nats": x, "grad_norm": norm, "lr": 1e-3}
        for i, x in enumerate(losses, 1)
    ]


def noisy(count: int, seed: int = 0) -> list[float]:
    """Losses within ±2 robust deviations: no chance finding can be abnormal."""
    return (2.0 + np.random.default_rng(seed).uniform(-0.04, 0.04, count)).tolist()


def test_a_loss_that_rises_before_the_incident_is_a_sign_since_it_began():
    losses = [*noisy(280), *(2.0 + 0.05 * k for k in range(3, 23))]
    (sign,) = signs_before(steps_of(losses), 301)
    assert (sign.signal, sign.block) == ("loss", "")
    assert 281 <= sign.step <= 284
    assert sign.lead == 301 - sign.step
    assert sign.first > sign.threshold == 4
    assert sign.worst > 2 * sign.first


def test_a_healthy_course_and_an_old_disturbance_are_no_signs():
    losses = noisy(300)
    assert signs_before(steps_of(losses), 301) == []
    losses[180] = 4.0  # 120 steps before the incident, and quiet since
    assert signs_before(steps_of(losses), 301) == []
    losses[270] = 4.0
    assert signs_before(steps_of(losses), 301) == []  # a single step
    losses[275] = 4.0
    assert [sign.step for sign in signs_before(steps_of(losses), 301)] == [271]


def counted(step: int, underflow: float, block: str = "layers.0.ffn") -> dict:
    row = {
        "block": block, "gemm": f"{block}.up_proj", "operand": "dgrad.g",
        "format": "e5m2@tensor:current", "n": 1000, "saturated": 0,
        "underflow": round(1000 * underflow), "underflow_energy": 0.0, "amax": 1.0,
    }  # fmt: skip
    return {"event": "counters", "step": step, "gemms": [row], "optimizer": []}


def test_counters_are_signs_from_the_first_of_the_looks_that_the_rule_needs():
    shares = [0.1, 0.2, 0.7, 0.6, 0.8, 0.9]
    events = [counted(50 * i, share) for i, share in enumerate(shares, 1)]
    (sign,) = signs_before(events, 310)
    assert (sign.signal, sign.block, sign.step, sign.lead) == (
        "underflow",
        "layers.0.ffn",
        150,
        160,
    )
    assert (sign.first, sign.worst, sign.threshold) == (0.7, 0.9, 0.5)
    assert signs_before([counted(50, 0.1), counted(100, 0.9)], 110) == []  # one look of two


@pytest.mark.parametrize("unit", ["layers.0.ffn", "layers.0.qk+ffn", "*"])
def test_what_another_recipe_has_cured_is_no_sign_of_a_later_incident(unit):
    before = [counted(50, 0.7), counted(100, 0.9)]
    raised = {"event": "guard", "step": 100, "raised": {unit: "bf16_amp"}}
    assert [s.step for s in signs_before(before, 100)] == [50]
    assert signs_before([*before, raised, counted(150, 0.0)], 150) == []
    other = {**raised, "raised": {"layers.1.ffn": "bf16_amp"}}
    assert [s.step for s in signs_before([*before, other, counted(150, 0.0)], 150)] == [50]
    assert [s.step for s in signs_before([*before, raised, counted(150, 0.8)], 150)] == [50]


def test_a_warning_of_the_guard_is_a_sign_by_itself():
    warned = {
        "event": "signal", "step": 100, "rule": "attention_logits", "block": "layers.0.qk",
        "place": "layers.0.attn", "value": 140.0, "threshold": 100.0, "level": "warn",
    }  # fmt: skip
    (sign,) = signs_before([warned], 120)
    assert (sign.signal, sign.step, sign.lead, sign.worst) == ("attention_logits", 100, 20, 140.0)


def test_sharpness_is_a_sign_where_it_jumps():
    def measured(step: int, value: float) -> dict:
        return {
            "event": "sharpness", "step": step, "logits": {},
            "blocks": [{"block": "layers.0.vo", "sharpness": value, "parameters": 10}],
        }  # fmt: skip

    events = [measured(25 * i, 1.0 + 0.2 * (i % 3)) for i in range(1, 11)]
    assert signs_before(events, 280) == []
    jumped = [*events, measured(275, 33.0), measured(300, 31.0)]
    assert signs_before(jumped[:-1], 280) == []  # one look may be chance
    (sign,) = signs_before(jumped, 310)
    assert (sign.signal, sign.block, sign.step) == ("sharpness", "layers.0.vo", 275)
    assert 25 < sign.worst < 33


def test_logits_that_drift_are_a_sign():
    def measured(step: int, logz: float, sharpness: float) -> dict:
        logits = {"logz": logz, "sharpness_centered": sharpness}
        return {"event": "sharpness", "step": step, "blocks": [], "logits": logits}

    drifting = [measured(25 * i, 2.0 * i, 1.0) for i in range(1, 7)]
    (sign,) = signs_before(drifting, 160, vocab=100)
    assert (sign.signal, sign.block, sign.step) == ("logz", "head", 125)
    assert math.isclose(sign.first, 10 - math.log(100))
    assert signs_before(drifting, 160) == []
    sharper = [measured(25 * i, 0.0, 1.0 + 0.05 * (i % 2) + (i > 12)) for i in range(1, 16)]
    (sign,) = signs_before(sharper, 380)
    assert (sign.signal, sign.step) == ("logits_sharpness", 325)


def test_a_run_without_a_guard_is_judged_afterwards():
    events = steps_of([*noisy(200), 3.0, *noisy(100), *(2.0 + 0.01 * k for k in range(100))])
    first, second = afterwards(events)
    assert (first.step, first.incident["trigger"], first.recorded) == (201, "spike", False)
    assert first.incident["verdict"] == "no guard"
    assert second.incident["trigger"] in ("sustained", "divergence", "spike")
    assert 310 <= second.step <= 345
    assert {sign.signal for sign in second.signs} == {"loss"}
    assert afterwards(steps_of(noisy(400))) == []


def test_a_loss_that_is_not_finite_is_an_incident_with_its_block(tmp_path):
    run = synthetic.write_run(tmp_path / "run", "te_current", nan_at=310)
    found = explain(run)
    assert not found.guarded
    (story,) = found.stories
    assert (story.step, story.incident["trigger"]) == (310, "nonfinite")
    assert story.incident["units"] == ["layers.2.ffn"]


# Cost and sentences.


def test_costs_add_up(guarded):
    found = explain(guarded)
    assert vars(found.cost) == {"withheld": 2.0, "replayed": 99.0, "passes": 18.0, "shadows": 0.0}
    assert math.isclose(found.share, 119 / 500)
    assert found.tokens_per_step == 2048


def test_passes_of_regular_comparisons_are_a_cost(tmp_path):
    run = synthetic.write_guarded(tmp_path / "run", "te_current", [])
    with (run / "events.jsonl").open("a") as file:
        for step in (250, 500):
            file.write(json.dumps({"event": "gradient_error", "step": step, "units": {}}) + "\n")
    (record,) = read_runs([run])
    assert (record.cost.steps, record.cost_share) == (4.0, 4 / 500)


def sentence(run: Path) -> tuple[str, str]:
    (found,) = [f for f in findings([run]) if f.topic == "guard"]
    return found.verdict, found.sentence


def test_findings_say_what_the_guard_did(guarded, thirty, tmp_path):
    verdict, text = sentence(guarded)
    assert verdict == "could not tell"
    assert text == (
        "te_delayed: the guard acted three times: one precision raised, one batch skipped and one "
        "rollback; it cost 24\u00a0% of the run. Raised at the end: layers.1.ffn and layers.2.vo."
    )
    assert sentence(thirty)[0] == "fail"
    skip = synthetic.write_guarded(tmp_path / "skip", "te_current", [act(100, "skip", units=[])])
    assert sentence(skip)[0] == "pass"
    quiet = synthetic.write_guarded(tmp_path / "quiet", "te_current", [])
    assert not [f for f in findings([quiet]) if f.topic == "guard"]


def test_a_stopped_run_fails_with_the_reason(thirty):
    (price,) = [f for f in findings([thirty]) if f.topic == "price"]
    assert price.verdict == "fail"
    assert "was stopped by its guard at step 490: what was done at 490." in price.sentence
    assert "was stopped by its guard." in findings([thirty])[0].sentence


# The page.


@pytest.fixture(scope="module")
def page(guarded, thirty, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("page")
    quiet = synthetic.write_guarded(root / "quiet", "te_current", [])
    plain = synthetic.write_run(root / "fp32", "fp32", scatter=0.0)
    return write_report([plain, guarded, thirty, quiet], root / "report.html")


def test_the_page_tells_every_incident_with_its_evidence(page):
    read = Page(page)
    assert page.read_text().count("<span>what was done at") == 33
    assert "No incident in te_current." in read.text
    for shown in ("spike (z loss 31.9, z log norm 11.1)", "same arithmetic", "gradient error",
                  "the first by a margin of 2×", "attribution passes", "stopped by its guard",
                  "8 blocks raised by its guard"):  # fmt: skip
        assert shown in read.text, shown
    assert read.text.count("Before it") == 33
    assert {f'id="guard-{i}-title"' in page.read_text() for i in (0, 1)} == {True}


def test_a_page_without_a_guard_has_no_such_section(tmp_path):
    run = synthetic.write_run(tmp_path / "run", "fp32")
    page = write_report([run], tmp_path / "r.html")
    assert "Guard" not in Page(page).text
    assert ".incident" not in page.read_text()


def test_words_of_an_event_are_escaped(tmp_path):
    bad = act(100, "skip", units=[HOSTILE], done=[HOSTILE], signals={HOSTILE: 1.0})
    bad["evidence"] = {HOSTILE: {"loss": math.nan, "norm": math.inf}, "note": HOSTILE}
    bad["rows"] = [{"unit": HOSTILE, HOSTILE: 1.0}]
    run = synthetic.write_guarded(tmp_path / "run", "te_current", [bad])
    page = write_report([run], tmp_path / "r.html")
    assert "<script>" not in page.read_text(encoding="utf-8")
    assert Page(page).tags["script"] == 0


@pytest.mark.parametrize("width", [1280, 480])
def test_nothing_overlaps_in_a_browser(page, tmp_path, width):
    found = browser.measure(page, tmp_path, width=width)
    assert found["messages"] == []
    assert found["scroll"] <= found["window"]
    for plot in found["plots"]:
        assert plot["touching"] == []
        assert plot["outside"] == []
