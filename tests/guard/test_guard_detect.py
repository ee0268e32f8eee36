import json
import math
import random

import pytest

from halfulp.guard.detect import ACTIVE, WINDOW, Detector, Window


def trained(steps: int = 200, *, seed: int = 0, units: dict[str, float] | None = None) -> Detector:
    """A detector after a healthy run: loss 2 ± 0.03 nats, gradient norm 1 ± 10 %."""
    detector, chance = Detector(), random.Random(seed)
    for _ in range(steps):
        loss, norm = 2 + 0.03 * chance.gauss(0, 1), math.exp(0.1 * chance.gauss(0, 1))
        detector.accept(loss, norm, units or {}, {"w": 3.0})
    return detector


def test_a_window_measures_in_robust_deviations_once_it_is_active():
    window, chance = Window("loss"), random.Random(0)
    for _ in range(ACTIVE - 1):
        window.add(2 + 0.1 * chance.gauss(0, 1))
    assert window.z(100.0) == 0
    for _ in range(WINDOW):
        window.add(2 + 0.1 * chance.gauss(0, 1))
    # The error of a median absolute deviation of 128 values is 10 %: these are 3 of them.
    assert 5 / 1.4 < window.z(2.5) < 5 / 0.7
    assert -1 < window.z(2.0) < 1
    assert len(window.values) == WINDOW


def test_a_window_has_a_least_deviation_and_takes_outliers_in_lower():
    window = Window("loss")
    for _ in range(WINDOW):
        window.add(2.0)
    assert window.z(2.2) == pytest.approx(10)  # 1 % of the loss
    window.add(50.0)
    assert window.values[-1] == pytest.approx(2.06)


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.inf)])
def test_what_is_not_finite_is_held_from_the_first_step_on(loss, norm):
    trigger = Detector().judge(1, loss, norm)
    assert (trigger.kind, trigger.level, trigger.onset) == ("nonfinite", 1, 1)


def test_a_spike_is_a_loss_or_a_norm_beside_a_raised_loss():
    detector = trained()
    assert detector.judge(201, 2.05, 1.2) is None
    assert detector.judge(201, 2.6, 1.0).kind == "spike"
    assert trained().judge(201, 2.0, 3.0) is None  # a heavy tail
    assert trained().judge(201, 2.15, 3.0).kind == "spike"
    assert trained().judge(201, 2.0, 100.0).kind == "spike"


def test_five_spikes_in_fifty_steps_are_a_divergence_and_four_are_not():
    detector = trained()
    kinds = [detector.judge(step, 3.0, 1.0).kind for step in (201, 210, 210, 220, 230)]
    assert kinds == ["spike"] * 5  # a step that is repeated counts once
    trigger = detector.judge(240, 3.0, 1.0)
    assert (trigger.kind, trigger.onset, trigger.level) == ("divergence", 201, 3)
    far = trained()
    assert {far.judge(step, 3.0, 1.0).kind for step in range(201, 600, 20)} == {"spike"}


def test_a_loss_that_stays_higher_is_noticed_after_twenty_steps():
    detector, triggers = trained(), []
    for step in range(201, 300):
        if trigger := detector.judge(step, 2.18, 1.0):
            triggers.append(trigger)
            break
        detector.accept(2.18, 1.0, {})
    assert [(t.kind, t.level) for t in triggers] == [("sustained", 2)]
    assert 221 <= triggers[0].step <= 235
    assert 190 <= triggers[0].onset <= 205


def test_a_mean_loss_half_a_nat_above_the_best_is_a_divergence():
    detector, chance = Detector(), random.Random(0)
    for _ in range(200):
        detector.accept(2 + 0.2 * chance.gauss(0, 1), 1.0, {})
    for step in range(201, 300):
        if trigger := detector.judge(step, 3.2, 1.0):
            break
        detector.accept(3.2, 1.0, {})
    assert (trigger.kind, trigger.level) == ("divergence", 3)
    assert trigger.step < 210


def test_a_weight_that_jumps_is_named_and_one_that_drifts_is_not():
    detector = Detector()
    for step in range(200):
        detector.accept(2.0, 1.0, {}, {"a": 3.0 * 1.01**step, "b": 5.0})
    now = 3.0 * 1.01**200
    assert detector.jump(201, {"a": now, "b": 5.0}) is None
    trigger, name = detector.jump(201, {"a": now, "b": 40.0})
    assert (trigger.kind, trigger.level, name) == ("weight", 1, "b")
    assert detector.jump(201, {"a": now, "b": math.inf})[1] == "b"
    assert detector.jump(201, {"a": now, "b": 5.0 * math.exp(0.4)}) is None
    assert Detector().jump(1, {"a": math.nan}) is None  # not active yet


def test_growth_ranks_units_by_their_own_mean():
    detector = trained(units={"small": 0.1, "large": 10.0, "still": 0.0})
    growth = detector.growth({"small": 0.5, "large": 20.0, "still": 1.0, "new": 1.0})
    assert list(growth) == ["small", "large"]
    assert growth["small"] == pytest.approx(5)
    broken = detector.growth({"small": 0.5, "large": math.nan})
    assert list(broken) == ["large", "small"]


def test_a_healthy_run_gives_no_alarm():
    # A normal deviate is beyond 8/1.3 robust deviations with probability 1e-9: 3e-6 in all.
    chance = random.Random(1)
    for seed in range(3):
        detector = trained(64, seed=seed)
        for step in range(65, 1065):
            loss, norm = 2 + 0.03 * chance.gauss(0, 1), math.exp(0.1 * chance.gauss(0, 1))
            assert detector.judge(step, loss, norm) is None
            detector.accept(loss, norm, {}, {"w": 3.0})


def test_a_detector_goes_on_from_its_state_as_if_nothing_had_happened():
    detector = trained(units={"a": 1.0})
    detector.judge(201, 3.0, 1.0)
    other = Detector()
    other.load(json.loads(json.dumps(detector.state())))
    assert other.state() == detector.state()
    for d in (detector, other):
        d.accept(2.01, 1.1, {"a": 1.1}, {"w": 3.1})
    assert other.state() == detector.state()
    assert other.judge(202, 2.5, 1.0) == detector.judge(202, 2.5, 1.0)


def test_a_new_phase_forgets_the_windows_only():
    detector = trained()
    detector.begin_phase()
    assert detector.judge(201, 2.3, 30.0) is None
    assert detector.seen == 200
    assert detector.judge(201, math.nan, 1.0).kind == "nonfinite"
    assert detector.judge(201, 6.0, 1.0) is None  # a single one is no divergence
    for _ in range(2):
        detector.accept(6.0, 1.0, {})
    assert detector.judge(203, 6.0, 1.0).kind == "divergence"
