"""Verdicts: their rules, lost runs in both cases, and that the numbers named would change them."""

import itertools
import math
import re

import pytest
from scipy.stats import fisher_exact, t
from stand_in_tables import StandInTable, gap, two, window

from halfulp.errors import ConfigError
from halfulp.sweep.criteria import FAIL, PASS, UNKNOWN, overall, seeds_for
from halfulp.sweep.failures import Failures
from halfulp.sweep.inputs import Inputs
from halfulp.sweep.money import money
from halfulp.sweep.verdict import verdicts

MANY = Failures(0, 60)


def verdict(table, inputs=None, **more):
    (found,) = verdicts(table, money(table, inputs) if inputs else None, **more)
    return found


def criterion(found, name):
    return next(c for c in found.criteria if c.name == name)


def number(text, pattern):
    return float(re.search(pattern, text.replace("−", "-"))[1])


@pytest.mark.parametrize(
    ("value", "half", "status"),
    [
        (0.002, 0.002, PASS),
        (0.008, 0.002, UNKNOWN),  # touches the bar
        (0.012, 0.0021, UNKNOWN),
        (0.0121, 0.002, FAIL),
        (-0.05, 0.01, PASS),
        (0.0, math.inf, UNKNOWN),
    ],
)
def test_the_loss_is_judged_by_its_whole_interval(value, half, status):
    assert criterion(verdict(two({"gap": gap(value, half)})), "loss").status == status


def test_the_loss_must_hold_on_every_data_set():
    code = two({"data": "code", "gap": gap(0.05)}, {"data": "code"}).all_rows
    found = verdict(StandInTable(reference="bf16_amp", all_rows=two({}).all_rows + code))
    assert found.status == FAIL
    assert "on code" in found.sentence
    none = verdict(StandInTable(reference="bf16_amp", all_rows=two({"gap": None}).all_rows))
    assert none.status == UNKNOWN


def test_failures_follow_fishers_exact_test_and_the_shares():
    for own, reference in itertools.product(range(9), repeat=2):
        table = two({"failures": Failures(own, 8)}, {"failures": Failures(reference, 8)})
        p = fisher_exact([[own, 8 - own], [reference, 8 - reference]], "greater").pvalue
        expected = FAIL if p < 0.05 else PASS if own <= reference < 8 else UNKNOWN
        assert criterion(verdict(table), "failures").status == expected


def test_a_reference_that_always_fails_is_no_yardstick():
    for own in (0, 3):
        table = two({"failures": Failures(own, 3)}, {"failures": Failures(3, 3)})
        found = verdict(table)
        assert found.status == UNKNOWN
        assert "what always fails is no yardstick" in criterion(found, "failures").changes[0]
    fine = two({"data": "code"}, {"data": "code"}).all_rows
    bad = two({"failures": Failures(1, 3)}, {"failures": Failures(3, 3)}).all_rows
    found = verdict(StandInTable(reference="bf16_amp", all_rows=bad + fine))
    assert found.status == UNKNOWN
    assert "succeeds on text" in criterion(found, "failures").changes[0]


def test_no_failure_prints_its_bound():
    text = criterion(verdict(two({"failures": Failures(0, 5)})), "failures").text
    assert text.startswith(
        "0 of 5 failed (success ≥ 0.55 at 95 % confidence, 1.11 attempts expected)"
    )
    none = criterion(verdict(two({"failures": Failures(3, 3)})), "failures").text
    assert "success ≥ 0.00" in none
    assert "∞ attempts" in none


def test_three_of_three_against_none_of_three_is_enough():
    found = verdict(two({"failures": Failures(3, 3)}))
    assert criterion(found, "failures").status == FAIL


