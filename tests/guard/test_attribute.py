import math
from collections.abc import Collection

import pytest

from halfulp.guard.attribute import DATA, HARDWARE, PRECISION, STATE, UNKNOWN, attribute
from halfulp.guard.detect import Detector, Trigger
from halfulp.guard.host import ALL, Pass

UNITS = ("emb", "layers.0.ffn", "layers.1.ffn", "head")
WELL = dict.fromkeys(UNITS, 0.5)
SPIKE = Trigger("spike", 201, 201, 1, {})


class Host:
    """Passes by what is in fp32; `well` is the pass of a fresh batch in the reference."""

    deterministic = True

    def __init__(
        self, bad: Pass, reference: Pass, *, fresh: Pass | None = None,
        one: dict[str, Pass] | None = None, repeats: tuple[Pass, ...] = (), differs: str = "",
        broken: str = "",
    ) -> None:  # fmt: skip
        self.bad, self.reference, self.fresh = bad, reference, fresh
        self.one, self.repeats = one or {}, list(repeats)
        self.differs, self.broken = differs, broken
        self.cost = 0.0

    def replay(
        self, off: Collection[str] = (), *, fresh: int = 0, backward: bool = True,
        keep: bool = False, compare: bool = False,
    ) -> Pass:  # fmt: skip
        self.cost += 1 if backward else 1 / 3
        if fresh:
            assert self.fresh is not None
            return self.fresh
        if tuple(off) == ALL:
            return self.reference
        if off:
            return self.one.get(next(iter(off)), self.bad)
        return self.repeats.pop(0) if self.repeats else self.bad

    def differing_unit(self) -> str:
        self.cost += 2 / 3
        return self.differs

    def broken_unit(self) -> str:
        self.cost += 1
        return self.broken


def detector() -> Detector:
    found = Detector()
    for step in range(200):
        found.accept(2 + 0.03 * math.sin(step), 1 + 0.1 * math.cos(step), WELL)
    return found


def passed(loss: float, norm: float = 1.0, **more: dict[str, float]) -> Pass:
    return Pass(loss, norm, more.pop("units", WELL), **more)


def close(units: dict[str, float] | None = None) -> dict[str, float]:
    """How far the gradients are from the reference ones: 5 %, but for some units."""
    return dict.fromkeys(UNITS, 0.025) | (units or {})


def judged(host: Host, trigger: Trigger = SPIKE, seen: Pass | None = None, suspects=None):
    found = attribute(host, trigger, detector(), seen=seen or host.bad, suspects=suspects)
    assert found.passes == pytest.approx(host.cost, abs=0.01)
    return found


def test_another_result_from_the_same_batch_is_the_hardware():
    bad = passed(5.0, 9.0)
    once = Host(passed(2.0), passed(2.0))
    verdict = judged(once, seen=bad)
    assert (verdict.kind, verdict.units) == (HARDWARE, ())
    assert verdict.evidence["persistent"] is False
    always = Host(passed(4.0), passed(2.0), repeats=(passed(5.1), passed(5.2)), differs="head")
    verdict = judged(always, seen=bad)
    assert (verdict.kind, verdict.units) == (HARDWARE, ("head",))
    assert verdict.evidence["persistent"] is True


def test_kernels_that_are_not_deterministic_may_differ_a_little():
    for deterministic, kind in ((False, DATA), (True, HARDWARE)):
        host = Host(passed(5.0001, 9.0), passed(5.0, 9.0), fresh=passed(2.0))
        host.deterministic = deterministic
        assert judged(host, seen=passed(5.0, 9.0)).kind == kind


def test_a_batch_that_is_as_bad_in_the_reference_is_bad_data():
    bad = passed(5.0, 9.0)
    verdict = judged(Host(bad, bad, fresh=passed(2.0)))
    assert (verdict.kind, verdict.units, verdict.passes) == (DATA, (), 3.0)
    nan = passed(math.nan, math.nan)
    assert judged(Host(nan, nan, fresh=passed(2.0))).kind == DATA


def test_a_state_that_is_bad_with_any_batch_names_the_unit_that_has_grown():
    grown = WELL | {"layers.1.ffn": 20.0, "layers.0.ffn": 2.0}
    bad = passed(5.0, 20.0, units=grown)
    verdict = judged(Host(bad, bad, fresh=bad))
    assert (verdict.kind, verdict.units) == (STATE, ("layers.1.ffn",))
    assert verdict.margin == pytest.approx(10)
    assert [row["growth"] for row in verdict.rows] == pytest.approx([40, 4, 1, 1])


@pytest.mark.parametrize("all_units", [5.0, 0.0])
def test_a_state_in_which_all_units_have_changed_alike_names_none(all_units):
    bad = passed(5.0, 20.0, units=dict.fromkeys(UNITS, all_units))
    verdict = judged(Host(bad, bad, fresh=bad))
    assert (verdict.kind, verdict.units) == (STATE, ())


def test_a_state_that_is_not_finite_names_the_unit_that_broke():
    nan = passed(math.nan, math.nan)
    trigger = Trigger("nonfinite", 201, 201, 1, {})
    verdict = judged(Host(nan, nan, fresh=nan, broken="layers.0.ffn"), trigger)
    assert (verdict.kind, verdict.units) == (STATE, ("layers.0.ffn",))


