import math

import numpy as np
import pytest

from halfulp.errors import RunError
from halfulp.sweep.divergence import FAR, NONFINITE
from halfulp.sweep.failures import Failures
from halfulp.sweep.table import Table
from tests.sweep.grids import LRS, Plan, result, table

CURVE = {"fp32": (2.6, 2.3, 2.5), "nvfp4": (2.5, 2.4, 5.0)}


def losses(cell, **fields):
    """CURVE plus 0.01 per seed; the seed's share is common to both recipes."""
    return {"loss_nats": CURVE[cell.recipe][LRS.index(cell.lr)] + 0.01 * cell.seed, **fields}


def test_a_whole_sweep():
    found = table(Plan(), losses)
    assert [(row.recipe, row.data) for row in found.rows()] == [("fp32", "text"), ("nvfp4", "text")]
    base, low = found.rows()
    assert low is found.row("nvfp4") is found.row("nvfp4", "text")
    assert (base.best_lr, low.best_lr) == (2e-3, 2e-3)
    assert base.loss is not None
    assert base.loss.value == pytest.approx(2.31)
    assert (base.gap, base.gap_same_lr, base.sharpness_ratio) == (None, None, None)
    for gap in (low.gap, low.gap_same_lr):
        assert gap is not None
        # The seeds' share is gone: no spread is left.
        assert (gap.value, gap.low, gap.high, gap.n) == pytest.approx((0.1, 0.1, 0.1, 3))
    assert (low.planned, low.done, low.missing, low.lost, low.refused) == (9, 9, 0, 0, "")
    assert (low.tokens, low.parameters) == (6400, 1000)
    assert low.spikes == {"olmo_core": pytest.approx(0.01)}
    assert (low.sharpness, low.logz) == pytest.approx((0.1, 1.0))


def test_runs_that_broke_have_their_spikes_counted_and_lost_ones_not():
    broken = {"status": "nonfinite", "loss_nats": math.nan, "spikes": {"olmo_core": 0.07}}
    lost = {"status": "died", "spikes": {"olmo_core": 0.5}}
    own = table(Plan(), lambda c: losses(c) | ([broken, lost, {}][c.seed])).row("fp32")
    assert own.failures == Failures(1, 2, 1)
    assert own.spikes == {"olmo_core": pytest.approx(0.04)}


def test_windows_and_sensitivities_are_of_the_curve():
    base, low = table(Plan(), losses).rows()
    assert base.window is not None
    assert low.window is not None
    # δ = 2 % of 2.31; on both sides of 2e-3 the loss rises by 0.3 and 0.2 in an octave.
    assert base.window.octaves == pytest.approx(0.0462 / 0.3 + 0.0462 / 0.2)
    assert low.window.octaves == 0
    assert low.sensitivity is not None
    integral = (2.5 / 2 + 2.4 + 5.0 / 2) / 2
    assert low.sensitivity.own.value == pytest.approx(integral - 2.4)
    assert low.sensitivity.reference.value == pytest.approx(integral - 2.3)


def test_failures_are_counted_at_the_best_rate_in_the_references_window_and_everywhere():
    base, low = table(Plan(), losses).rows()
    assert low.failures == Failures(0, 3)
    assert low.failures_window == Failures(0, 3)  # the reference's window holds 2e-3 alone
    assert low.failures_grid == Failures(3, 9)
    assert {o.failure for o in low.points[2].outcomes} == {FAR}
    assert base.failures_grid == Failures(0, 9)


def test_a_run_that_broke_counts_as_having_learned_nothing():
    def broken(cell):
        bad = cell.recipe == "nvfp4" and cell.seed == 1
        return losses(cell) | ({"status": "nonfinite", "steps": 30} if bad else {})

    low = table(Plan(), broken).row("nvfp4")
    point = low.points[1]
    assert point.failures == Failures(1, 3)
    assert [o.failure for o in point.outcomes] == ["", NONFINITE, ""]
    assert point.mean_nats == pytest.approx((2.4 + 5.5 + 2.42) / 3)
    assert low.gap is not None
    assert low.gap.value > 1
    assert low.gap.low < 0 < low.gap.high
    assert low.abandoned_fraction == pytest.approx((3 * 0.3 + 2 * 1) / 5)


