"""The comparison of detectors, on recordings whose answer is known."""

import math
import random
import sys
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import guard as benchmark
from guard import Recording, Step
from guard_detectors import peers


@dataclass
class At:
    """Fires at given steps."""

    name: str
    steps: Collection[int]

    def observe(self, step, loss, norm, units) -> bool:
        return step in self.steps


def flat(steps: int = 400, *, seed: int = 0, fault: int | None = None) -> list[Step]:
    """Noise of 2 % around 1; with a fault everything is 30 times larger from then on."""
    rng = random.Random(seed)
    made: list[Step] = []
    for step in range(1, steps + 1):
        scale = 30.0 if fault is not None and step >= fault else 1.0
        loss, norm = (scale * (1 + 0.02 * rng.uniform(-1, 1)) for _ in range(2))
        made.append({"step": step, "loss": loss, "grad_norm": norm, "units": {"u": norm}})
    return made


CLEAN = [Recording(steps=flat()) for _ in range(3)]  # 3 · 251 steps count
FAULTY = [Recording(steps=flat(), fault_step=200) for _ in range(3)]


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()[2:]]


def delays_of(*steps: int, clean=CLEAN, false: Collection[int] = ()) -> str:
    runs = {"fault": [*FAULTY]}
    fresh = iter([At("d", false)] * len(clean) + [At("d", steps)] * 3)
    return cells(benchmark.table(runs, clean, lambda steps: [next(fresh)]))[0][2]


@pytest.mark.parametrize(
    ("fired", "delay"),
    [
        ((200,), "0"),
        ((250,), "50"),
        ((251,), "–"),
        ((199,), "–"),
        ((199, 203, 204), "3"),
        ((), "–"),
    ],
)
def test_a_delay_runs_from_the_fault_to_the_next_alarm_within_fifty_steps(fired, delay):
    assert delays_of(*fired) == ", ".join([delay] * 3)


def test_a_delay_that_clean_runs_would_give_too_is_marked():
    # An alarm every 100 steps: a stretch of 5 holds one with probability 5 in 100, one of 6 with 6.
    often = range(150, 400, 100)
    assert delays_of(203, false=often) == "3, 3, 3"
    assert delays_of(206, false=often) == "6?, 6?, 6?"
    fired = [{*often}] * 3
    assert benchmark.chance(fired, CLEAN, 1) == pytest.approx(3 / 251)
    assert benchmark.chance(fired, CLEAN, 101) == 1.0


def test_false_alarms_are_those_of_settled_clean_steps():
    fired = [{1, 149, 150, 400, 401}, set(), {151}]
    low, high = benchmark.exact_interval(3, 753)
    wanted = f"{3000 / 753:.1f} ({1000 * low:.1f}–{1000 * high:.1f})"
    assert benchmark.false_alarms(fired, CLEAN) == wanted


def test_live_alarms_have_a_row_of_their_own():
    clean = [Recording(steps=flat(), live={"guard": ()}) for _ in range(3)]
    faulty = [Recording(steps=flat(), fault_step=200, live={"guard": (201,)}) for _ in range(3)]
    (row,) = cells(benchmark.table({"fault": faulty}, clean, lambda steps: []))
    assert row[0] == "guard"
    assert row[1].startswith("0.0 (0.0–")
    assert row[2] == "1, 1, 1"
    with pytest.raises(ValueError, match="live"):
        benchmark.table({"fault": FAULTY}, clean, lambda steps: [])


def test_all_see_a_jump_and_are_quiet_on_flat_runs():
    def record(fault, seed):
        step = 200 if fault else None
        return Recording(steps=flat(seed=seed, fault=step), fault_step=step)

    faults, clean = benchmark.measure(record, ["×30"])
    rows = cells(benchmark.table(faults, clean, benchmark.everyone))
    assert len(rows) == 1 + len(peers(400))
    for name, false, delays in rows:
        assert false.startswith("0.0 (0.0–4.9)"), name
        # llm-foundry wants the fifth outlier in a row.
        assert delays == ("4, 4, 4" if "llm-foundry" in name else "0, 0, 0"), name


def test_own_rules_do_not_learn_from_a_step_that_is_held():
    own = benchmark.OwnRules()
    heard = [own.observe(i, v, 1.0, {}) for i, v in enumerate([1.0, 1.02] * 60 + [9.0] * 3, 1)]
    assert heard == [False] * 120 + [True] * 3
    assert max(own.rules.loss.values) == 1.02


