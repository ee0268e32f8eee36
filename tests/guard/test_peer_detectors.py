"""The peers' rules by hand: series at which a rule just fires, and just does not."""

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

# Behind everything else: the benchmarks' names are those of many modules.
sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

from guard_detectors import (
    Detector,
    FoundryLossSpike,
    Gnmr,
    LightningSpike,
    MegatronSpiky,
    OlmoSkipStep,
    ZClip,
    peers,
)

NAN, INF = math.nan, math.inf


def on_loss(detector: Detector, losses: Sequence[float]) -> list[int]:
    """Places (from 1) of the losses at which it fires; gradient norms are all 1."""
    return fires(detector, losses, [1.0] * len(losses))


def on_norm(detector: Detector, norms: Sequence[float]) -> list[int]:
    return fires(detector, [1.0] * len(norms), norms)


def fires(detector: Detector, losses: Sequence[float], norms: Sequence[float]) -> list[int]:
    rows = enumerate(zip(losses, norms, strict=True), start=1)
    return [i for i, (loss, norm) in rows if detector.observe(i, loss, norm, {})]


# OLMo-core: 1, 2, 3 have mean 2 and corrected standard deviation 1, so the bar is 2 + 6.


@pytest.mark.parametrize(("last", "alarm"), [(8.0, []), (8.001, [4]), (-50.0, [])])
def test_olmo_skips_above_six_deviations_of_the_values_before(last, alarm):
    assert on_loss(OlmoSkipStep(window=8), [1, 2, 3, last]) == alarm
    assert on_norm(OlmoSkipStep(window=8), [1, 2, 3, last]) == alarm


