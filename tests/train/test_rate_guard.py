import itertools
import json
import math
import random

from halfulp.train.rate_guard import GROWTH, QUIET, RateGuard


def noisy(seed: int, steps: int, spread: float = 0.05) -> list[float]:
    """A loss that falls from 6 to 3 with normal noise."""
    chance = random.Random(seed)
    return [3 + 3 * 0.99**step + chance.gauss(0, spread) for step in range(steps)]


def watch(guard: RateGuard, losses, norms=None) -> list[tuple[int, str | None, str]]:
    found = []
    for step, loss in enumerate(losses, start=1):
        values = {kind: norm[step - 1] for kind, norm in (norms or {}).items()}
        found += [(step, a.kind, a.why) for a in guard.observe(step, loss, values)]
    return found


def test_a_noisy_loss_is_no_spike():
    """10 seeds of 400 losses; a normal deviate exceeds 6 with probability 1e-9."""
    for seed in range(10):
        assert watch(RateGuard(0), noisy(seed, 400)) == []


def test_a_spike_is_one_alarm_for_all_until_the_quiet_is_over():
    losses = noisy(0, 500)
    for step in (150, 160, 150 + QUIET + 20):
        losses[step - 1] += 2.0
    found = watch(RateGuard(0), losses)
    assert [(step, kind) for step, kind, _ in found] == [(150, None), (150 + QUIET + 20, None)]
    assert "standard deviations above its mean" in found[0][2]


def test_a_lasting_rise_is_seen_though_it_moves_the_mean():
    losses = noisy(0, 300)
    losses = [loss + max(0, step - 200) * 0.02 for step, loss in enumerate(losses)]
    (found,) = watch(RateGuard(0), losses)
    assert found[0] > 200


def test_nothing_is_said_before_the_start_or_the_first_mean():
    losses = [3.0] * 20 + [9.0] + [3.0] * 100
    assert watch(RateGuard(0), losses) == []
    losses = noisy(0, 200)
    losses[150] += 2
    assert watch(RateGuard(160), losses) == []
    assert len(watch(RateGuard(140), losses)) == 1


def growing(steps: int, rate: float, start: int = 100) -> list[float]:
    return [math.exp(rate * max(0, step - start)) for step in range(steps)]


def test_a_gradient_norm_that_triples_while_the_loss_stands_is_a_runaway():
    """exp(0.015 × 100) is 4.5 and exp(0.008 × 100) 2.2; a runaway is one alarm until the quiet is
    over, and then another."""
    chance = random.Random(0)
    level = [3 + 1e-4 * step + chance.gauss(0, 0.005) for step in range(600)]
    norms = {"vo": growing(600, 0.015), "qk": growing(600, 0.008)}
    found = watch(RateGuard(0), level, norms)
    assert {kind for _, kind, _ in found} == {"vo"}
    steps = [step for step, _, _ in found]
    assert len(steps) >= 2
    assert 100 + math.log(GROWTH) / 0.015 < steps[0] < 100 + math.log(GROWTH) / 0.015 + 30
    assert all(b - a >= QUIET for a, b in itertools.pairwise(steps))


def test_gradient_norms_that_grow_while_the_loss_falls_are_no_runaway():
    falling = [6.0 - 0.002 * step for step in range(600)]
    assert watch(RateGuard(0), falling, {"vo": growing(600, 0.015)}) == []


def test_a_guard_goes_on_from_its_state_through_json():
    losses, norms = noisy(1, 400), growing(400, 0.02)
    losses[300:] = [losses[300] + 2.0] * 100
    whole, first, second = RateGuard(10), RateGuard(10), RateGuard(10)
    told = watch(whole, losses, {"vo": norms})
    watch(first, losses[:250], {"vo": norms})
    second.load(json.loads(json.dumps(first.state())))
    later = [
        (step, alarm.kind, alarm.why)
        for step in range(251, 401)
        for alarm in second.observe(step, losses[step - 1], {"vo": norms[step - 1]})
    ]
    assert later == [item for item in told if item[0] > 250] != []
    assert second.state() == whole.state()
