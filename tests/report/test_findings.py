import math
from dataclasses import replace

import numpy as np
import pytest
import synthetic

from halfulp.errors import RunError
from halfulp.report import findings
from halfulp.report.counters import COUNTERS, level, overall, strip
from halfulp.report.price import FAIL, PASS, UNKNOWN, differences, judge, price_all
from halfulp.report.read import read_runs
from halfulp.report.words import interval, listing, most, nats, perplexity, share
from halfulp.run import Run

LOST, UNDERFLOW, SATURATION, _ = COUNTERS


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def of(found, run: str, topic: str):
    (one,) = [f for f in found if f.run == run and f.topic == topic]
    return one


def test_six_runs_get_the_verdicts_they_were_made_for(six):
    found = findings(six)
    verdicts = {f.run: f.verdict for f in found if f.topic == "price"}
    assert verdicts == {
        "bf16_weights": FAIL,
        "bf16_weights_sr": PASS,
        "te_current": PASS,
        "fp8_unscaled": FAIL,
        "nvfp4": UNKNOWN,
    }
    assert found[0].topic == "overall"
    assert found[0].verdict == FAIL
    assert found[0].sentence.startswith("Two of five recipes train within 0.01 nats of fp32.")


def test_price_sentence_says_how_much_and_what_it_means(six):
    price = of(findings(six), "bf16_weights", "price")
    assert price.evidence["nats"] == pytest.approx(0.21, abs=0.003)
    assert "0.210 ± 0.00" in price.sentence
    assert "above fp32 (+23 % perplexity). fp32 was there at step " in plain(price.sentence)
    assert "seed" in price.caveat
    # The reference passed the run's last loss where 1.6 (1 + t/25)^-0.75 was 0.21 higher.
    step = int(price.sentence.rstrip(".").rpartition(" ")[2])
    assert 120 < step < 190


def test_lost_updates_name_share_format_and_worst_block(six):
    lost = of(findings(six), "bf16_weights", "lost_updates")
    assert lost.verdict == FAIL
    assert lost.evidence["share"] == pytest.approx(0.62, abs=0.05)
    assert "of the updates asked of the bf16:nearest weights were lost" in lost.sentence
    # The norms lose more, but have hardly any weights; qk is the worst matrix.
    assert str(lost.evidence["worst"]).endswith(".qk")


def test_underflow_names_operand_and_energy(six):
    underflow = of(findings(six), "fp8_unscaled", "underflow")
    assert underflow.evidence["share"] == pytest.approx(0.4, abs=0.06)
    assert "of the nonzero output gradients" in underflow.sentence
    assert str(underflow.evidence["worst"]).startswith("layers.0.")
    assert "of its energy" in underflow.sentence


def test_quiet_counters_are_said_to_be_quiet(six):
    quiet = of(findings(six), "te_current", "counters")
    assert quiet.verdict == PASS
    assert (
        plain(quiet.sentence) == "te_current: counters are quiet (underflow 1.0 %, saturation 0)."
    )


def test_bar_decides(six):
    found = findings([six[0], six[1]], bar_nats=0.3)
    assert found[0].sentence == "bf16_weights trains within 0.3 nats of fp32."
    assert found[0].verdict == PASS


@pytest.mark.parametrize(
    ("nats_", "half_width", "verdict"),
    [
        (0.002, 0.005, PASS),
        (-0.5, 0.1, PASS),
        (0.012, 0.005, UNKNOWN),
        (0.008, 0.005, UNKNOWN),
        (0.016, 0.005, FAIL),
        (0.0, math.inf, UNKNOWN),
        (math.nan, 0.001, UNKNOWN),
    ],
)
def test_judge(nats_, half_width, verdict):
    assert judge(nats_, half_width, 0.01) == verdict


def test_one_run_alone_could_not_tell_but_says_what_was_seen(six):
    found = findings([six[4]])
    assert found[0].verdict == UNKNOWN
    assert found[0].sentence.startswith("fp8_unscaled finished at 2.6")
    assert "without a run to compare, its price is unknown" in found[0].sentence
    assert of(found, "fp8_unscaled", "underflow").verdict == UNKNOWN


def test_fp32_alone_is_no_verdict(six):
    (only,) = findings([six[0]])
    assert only.verdict == UNKNOWN
    assert only.sentence.endswith("nothing is compared.")