@pytest.mark.parametrize(
    ("runs", "match"),
    [
        (FAULTY[:2], "2 runs"),
        ([Recording(steps=flat(), fault_step=149)] * 3, "from step 149"),
        ([Recording(steps=flat(249), fault_step=200)] * 3, "ends at 249"),
    ],
)
def test_recordings_that_cannot_tell_are_refused(runs, match):
    with pytest.raises(ValueError, match=match):
        benchmark.table({"fault": runs}, CLEAN, peers)
    with pytest.raises(ValueError, match="no fault: 1 runs"):
        benchmark.table({"fault": FAULTY}, CLEAN[:1], peers)


@pytest.mark.parametrize(("count", "trials"), [(0, 30), (1, 20), (3, 2550), (18, 188), (30, 30)])
def test_exact_interval_leaves_a_fortieth_on_either_side(count, trials):
    low, high = benchmark.exact_interval(count, trials)

    def between(first: int, last: int, p: float) -> float:
        return sum(
            math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(first, last + 1)
        )

    assert low < count / trials < high or count in (0, trials)
    assert (low == 0.0) if count == 0 else between(0, count - 1, low) == pytest.approx(0.975)
    assert (high == 1.0) if count == trials else between(0, count, high) == pytest.approx(0.025)


def test_exact_interval_of_nothing_seen_has_its_closed_form():
    assert benchmark.exact_interval(0, 753)[1] == pytest.approx(1 - 0.025 ** (1 / 753), rel=1e-12)


def test_recovered_loss_is_paired_by_seed_and_says_what_was_not_tried():
    losses = {"bad batch": {"nothing": [2.5, 3.0, math.nan], "guard": [2.01, 3.02, 4.03]}}
    (row,) = cells(benchmark.recovered(losses, [2.0, 3.0, 4.0]))
    assert row == ["bad batch", "not finite in 1 of 3", "–", "+0.020 (+0.010…+0.030)"]
    with pytest.raises(ValueError, match="pray"):
        benchmark.recovered({"bad batch": {"pray": [1.0]}}, [1.0])


def test_a_run_that_was_stopped_has_no_gap():
    losses = {"broken": {"nothing": [2.1, 3.1, 4.1], "guard": [None, 3.0, None]}}
    (row,) = cells(benchmark.recovered(losses, [2.0, 3.0, 4.0]))
    assert row == ["broken", "+0.100 (+0.100…+0.100)", "–", "stopped in 2 of 3"]


def test_own_rules_see_a_weight_that_jumps_where_the_loss_does_not():
    steps = flat()
    for s in steps:
        s["weights"] = {"w": 1.0 + 1e-4 * s["step"] + 7.0 * (s["step"] >= 200)}
    assert benchmark.OwnRules().alarms(steps) == list(range(200, 401))
    assert benchmark.OwnRules().alarms(flat()) == []


def results_of(*actions: str, digest: str = "a") -> dict:
    """Of one recipe: the first seed with these incidents, the others without any."""
    made = {}
    for task in benchmark.clean_runs("te_delayed", "guard", 1000):
        acts = [{"trigger": "spike", "action": a, "step": 1} for a in actions * (task.seed == 0)]
        made[task.name] = {"incidents": acts, "digest": "a"}
        made[replace(task, answer="off").name] = {"incidents": [], "digest": digest}
    return made


@pytest.mark.parametrize(
    ("actions", "row"),
    [
        ((), ["0.0 (0.0–1.2)", "0", "0", "0", "met", "3 of 3"]),
        (("skip",) * 3, ["1.0 (0.2–2.9)", "0", "0", "0", "met", "2 of 2"]),
        (("skip",) * 4, ["1.3 (0.4–3.4)", "0", "0", "0", "missed", "2 of 2"]),
        (("roll back",), ["0.0 (0.0–1.2)", "1", "0", "0", "missed", "2 of 2"]),
        (("raise", "retry"), ["0.0 (0.0–1.2)", "0", "1", "1", "met", "2 of 2"]),
    ],
)
def test_gates_on_clean_runs(actions, row):
    tasks = benchmark.clean_runs("te_delayed", "guard", 1000)
    assert benchmark.gates(tasks, results_of(*actions)) == row


def test_bits_that_differ_are_counted():
    tasks = benchmark.clean_runs("te_delayed", "guard", 1000)
    assert benchmark.gates(tasks, results_of(digest="b"))[-1] == "0 of 3"


def test_runs_of_a_task_have_names_of_their_own():
    made = [
        *benchmark.clean_runs("mxfp8", "guard", 300),
        *benchmark.clean_runs("mxfp8", "off", 300),
    ]
    made += benchmark.faulty_runs("lr-jump", "skip", 300)
    made += [task.base for task in benchmark.faulty_runs("", "guard", 300)]
    assert len({task.name for task in made}) == len(made) == 12
    assert made[6].at == 181