def test_leave_one_in_names_the_smallest_set_that_explains_the_excess():
    bad = passed(3.0, 3.0)
    reference = passed(2.0, differences=close({"layers.1.ffn": 0.2, "head": 0.15}))
    one = {"layers.1.ffn": passed(2.1), "layers.0.ffn": passed(2.95)}
    verdict = judged(Host(bad, reference, one=one))
    assert (verdict.kind, verdict.units) == (PRECISION, ("layers.1.ffn",))
    assert verdict.margin == pytest.approx(0.9 / 0.05)
    assert not verdict.backward  # gradients are good: the forward pass is enough
    assert verdict.evidence["excess"] == pytest.approx(1)
    two = {"layers.1.ffn": passed(2.5), "head": passed(2.6)}
    verdict = judged(Host(bad, reference, one=two))
    assert verdict.units == ("layers.1.ffn", "head")


def test_useless_gradients_are_precision_although_the_loss_is_the_same():
    bad = passed(2.0, 30.0)
    noisy = close({"head": 0.4, "layers.0.ffn": 0.35})
    verdict = judged(Host(bad, passed(2.0, differences=noisy)))
    assert verdict.kind == PRECISION
    assert set(verdict.units) == {"head", "layers.0.ffn"}
    assert verdict.backward


def test_a_gradient_that_alone_is_not_finite_is_searched_in_the_gradient():
    bad = passed(2.0, math.inf)
    reference = passed(2.0, 1.0, differences=close({"layers.0.ffn": math.inf}))
    one = {unit: passed(2.0, math.inf) for unit in UNITS} | {"layers.0.ffn": passed(2.0, 1.0)}
    trigger = Trigger("nonfinite", 201, 201, 1, {})
    verdict = judged(Host(bad, reference, one=one), trigger)
    assert (verdict.kind, verdict.units, verdict.margin) == (PRECISION, ("layers.0.ffn",), math.inf)


def test_an_outlier_that_nothing_explains_is_not_told():
    bad = passed(5.0, 9.0)
    verdict = judged(Host(bad, passed(2.0, differences=close())))
    assert (verdict.kind, verdict.units) == (UNKNOWN, ())


def test_suspects_of_a_numeric_rule_are_named_with_the_margin_on_the_loss():
    again = passed(2.012, differences={})
    reference = passed(2.0, differences=close({"layers.1.ffn": 0.5}))
    one = {"layers.1.ffn": passed(2.0002), "head": passed(2.0110)}
    host = Host(again, reference, one=one)
    trigger = Trigger("numeric", 201, 201, 0, {})
    verdict = attribute(host, trigger, detector(), seen=None, suspects={"layers.1.ffn": 18.0})
    assert (verdict.kind, verdict.units) == (PRECISION, ("layers.1.ffn",))
    assert verdict.margin == pytest.approx(11.8)
    assert verdict.rows[0]["over_threshold"] == 18.0


@pytest.mark.parametrize("mends", [0.5, 0.0])  # share of the suspect's error in the gradient
def test_a_suspect_that_the_loss_does_not_mind_has_its_margin_on_the_gradient(mends):
    wrong = {"layers.1.ffn": 0.5, "layers.0.ffn": 0.3}
    again, reference = passed(2.0), passed(2.0, differences=close(wrong))
    whole = math.hypot(*close(wrong).values())
    one = {
        "layers.1.ffn": passed(2.001, differences={"emb": whole * (1 - 0.96 * mends)}),
        "layers.0.ffn": passed(2.0, differences={"emb": whole * (1 - 0.04)}),
    }
    host = Host(again, reference, one=one)
    host.bad = passed(2.0, differences=close(wrong))
    trigger = Trigger("numeric", 201, 201, 0, {})
    verdict = attribute(host, trigger, detector(), seen=None, suspects={"layers.1.ffn": 3.0})
    assert (verdict.kind, verdict.units) == (PRECISION, ("layers.1.ffn",))
    assert verdict.evidence["margin of"] == "gradient"
    assert verdict.passes == pytest.approx(host.cost, abs=0.01)
    if mends:
        assert verdict.margin == pytest.approx(24 * mends)
    else:
        assert math.isnan(verdict.margin)  # another unit mends more


@pytest.mark.parametrize("kind", ["sustained", "divergence"])
def test_slow_trouble_is_precision_where_the_reference_helps_or_gradients_are_noise(kind):
    trigger = Trigger(kind, 201, 150, 2, {})
    bad = passed(3.0)
    helps = Host(bad, passed(2.1, differences=close()), one={"head": passed(2.2)})
    assert judged(helps, trigger).kind == PRECISION
    noise = Host(bad, passed(3.0, differences=close({"head": 0.45})))
    verdict = judged(noise, trigger)
    assert (verdict.kind, verdict.units) == (PRECISION, ("head",))
    neither = Host(bad, passed(3.0, differences=close()))
    assert judged(neither, trigger).kind == STATE