@pytest.mark.parametrize(
    ("own", "reference", "status"),
    [
        (Failures(0, 8, 1), Failures(0, 8), UNKNOWN),
        (Failures(0, 8, 1), Failures(2, 8), PASS),
        (Failures(0, 8), Failures(0, 8, 3), PASS),
        (Failures(5, 8), Failures(0, 8), FAIL),
        (Failures(5, 8), Failures(0, 8, 4), UNKNOWN),
        (Failures(5, 8, 8), Failures(0, 8), UNKNOWN),
        (Failures(0, 0, 3), Failures(0, 3), UNKNOWN),
    ],
)
def test_failures_hold_whatever_lost_runs_would_have_come_to(own, reference, status):
    found = verdict(two({"failures": own}, {"failures": reference}))
    assert criterion(found, "failures").status == status
    assert ("lost" in found.sentence) == bool(own.lost or reference.lost)


@pytest.mark.parametrize(
    ("seen", "status"),
    [
        (window(3.0, 2.0, 4.0), PASS),
        (window(3.0, 2.0, open_high=True), PASS),
        (window(3.0, 0.0, 4.0), UNKNOWN),
        (window(0.0, 0.0, 1.0), UNKNOWN),
        (window(0.0), FAIL),
        (None, UNKNOWN),
    ],
)
def test_the_window_must_exist(seen, status):
    found = criterion(verdict(two({"window": seen})), "window")
    assert found.status == status
    if seen and seen.open_ended:
        assert "at least 3.0 octaves" in found.text
        assert any("reaches further" in change for change in found.changes)


@pytest.mark.parametrize(
    ("r", "status"), [(1.35, PASS), (0.8, FAIL), (1.01, UNKNOWN), (None, UNKNOWN)]
)
def test_the_cost_is_judged_by_its_whole_interval(r, status):
    table = two({"failures": MANY}, {"failures": MANY})
    inputs = Inputs(speedup=r) if r else Inputs(gpu="mi300x")
    assert criterion(verdict(table, inputs), "cost").status == status


def test_the_verdict_is_that_of_its_criteria():
    assert overall([PASS, PASS]) == PASS
    assert overall([PASS, UNKNOWN]) == UNKNOWN
    assert overall([FAIL, UNKNOWN, PASS]) == FAIL
    good, bad = {"failures": MANY}, {"failures": MANY, "gap": gap(0.3)}
    assert verdict(two(good, {"failures": MANY}), Inputs(speedup=1.35)).status == PASS
    found = verdict(two(bad, {"failures": MANY}), Inputs(speedup=1.35))
    assert found.status == FAIL
    assert found.sentence.startswith("te_current: fail, loss +0.300 nats [+0.298, +0.302]")
    assert str(found) == found.sentence


def test_the_sentence_has_cost_break_even_and_horizon():
    table = two({"failures": Failures(6, 60)}, {"failures": MANY})
    found = verdict(table, Inputs(speedup=1.35, tokens=2.5e8))
    assert number(found.sentence, r"([\d.]+)× \[") == pytest.approx(0.78, abs=0.02)
    assert "of bf16_amp's cost at r = 1.35;" in found.sentence
    assert number(found.sentence, r"stops paying below r = ([\d.]+)") == pytest.approx(
        1.05, abs=0.02
    )
    assert found.sentence.endswith("evidence covers 0.4 % of your run")
    assert found.horizon == pytest.approx(0.004)
    shorter = verdict(table, Inputs(speedup=1.35, tokens=1e6))
    assert shorter.sentence.endswith("evidence covers all of your run")


def test_a_published_speedup_is_called_that():
    table = two({"failures": MANY}, {"failures": MANY})
    found = verdict(table, Inputs(gpu="h100"))
    assert "published" in found.sentence
    assert "published" not in verdict(table, Inputs(speedup=1.3)).sentence


def test_missing_and_refused_runs_are_told():
    assert "4 of 9 runs are not done" in verdict(two({"missing": 4})).sentence
    refused = verdict(two({"refused": "the model has no linear layers"}))
    assert refused.status == UNKNOWN
    assert "no linear layers" in refused.sentence
    assert refused.criteria == ()


