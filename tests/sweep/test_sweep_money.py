"""Bills of recipes against closed forms, and what stands in for what the user has not said.

Medians of 20,000 draws are compared with closed forms; the draws are the same in every run.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import beta
from stand_in_tables import StandInRow, StandInTable, two, window

from halfulp.errors import ConfigError
from halfulp.sweep import cost
from halfulp.sweep.evidence import gather
from halfulp.sweep.failures import Failures
from halfulp.sweep.inputs import Inputs, read_speedup
from halfulp.sweep.money import bill, money
from halfulp.sweep.ranges import Range, spanned

KNOWN = Inputs(gpu_hours=1000, price_usd=2.0, speedup=1.35, prior_octaves=8, proxy_fraction=0.05)


def certain(own, reference, **more):
    """Failure shares known from a million runs."""
    return two(
        {"failures": Failures(round(own * 1e6), 1_000_000), "abandoned_fraction": 0.4, **more},
        {"failures": Failures(round(reference * 1e6), 1_000_000), "abandoned_fraction": 0.7},
    )


def test_the_bill_is_the_closed_form_where_everything_is_known():
    table = certain(0.4, 0.1, window=window(1.5))
    found = money(table, replace(KNOWN, extra_tokens={"te_current": 0.1}))
    own, reference = found.cost("te_current"), found.cost("bf16_amp")
    runs = cost.expected_runs(0.6, abandoned_fraction=0.4) + 0.05 * 6
    runs_reference = cost.expected_runs(0.9, abandoned_fraction=0.7) + 0.05 * 2
    even = 1.1 * runs / runs_reference
    assert own.search.value == pytest.approx(0.3)
    assert own.break_even.value == pytest.approx(even, rel=0.001)
    assert own.ratio.value == pytest.approx(even / 1.35, rel=0.001)
    assert own.gpu_hours.value == pytest.approx(1000 * 1.1 * runs / 1.35, rel=0.001)
    assert own.usd.value == pytest.approx(2 * own.gpu_hours.value, rel=1e-6)
    assert reference.usd.value == pytest.approx(2000 * runs_reference, rel=0.001)
    assert (reference.ratio.low, reference.ratio.high) == (1.0, 1.0)
    assert own.ratio.high / own.ratio.low < 1.01


@pytest.mark.parametrize(("r", "saves"), [(1.2, 0.0), (1.3, 1.0)])
def test_the_bill_flips_between_speedups_of_1_2_and_1_3(r, saves):
    table = two(
        {"failures": Failures(400_000, 1_000_000)}, {"failures": Failures(100_000, 1_000_000)}
    )
    # A search that costs next to nothing leaves r* = 1.263.
    found = money(table, Inputs(speedup=r, proxy_fraction=1e-9)).cost("te_current")
    assert found.break_even.value == pytest.approx(1.263, abs=0.002)
    assert found.saves == saves


def test_at_the_break_even_it_is_a_toss_up():
    table = two({"failures": Failures(3, 12)}, {"failures": Failures(1, 12)})
    even = money(table, KNOWN).cost("te_current").break_even.value
    found = money(table, replace(KNOWN, speedup=even)).cost("te_current")
    assert found.ratio.value == pytest.approx(1.0, abs=1e-3)
    assert found.saves == pytest.approx(0.5, abs=0.01)
    assert found.ratio.low < 0.95 < 1.05 < found.ratio.high


def test_the_interval_of_the_retries_is_that_of_the_posterior():
    found = money(two({"failures": Failures(1, 6)}), KNOWN).cost("te_current")
    low, high = (cost.expected_runs(beta.ppf(q, 5.5, 1.5)) for q in (0.975, 0.025))
    assert found.retries.low == pytest.approx(low, rel=0.005)
    assert found.retries.high == pytest.approx(high, rel=0.05)  # in a long tail


def test_lost_runs_widen_the_interval_to_both_sides():
    without = money(two({"failures": Failures(2, 10)}), KNOWN).cost("te_current")
    lost = money(two({"failures": Failures(2, 10, 3)}), KNOWN).cost("te_current")
    best = money(two({"failures": Failures(2, 13)}), KNOWN).cost("te_current")
    worst = money(two({"failures": Failures(5, 13)}), KNOWN).cost("te_current")
    assert lost.ratio.value == without.ratio.value
    assert (lost.ratio.low, lost.ratio.high) == (best.ratio.low, worst.ratio.high)
    assert lost.ratio.low < without.ratio.low < without.ratio.high < lost.ratio.high


def test_lost_runs_of_the_reference_count_the_other_way():
    lost = money(two({}, {"failures": Failures(2, 10, 3)}), KNOWN).cost("te_current")
    kind = money(two({}, {"failures": Failures(5, 13)}), KNOWN).cost("te_current")
    hard = money(two({}, {"failures": Failures(2, 13)}), KNOWN).cost("te_current")
    assert (lost.ratio.low, lost.ratio.high) == (kind.ratio.low, hard.ratio.high)


def test_an_open_window_counts_as_wide_as_it_was_seen():
    found = money(two({"window": window(2.0, open_high=True)}), KNOWN).cost("te_current")
    assert found.search.low == found.search.value == pytest.approx(0.05 * 4)


def test_a_window_that_may_be_empty_has_no_upper_bound():
    found = money(two({"window": window(1.0, 0.0, 3.0)}), KNOWN).cost("te_current")
    assert math.isfinite(found.ratio.value)
    assert found.ratio.high == math.inf


def test_one_seed_gives_a_bill_with_the_widest_interval():
    one = {"failures": Failures(0, 1), "window": window(3.0, 0.0, math.inf)}
    found = money(two(one, one), KNOWN).cost("te_current")
    assert math.isfinite(found.ratio.value)
    assert found.ratio.low < 0.1 < 10 < found.ratio.high
    assert found.search.high == math.inf
    nothing = {"failures": Failures(0, 0), "window": window(1.0, 0.0, math.inf)}
    found = money(two(nothing, one), KNOWN).cost("te_current")
    assert found.ratio.low < 1 < 100 < found.ratio.high


def test_without_a_window_there_is_no_bill():
    found = money(two({"window": None}), KNOWN).cost("te_current")
    assert found.ratio is None
    assert "te_current" in found.missing


def test_the_narrowest_window_and_all_failures_of_several_data_sets():
    rows = (
        two({}).all_rows + two({"data": "code", "window": window(2.0)}, {"data": "code"}).all_rows
    )
    evidence = gather(StandInTable(reference="bf16_amp", all_rows=rows), "te_current")
    assert evidence.window.octaves == 2.0
    assert evidence.failures == Failures(0, 6)
    assert evidence.planned == 18


def test_a_price_for_leaving_moves_the_break_even():
    table = certain(0.1, 0.1)
    free = money(table, KNOWN).cost("te_current")
    paid = money(table, replace(KNOWN, adoption_usd=500)).cost("te_current")
    never = money(table, replace(KNOWN, adoption_usd=5000)).cost("te_current")
    reference = money(table, KNOWN).cost("bf16_amp").usd.value
    assert paid.usd.value == pytest.approx(free.usd.value + 500)
    assert paid.break_even.value == pytest.approx(
        free.break_even.value * reference / (reference - 500), rel=0.001
    )
    assert never.break_even.value == math.inf
    assert never.saves == 0.0


def test_a_guard_that_rescues_makes_retries_cheaper():
    guard = cost.Guard(spikes_per_hour=0.001, rollback_hours=2, rescue=0.8)
    table = certain(0.5, 0.1)
    own = money(table, replace(KNOWN, guard=guard)).cost("te_current")
    expected = cost.expected_runs(0.5, abandoned_fraction=0.4, guard=guard)
    assert own.retries.value == pytest.approx(expected, rel=0.001)
    assert own.ratio.value < money(table, KNOWN).cost("te_current").ratio.value


def test_what_is_not_given_is_listed_with_its_source():
    found = money(two({}), Inputs(gpu_hours=10, gpu="H100"))
    named = {default.name: default for default in found.defaults}
    assert {"price", "speed-up of te_current", "seeds of the search"} <= set(named)
    assert all(default.source for default in found.defaults)
    assert min(named[name].date for name in ("price", "speed-up of te_current")) >= "2025"
    assert found.cost("te_current").usd.low < found.cost("te_current").usd.high / 1.5
    given = Inputs(
        gpu_hours=10, price_usd=2, speedup=1.3, prior_octaves=4, proxy_fraction=0.1, search_seeds=1
    )
    table = two({"abandoned_fraction": 0.3}, {"abandoned_fraction": 0.3})
    assert money(table, given).defaults == ()


def test_published_speedups_are_end_to_end_and_against_bf16():
    speed, rows = Inputs(gpu="h100").speed_of("te_current", "bf16_amp")
    assert all(row.scope == "step" for row in rows)
    assert 1.2 < speed.low < speed.value < speed.high < 1.6
    assert Inputs(gpu="h100").speed_of("te_current", "fp32") == (None, ())
    for reference in ("bf16_amp:0.2+te_current", "bf16.toml"):
        assert Inputs().speed_of("te_current", reference) == (None, ())
    assert Inputs(gpu="h100").speed_of("nvfp4", "bf16_amp") == (None, ())
    assert Inputs(gpu="b200").speed_of("nvfp4", "bf16_amp")[0] is not None
    assert Inputs().speed_of("mask_e5m7", "bf16_amp") == (None, ())
    assert Inputs(speedup={"nvfp4": 1.6}).speed_of("te_current", "bf16_amp")[1]


def test_without_a_speedup_only_the_break_even_is_known():
    rows = (*two({}).all_rows, StandInRow(recipe="mask_e5m7", window=window(3.0)))
    found = money(StandInTable(reference="bf16_amp", all_rows=rows), Inputs()).cost("mask_e5m7")
    assert found.ratio is None
    assert found.missing
    assert found.break_even.value == pytest.approx(1.0, abs=0.1)


def test_a_recipe_has_the_same_bill_whatever_else_is_in_the_table():
    table = two({"failures": Failures(1, 5)})
    more = replace(table, all_rows=(*table.all_rows, StandInRow(recipe="a", window=window(1.0))))
    assert money(table, KNOWN).cost("te_current") == money(more, KNOWN).cost("te_current")


def test_more_seeds_narrow_the_interval():
    found = money(two({"window": window(3.0, 1.0, 5.0)}), KNOWN)
    few, many = found.cost("te_current").ratio, found.with_seeds("te_current", 16).ratio
    assert (many.high - many.low) < (few.high - few.low) / 3
    evidence = gather(two({"window": window(3.0, 1.0, 5.0)}), "te_current").times(16)
    assert (evidence.window.low, evidence.window.high) == (2.5, 3.5)


def test_a_refused_recipe_has_no_bill():
    found = money(two({"refused": "no"}), KNOWN)
    assert [c.recipe for c in found.costs] == ["bf16_amp"]


def test_draws_have_the_ends_that_they_were_given():
    rng = np.random.default_rng(0)
    normal = Range(value=3.0, low=2.0, high=6.0).normal(rng, 100_000)
    # Quantiles of 100,000 draws: standard errors below 0.02 and 0.005 at the ends.
    assert np.quantile(normal, [0.025, 0.5, 0.975]) == pytest.approx([2.0, 3.0, 6.0], abs=0.1)
    between = Range(value=3.0, low=2.0, high=6.0).triangular(rng, 100_000)
    assert 2.0 <= between.min() < 2.1 < 5.9 < between.max() <= 6.0
    assert Range(value=1.0, low=0.0, high=2.0).normal(rng, 100_000).min() == 0.0
    some = np.array([[1.0, 2.0, math.inf]] * 3)
    assert spanned(some) == Range(value=2.0, low=1.0, high=math.inf)


def test_speedups_as_text():
    assert read_speedup("1.35") == 1.35
    assert read_speedup("te_current=1.35, nvfp4=1.28-1.37") == {
        "te_current": 1.35,
        "nvfp4": (1.28, 1.37),
    }


@pytest.mark.parametrize("text", ["fast", "1-2-3", "a=1,a=2", "a=1,2", "=2", "a=", ""])
def test_text_that_is_no_speedup_is_named(text):
    with pytest.raises(ConfigError, match="speed-up"):
        read_speedup(text)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: Inputs(price_usd=-1), "price_usd"),
        (lambda: Inputs(gpu_hours=0), "gpu_hours"),
        (lambda: Inputs(speedup={"a": math.nan}), "speedup a"),
        (lambda: Inputs(speedup=(1.4, 1.2)), "speedup"),
        (lambda: Inputs(speedup=135), "at most 50"),
        (lambda: Inputs(gpu="H1000"), "H1000"),
        (lambda: Inputs(gpu="mi300x", gpu_hours=5), "price"),
        (lambda: Inputs(adoption_usd=5), "GPU-hours"),
        (lambda: Inputs(adoption_usd=-5, gpu_hours=1, price_usd=1), "adoption_usd"),
        (lambda: money(two({}), Inputs(speedup={"te_curent": 1.3})), "te_current"),
        (lambda: money(two({}), Inputs(speedup={"bf16_amp": 1.3})), "is the reference"),
        (lambda: money(two({}), Inputs(extra_tokens={"x": 0.1})), "no recipe of this sweep"),
        (lambda: money(two({}), Inputs(extra_tokens={"te_current": -2.0})), "extra_tokens"),
    ],
)
def test_what_cannot_be_billed_is_named(call, word):
    with pytest.raises(ConfigError, match=word):
        call()


def test_a_recipe_against_itself_costs_the_same():
    evidence = gather(two({}), "te_current")
    assert bill(evidence, evidence, KNOWN, octaves=8).ratio == Range(value=1, low=1, high=1)


@pytest.mark.slow
@pytest.mark.parametrize(("own", "reference", "runs"), [(0.7, 0.9, 8), (0.5, 0.6, 12)])
def test_the_interval_of_the_break_even_holds_what_it_says(own, reference, runs):
    # 300 sweeps with known probabilities. At a coverage of 0.95 the share that holds the truth is
    # below 0.90 or above 0.99 with probability below 1e-3.
    rng = np.random.default_rng(5)
    true = cost.break_even_speedup(success=own, success_reference=reference)
    inputs = Inputs(proxy_fraction=1e-9)
    held = 0
    for failed, failed_reference in rng.binomial(runs, [1 - own, 1 - reference], (300, 2)):
        table = two(
            {"failures": Failures(int(failed), runs)},
            {"failures": Failures(int(failed_reference), runs)},
        )
        even = money(table, inputs).cost("te_current").break_even
        held += even.low <= true <= even.high
    assert 0.90 <= held / 300 <= 0.99
