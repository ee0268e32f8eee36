"""A state that is kept does not change with the run: snapshots hold states in memory."""

import json
from copy import deepcopy

from halfulp.guard.detect import Detector
from halfulp.train.rate_guard import RateGuard


def steps(detector: Detector, first: int, last: int) -> None:
    for step in range(first, last):
        loss = 3.0 + 0.01 * (step % 7)
        weights = {"w": 1.0 + step / 1000, "v": 2.0}
        assert detector.judge(step, loss, 1.0) is None
        detector.accept(loss, 1.0 + 0.1 * (step % 3), {"layers.0.qk": step / 10}, weights)


def test_what_a_detector_has_told_stays_and_continues_it():
    detector = Detector()
    steps(detector, 1, 100)
    state = detector.state()
    told = deepcopy(state)
    steps(detector, 100, 200)
    assert state == told != detector.state()
    again = Detector()
    again.load(json.loads(json.dumps(state)))
    steps(again, 100, 200)
    assert again.state() == detector.state()
    again.load(state)
    steps(again, 100, 110)
    assert state == told


def test_what_a_rate_guard_has_told_stays():
    guard = RateGuard(start=3)
    for step in range(1, 40):
        guard.observe(step, 3.0, {"qk": 1.0})
    state = guard.state()
    told = deepcopy(state)
    for step in range(40, 80):
        guard.observe(step, 2.0, {"qk": 5.0})
    assert state == told != guard.state()