@pytest.mark.parametrize(("before", "alarm"), [(62, []), (63, [64])])
def test_olmo_is_active_from_the_64th_step(before, alarm):
    assert on_loss(OlmoSkipStep(), [1.0, 1.1] * (before // 2) + [1.0] * (before % 2) + [9]) == alarm


def test_olmo_keeps_skipped_steps_in_its_window():
    # 1, 2, 3, 9: mean 3.75, deviation √12.917 = 3.594, bar 25.3.
    assert on_loss(OlmoSkipStep(window=8), [1, 2, 3, 9, 25]) == [4]
    assert on_loss(OlmoSkipStep(window=8), [1, 2, 3, 9, 26]) == [4, 5]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_olmo_skips_on_until_a_value_that_is_not_finite_has_left(bad):
    series = [1.0, 1.1] * 6 + [bad] + [1.0, 1.1] * 6
    assert on_loss(OlmoSkipStep(window=8), series) == list(range(13, 22))
    assert on_norm(OlmoSkipStep(window=8), series) == list(range(13, 22))


# Lightning: with a mean of 1 the bar is 1 + 2 · 1.


@pytest.mark.parametrize(("last", "alarm"), [(2.99, []), (3.0, [12])])
def test_lightning_fires_at_three_times_the_running_mean(last, alarm):
    assert on_loss(LightningSpike(), [50.0] + [1.0] * 10 + [last]) == alarm


def test_lightning_remembers_ten_losses():
    assert on_loss(LightningSpike(), [50.0] + [1.0] * 9 + [3.0]) == []


def test_lightning_leaves_an_alarm_out_of_the_mean():
    # Had 3 entered, the mean would be 2 and the bar 6.
    assert on_loss(LightningSpike(), [1.0, 3.0, 3.0]) == [2, 3]


def test_lightning_asks_for_a_rise_but_not_above_the_mean():
    # The mean of 10, 10, 1 is 7, and both 1 and 1.1 are farther from it than 0.5 · 7.
    assert on_loss(LightningSpike(rtol=0.5), [10, 10, 1, 1]) == []
    assert on_loss(LightningSpike(rtol=0.5), [10, 10, 1, 1.1]) == [4]


@pytest.mark.parametrize(("atol", "alarm"), [(2.0, [3]), (2.1, [])])
def test_lightning_wants_both_tolerances_exceeded(atol, alarm):
    assert on_loss(LightningSpike(atol=atol), [1, 1, 3]) == alarm
    assert on_loss(LightningSpike(rtol=None, atol=atol), [1, 1, 3]) == alarm


@pytest.mark.parametrize("bad", [NAN, INF])
def test_lightning_calls_a_loss_that_is_not_finite_a_spike_after_the_warmup(bad):
    assert on_loss(LightningSpike(), [1, bad, 1]) == [2]
    assert 1 not in on_loss(LightningSpike(), [bad, 1])
    assert on_loss(LightningSpike(warmup=2), [1, 30, 30]) == []


def test_lightning_ignores_nan_without_finite_only():
    assert on_loss(LightningSpike(finite_only=False), [1, NAN, 2.9]) == []
    assert on_loss(LightningSpike(finite_only=False), [1, NAN, 3]) == [3]


# Megatron: nothing is validated at step 1.


@pytest.mark.parametrize(("last", "alarm"), [(19.99, []), (20.0, [5]), (-20.0, [5])])
def test_megatron_fires_at_ten_times_the_largest_of_its_sample(last, alarm):
    assert on_loss(MegatronSpiky(sample=3), [1000, 1, 2, 1.5, last]) == alarm
    assert on_norm(MegatronSpiky(sample=3), [1000, 1, 2, 1.5, last]) == alarm


@pytest.mark.parametrize(("before", "alarm"), [(100, []), (101, [102])])
def test_megatron_samples_a_hundred_steps(before, alarm):
    assert on_loss(MegatronSpiky(), [1.0] * before + [10.0]) == alarm


def test_megatron_never_samples_again():
    assert on_loss(MegatronSpiky(sample=2), [1, 1, 1, 9, 9, 10, 10]) == [6, 7]


@pytest.mark.parametrize("bad", [NAN, INF])
def test_megatron_rejects_what_is_not_finite_but_in_the_first_step(bad):
    assert on_loss(MegatronSpiky(sample=2), [bad, bad, 1, 1, 10]) == [2, 5]
    assert on_norm(MegatronSpiky(sample=2), [bad, bad, 1, 1, 10]) == [2, 5]


def test_megatron_does_not_look_at_gradients_under_a_rejected_loss():
    # Had the norm of step 2 entered the sample, the largest would be 5.
    assert fires(MegatronSpiky(sample=1), [1, NAN, 1, 1], [1, 5, 1, 10]) == [2, 4]


# llm-foundry: when four outliers v are in a window of 100 ones, the bar is 2 · (96 + 4 v) / 100,
# which v reaches from 1.92 / 0.92 = 2.08696 on.


@pytest.mark.parametrize(("value", "alarm"), [(2.0869, []), (2.0870, [105])])
def test_foundry_fires_at_twice_the_mean_five_times_in_a_row(value, alarm):
    assert on_loss(FoundryLossSpike(), [1.0] * 100 + [value] * 5) == alarm


def test_foundry_begins_a_row_anew_after_one_normal_loss():
    row = [1.0] * 100 + [3.0] * 4
    assert on_loss(FoundryLossSpike(), [*row, 1.0, *[3.0] * 4]) == []
    assert on_loss(FoundryLossSpike(), [*row, 3.0, 3.0]) == [105, 106]


def test_foundry_waits_for_a_full_window():
    assert on_loss(FoundryLossSpike(), [1.0] * 95 + [9.0] * 9) == []


def test_foundry_calls_half_a_window_above_ten_high_from_twice_the_window_on():
    assert on_loss(FoundryLossSpike(window=4), [9, 9, 9, 9, 9, 11, 11, 9]) == [8]
    assert on_loss(FoundryLossSpike(window=4), [9, 9, 9, 9, 9, 9, 11, 9]) == []
    assert on_loss(FoundryLossSpike(window=4), [9, 9, 11, 11, 9, 9, 9]) == []


def test_foundry_does_not_lower_its_cap_to_the_first_window():
    assert on_loss(FoundryLossSpike(window=4), [5.0] * 4 + [9.0] * 20) == []
    assert on_loss(FoundryLossSpike(window=4, cap=5.0), [5.0] * 4 + [9.0] * 8) == list(range(8, 13))


def test_foundry_is_blind_while_a_nan_is_in_its_window():
    assert on_loss(FoundryLossSpike(), [1.0] * 100 + [NAN] + [9.0] * 6) == []


@pytest.mark.parametrize(("steps", "window"), [(100, 100), (2000, 100), (10_000, 500)])
def test_foundry_looks_back_five_percent_of_the_run(steps, window):
    assert FoundryLossSpike.of_run(steps).window == window


# GNMR: the mean of 1, 2, 3 is 2.


@pytest.mark.parametrize(("last", "alarm"), [(6.0, False), (6.01, True), (NAN, True), (INF, True)])
def test_gnmr_fires_above_the_ratio_in_any_unit(last, alarm):
    detector = Gnmr(3.0, warmup=3)
    for i, norm in enumerate((1, 2, 3)):
        assert not detector.observe(i, 1.0, 1.0, {"a": norm, "b": 1.0})
    assert detector.observe(3, 1.0, 1.0, {"a": last, "b": 1.0}) is alarm


def test_gnmr_is_silent_until_it_has_a_history_and_keeps_what_is_not_finite_out():
    detector = Gnmr(3.0, warmup=3)
    heard = [detector.observe(i, 1, 1, {"a": v}) for i, v in enumerate([1, 90, INF, 1, NAN, 92])]
    # The mean of 1, 90, 1 is 30.7: 92 is just no more than 3 times that.
    assert heard == [False, False, False, False, True, False]
    assert detector.observe(6, 1, 1, {"a": 139.0})  # 3 · (1 + 90 + 1 + 92) / 4 = 138


def test_gnmr_takes_every_unit_in_though_the_first_fires():
    detector = Gnmr(2.0, warmup=1)
    detector.observe(0, 1, 1, {"a": 1.0, "b": 1.0})
    assert detector.observe(1, 1, 1, {"a": 9.0, "b": 2.0})
    assert not detector.observe(2, 1, 1, {"a": 1.0, "b": 3.0})  # 3 = 2 · (1 + 2) / 2


# ZClip: 1 and 3 have mean 2 and uncorrected deviation 1, so the bar is just above 2 + 2.5.


@pytest.mark.parametrize(("last", "alarm"), [(4.5, []), (4.51, [3])])
def test_zclip_fires_above_its_score(last, alarm):
    assert on_norm(ZClip(warmup=2), [1, 3, last]) == alarm


def test_zclip_moves_by_the_clipped_norm():
    detector = ZClip(warmup=2)
    assert on_norm(detector, [1, 3, 10]) == [3]
    clipped = 2 + 2.5 * 1 / (8 / 2.5)
    assert detector.mean == pytest.approx(0.97 * 2 + 0.03 * clipped, rel=1e-6)
    assert detector.variance == pytest.approx(
        0.97 * 1 + 0.03 * (clipped - detector.mean) ** 2, rel=1e-6
    )


def test_zclip_is_deaf_after_a_nan_but_not_after_an_infinity():
    assert on_norm(ZClip(warmup=2), [1, 3, INF, 10]) == [3, 4]
    assert on_norm(ZClip(warmup=2), [1, 3, NAN, 10, INF]) == []


def test_peers_have_names_of_their_own_and_no_memory_of_each_other():
    first, second = peers(1000), peers(1000)
    assert len({p.name for p in first}) == len(first) == 8
    series = [1.0, 1.1] * 75 + [90.0]
    for one, other in zip(first, second, strict=True):
        units = {"u": 1.0}
        heard = [one.observe(i, v, v, units) for i, v in enumerate(series)]
        again = [other.observe(i, v, v, units) for i, v in enumerate(series)]
        assert heard == again
        assert not any(heard[:-1])


def test_lightning_agrees_with_lightning():
    spike = pytest.importorskip("lightning.fabric.utilities.spike")
    rng = random.Random(0)
    losses = [rng.choice([1.0, 1.5, 2.0, 4.0, 8.0, NAN, INF]) for _ in range(400)]
    theirs = spike.SpikeDetection(exclude_batches_path="nowhere")
    strategy = SimpleNamespace(
        root_device="cpu", barrier=lambda: None, reduce_boolean_decision=lambda x, all: x
    )
    fabric = SimpleNamespace(strategy=strategy, global_rank=1)  # rank 0 alone writes a file
    assert on_loss(LightningSpike(), losses) == _raises(theirs, fabric, losses, spike)


def _raises(theirs, fabric, losses, spike) -> list[int]:
    import torch

    heard = []
    for i, loss in enumerate(losses):
        try:
            theirs.on_train_batch_end(fabric, torch.tensor(loss), None, i)
        except spike.TrainingSpikeException:
            heard.append(i + 1)
    return heard