def test_the_bars_that_would_change_it_do():
    table = two({"gap": gap(0.005, 0.003)})
    bar = number(verdict(table).changes[0], r"below \+([\d.]+) nats")
    assert verdict(table, bar_nats=bar + 1e-6).status == PASS
    assert verdict(table, bar_nats=bar - 1e-6).status == UNKNOWN
    worse = two({"gap": gap(0.05, 0.003)})
    bar = number(verdict(worse).changes[0], r"above \+([\d.]+) nats")
    assert verdict(worse).status == FAIL
    assert verdict(worse, bar_nats=bar + 1e-6).status == PASS


def test_the_seeds_that_would_change_it_do():
    one = gap(0.02, 0.013, n=3)
    seeds = seeds_for(one, 0.01)
    scatter = 0.013 * math.sqrt(3) / t.ppf(0.975, 2)
    halves = [t.ppf(0.975, n - 1) * scatter / math.sqrt(n) for n in (seeds, seeds - 1)]
    assert halves[0] < 0.01 <= halves[1]
    assert seeds_for(gap(0.01, 0.01), 0.01) is None
    assert seeds_for(gap(0.01, math.inf, n=1), 0.01) == 2


def test_the_speedups_that_would_change_it_do():
    table = two({"failures": Failures(1, 20)}, {"failures": Failures(1, 20)})
    unsure = verdict(table, Inputs(speedup=1.02))
    r = number(" ".join(criterion(unsure, "cost").changes), r"above r = ([\d.]+)")
    assert criterion(verdict(table, Inputs(speedup=r + 0.01)), "cost").status == PASS
    assert criterion(verdict(table, Inputs(speedup=r - 0.02)), "cost").status == UNKNOWN
    dear = verdict(table, Inputs(speedup=0.5))
    r = number(" ".join(criterion(dear, "cost").changes), r"above r = ([\d.]+)")
    assert criterion(verdict(table, Inputs(speedup=r - 0.01)), "cost").status == FAIL
    assert criterion(verdict(table, Inputs(speedup=r + 0.02)), "cost").status == UNKNOWN


def test_the_multiple_of_seeds_that_would_change_it_does():
    table = two({"failures": Failures(0, 3)})
    change = next(c for c in verdict(table, Inputs(speedup=1.35)).changes if "as many seeds" in c)
    factor = 2 if change.startswith("twice") else int(change.split()[0])
    for times, status in ((factor, PASS), (factor // 2, UNKNOWN)):
        runs = Failures(0, 3 * times)
        more = two({"failures": runs}, {"failures": runs})
        assert criterion(verdict(more, Inputs(speedup=1.35)), "cost").status == status


def test_the_multiple_can_be_larger_than_two():
    found = verdict(two({"failures": Failures(0, 3)}), Inputs(speedup=1.15))
    change = next(c for c in found.changes if "as many seeds" in c)
    assert change == "4 times as many seeds with the same shares would show that it pays"


def test_the_runs_that_would_change_it_do():
    found = verdict(two({"failures": Failures(2, 5)}, {"failures": Failures(0, 5)}))
    runs = int(number(" ".join(criterion(found, "failures").changes), r"(\d+) runs"))
    more = two({"failures": Failures(2 * runs // 5, runs)}, {"failures": Failures(0, runs)})
    assert criterion(verdict(more), "failures").status == FAIL
    clean = criterion(verdict(two({"failures": Failures(0, 3)})), "failures")
    assert clean.changes[0].startswith("29 runs without a further failure")
    bad = criterion(verdict(two({"failures": Failures(8, 8)}, {"failures": MANY})), "failures")
    fewer = int(bad.changes[0].split()[0])
    for failed, status in ((fewer, UNKNOWN), (fewer + 1, FAIL)):
        table = two({"failures": Failures(failed, 8)}, {"failures": MANY})
        assert criterion(verdict(table), "failures").status == status


def test_no_bar_is_named_that_cannot_be_given():
    assert criterion(verdict(two({"gap": gap(-0.05, 0.01)})), "loss").changes == ()


@pytest.mark.parametrize("bar", [0.0, -0.01, math.nan, math.inf])
def test_a_bar_that_nothing_can_meet_is_refused(bar):
    with pytest.raises(ConfigError, match="bar_nats"):
        verdicts(two({}), bar_nats=bar)