def test_without_fp32_the_first_run_stands_in_and_this_is_said(six):
    found = findings([six[1], six[3]])
    assert found[0].sentence.endswith("No run is fp32: what bf16_weights itself costs is unknown.")
    assert of(found, "bf16_weights", "price").verdict == UNKNOWN
    assert "below bf16_weights" in of(found, "te_current", "price").sentence


def test_broken_run_fails_with_step_and_block(six, tmp_path):
    path = synthetic.write_run(tmp_path / "nan", "fp8_unscaled", price=0.3, nan_at=212)
    found = findings([six[0], path])
    assert found[0].verdict == FAIL
    assert found[0].sentence == "fp8_unscaled broke down."
    price = of(found, "fp8_unscaled", "price")
    assert price.verdict == FAIL
    assert "at step 212: the loss was not finite in layers.2.ffn" in price.sentence
    assert price.evidence == {"step": 212.0, "block": "layers.2.ffn", "what": "loss"}
    alone = findings([path])
    assert alone[0].verdict == FAIL


def test_broken_reference_cannot_judge(six, tmp_path):
    path = synthetic.write_run(tmp_path / "fp32", "fp32", nan_at=300)
    price = of(findings([path, six[3]]), "te_current", "price")
    assert price.verdict == UNKNOWN
    assert "its reference fp32 broke down" in price.sentence


def test_unfinished_empty_and_torn_runs(six, tmp_path):
    cut = synthetic.write_run(tmp_path / "cut", "te_current", steps=310, finish=False)
    with open(cut / "events.jsonl", "ab") as events:
        events.write(b'{"event": "step", "st')
    empty = synthetic.write_run(tmp_path / "empty", "nvfp4", steps=0, finish=False)
    found = findings([six[0], cut, empty])
    assert found[0].verdict == UNKNOWN
    assert "it is not finished: step 310 of 500" in of(found, "te_current", "price").sentence
    assert of(found, "nvfp4", "price").sentence == "nvfp4 has no price: it recorded no step."
    assert [r.torn for r in read_runs([six[0], cut])] == [False, True]


def test_runs_that_differ_in_more_than_precision_are_not_compared(six, tmp_path):
    other = synthetic.config("te_current", lr=2e-3, eval_every=7)
    path = synthetic.write_run(tmp_path / "lr", "te_current", settings=other)
    price = of(findings([six[0], path]), "te_current", "price")
    assert price.verdict == UNKNOWN
    assert "differs from fp32 in more than precision: train.lr" in price.sentence
    assert "eval_every" not in price.sentence


def test_runs_on_other_data_are_not_compared(six, tmp_path):
    path = synthetic.write_run(tmp_path / "data", "te_current")
    with Run.open(path) as run:
        run.summarize(data={"digest": "beef"})
    price = of(findings([six[0], path]), "te_current", "price")
    assert price.verdict == UNKNOWN
    assert "did not see the same tokens" in price.sentence


def test_every_run_meets_the_fp32_run_of_its_own_seed(six, tmp_path):
    paths = [
        synthetic.write_run(tmp_path / f"{recipe}{seed}", recipe, seed=seed, scatter=scatter)
        for seed in (0, 1)
        for recipe, scatter in (("fp32", 0.0), ("te_current", 0.004))
    ]
    prices = price_all(read_runs(paths), 0.01)
    assert [p.verdict for p in prices] == [UNKNOWN, PASS, UNKNOWN, PASS]
    assert [p.reference and p.reference.name for p in prices] == [None, "fp320", None, "fp321"]
    assert differences(prices[1].run, prices[2].run) == ["train.seed"]


def test_loss_scale_and_stale_scale_are_told(six, tmp_path):
    def rows(progress, rng):
        made = synthetic.current_rows(progress, rng)
        made["gemms"][0]["stale"] = 3.0
        return made

    path = synthetic.write_run(tmp_path / "run", "fp16", rows=rows)
    with Run.open(path) as run:
        for step in range(1, 61):
            run.write("loss_scale", step=step, scale=1024.0, skipped=True)
        run.write("schedule", step=100, recipe="bf16_amp")
    found = findings([six[0], path])
    assert of(found, "fp16", "loss_scale").verdict == FAIL
    assert "60 of 500 steps were skipped" in of(found, "fp16", "loss_scale").sentence
    stale = of(found, "fp16", "scale")
    assert stale.verdict == FAIL
    assert "up to 3 times too small (layers.0.qk.q_proj" in stale.sentence