def test_a_break_before_the_first_step_counts_with_the_loss_of_the_others():
    def broken(cell):
        bad = cell.recipe == "nvfp4" and cell.seed == 1
        return losses(cell) | ({"status": "nonfinite", "initial_nats": math.nan} if bad else {})

    outcome = table(Plan(), broken).row("nvfp4").points[0].outcomes[1]
    assert outcome.score_nats == 5.5


def test_lost_runs_count_neither_way_and_are_told():
    def lost(cell):
        gone = cell.recipe == "nvfp4" and cell.seed == 2
        return losses(cell) | ({"status": "died", "loss_nats": math.nan} if gone else {})

    low = table(Plan(), lost).row("nvfp4")
    assert (low.lost, low.done, low.missing) == (3, 9, 0)
    assert low.failures == Failures(0, 2, lost=1)
    assert low.failures.worst == Failures(1, 3)
    assert low.gap is not None
    assert low.gap.n == 2


def test_runs_not_yet_done_are_missing_and_nothing_breaks():
    plan = Plan()
    for done in range(len(plan.cells()) + 1):
        cells = set(plan.cells()[:done])
        found = table(plan, lambda cell, cells=cells: losses(cell) if cell in cells else None)
        base, low = found.rows()
        assert base.done + low.done == done
        assert base.missing + low.missing == 18 - done
        assert (low.best_lr is None) == (low.done == 0)
    empty = table(plan, lambda cell: None).row("nvfp4")
    assert (empty.gap, empty.window, empty.sensitivity, empty.loss) == (None, None, None, None)
    assert empty.failures == Failures(0, 0)
    assert empty.abandoned_fraction is None


def test_a_refused_recipe_is_named_and_has_no_statistics():
    def refused(cell):
        if cell.recipe == "fp32":
            return losses(cell)
        return {"status": "refused", "message": "K = 12 is no multiple of 16", "loss_nats": 0.1}

    low = table(Plan(), refused).row("nvfp4")
    assert low.refused == "K = 12 is no multiple of 16"
    assert (low.best_lr, low.gap, low.window, low.sharpness_ratio) == (None,) * 4
    assert low.failures_grid == Failures(0, 0)
    assert (low.done, low.lost) == (9, 0)


def test_the_ratio_of_sharpness_is_paired_and_geometric():
    ratios = (1.0, 2.0, 4.0)

    def sharp(cell):
        phi = 0.05 * (1 + cell.seed)
        return losses(cell, sharpness=phi * (ratios[cell.seed] if cell.recipe == "nvfp4" else 1))

    low = table(Plan(), sharp).row("nvfp4")
    assert low.sharpness_ratio is not None
    assert low.sharpness_ratio.value == pytest.approx(2.0)
    half = 4.30265 * math.log(2) / math.sqrt(3)
    expected = (2 * math.exp(-half), 2 * math.exp(half))
    assert (low.sharpness_ratio.low, low.sharpness_ratio.high) == pytest.approx(expected, rel=1e-4)
    assert low.sharpness_centered_ratio is not None
    assert low.sharpness_centered_ratio.value == pytest.approx(1.0)


def test_data_sets_do_not_mix():
    plan = Plan(data=("text", "code"))
    found = table(plan, lambda c: losses(c) | ({"loss_nats": 1.0} if c.data == "code" else {}))
    assert [row.data for row in found.rows()] == ["text", "text", "code", "code"]
    gap = found.row("nvfp4", "code").gap
    assert gap is not None
    assert gap.value == 0
    for ask in (("nvfp4", None), ("nvfp4", "music"), ("fp8", "text")):
        with pytest.raises(RunError, match=r"fp32, nvfp4 on text, code"):
            found.row(*ask)


def test_of_two_results_of_a_run_the_later_counts_and_a_foreign_one_is_an_error():
    plan = Plan()
    once = table(plan, losses)
    cell = plan.cells()[0]
    again = Table(once.design, (*once.results, result(cell, loss_nats=1.5)))
    assert again.row("fp32").done == 9
    assert np.isclose(again.row("fp32").points[0].outcomes[0].score_nats, 1.5)
    foreign = table(Plan(recipes=("fp32", "mxfp8")), lambda cell: {}).results
    with pytest.raises(RunError, match="no run of this design"):
        Table(once.design, foreign)