def test_paths_that_are_no_runs_are_refused(six, tmp_path):
    with pytest.raises(RunError, match="at least one"):
        findings([])
    with pytest.raises(RunError, match="twice"):
        findings([six[0], six[0]])
    with pytest.raises(RunError, match="no config"):
        findings([tmp_path])


def test_repeated_steps_count_once_the_last_time(tmp_path):
    path = synthetic.write_run(tmp_path / "run", "bf16", steps=20, finish=False)
    with Run.open(path) as run:
        run.write("step", step=20, loss_nats=7.0, tokens=1, seconds=1)
    (record,) = read_runs([path])
    assert list(record.loss.steps) == list(range(1, 21))
    assert record.loss.values[-1] == 7.0


def test_counts_add_parts_of_one_tensor_and_leave_out_what_was_not_counted(tmp_path):
    path = synthetic.write_run(tmp_path / "run", "r", steps=2, finish=False)
    row = {"block": "head", "gemm": "head.lm_head", "operand": "fprop.x", "format": "e4m3"}
    with Run.open(path) as run:
        half = {**row, "n": 10, "saturated": 1, "underflow": 5}
        run.write("counters", step=1, gemms=[half, half], optimizer=[])
        run.write("counters", step=2, gemms=[{**half, "underflow": 0, "n": 0}], optimizer=[])
    (record,) = read_runs([path])
    counts = record.counters["underflow"]
    assert counts.hits.tolist() == [[10.0]]
    assert counts.total.tolist() == [[20.0]]
    assert counts.steps.tolist() == [1]
    assert "lost_updates" not in record.counters
    assert overall(counts).share == 0.5


def test_strip_holds_the_worst_place_of_every_block(six):
    (record,) = read_runs([six[4]])
    picture = strip(record, UNDERFLOW)
    assert picture.blocks == tuple(synthetic.blocks())
    assert picture.shares.shape == (len(picture.blocks), 25)
    assert np.nanmax(picture.shares) <= 1
    assert picture.pooled[0] > picture.pooled[-1]
    assert all(place.endswith(".g") for place in picture.places)


@pytest.mark.parametrize(
    ("counter", "share_", "form", "expected"),
    [
        (LOST, 0.09, "bf16", PASS),
        (LOST, 0.3, "bf16", UNKNOWN),
        (LOST, 0.5, "bf16", FAIL),
        (SATURATION, 0.04, "e4m3@tensor:delayed(16)", FAIL),
        (SATURATION, 0.04, "e2m1@1x16:nvfp4", PASS),
        (SATURATION, 0.2, "e2m1@1x16:nvfp4", UNKNOWN),
        (SATURATION, 0.04, "e2m1@16x16:nvfp4", FAIL),
    ],
)
def test_level(counter, share_, form, expected):
    assert level(counter, share_, form) == expected


def test_diverged_without_a_non_finite_number(six):
    (record,) = read_runs([six[1]])
    assert not record.diverged
    assert replace(record, summary={"diverged": True}).diverged


def test_numbers_in_words():
    assert [nats(x) for x in (0.2114, -0.002, 0.0, 0.00021, math.nan)] == [
        *("0.211", "−0.002", "0.000", "0.00021", "–")
    ]
    assert [plain(share(x)) for x in (0.617, 0.0412, 0.0995, 3e-5, 0.0, 1.0, 1e-9)] == [
        *("62 %", "4.1 %", "10 %", "0.0030 %", "0", "100 %", "1e-7 %")
    ]
    assert interval(-0.00174, 0.00022) == ("0.002", "0.001")
    assert most(0.00174, 0.00022) == "0.003"
    assert most(-0.5, 0.1) == "0.001"
    assert interval(0.2, math.inf) == ("0.200", "?")
    assert plain(perplexity(math.log(1.234))) == "+23 % perplexity"
    assert listing(["a"]) == "a"
    assert listing(list("abcdefgh"), most=4) == "a, b, c and 5 more"
