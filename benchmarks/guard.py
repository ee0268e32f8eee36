"""How soon the guard and other detectors see a fault, and how often they cry wolf.

Works on recordings: what runs with a fault, and clean ones, reported step by step. Peers are in
guard_detectors.py.
"""

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypedDict

import common
from guard_detectors import Detector, peers

from halfulp.guard import detect

SEEDS = 3  # at least
SETTLED = 150  # steps before it count for nothing: detectors fill their windows, losses fall
WITHIN = 50  # steps; a later alarm is not about the fault
CHANCE = 0.05  # share of clean stretches with an alarm, above which one proves little
STRATEGIES = ("nothing", "skip", "guard")


class Step(TypedDict):
    """What one step reported; the gradient norm is that before clipping."""

    step: int
    loss: float
    grad_norm: float
    units: Mapping[str, float]  # gradient norm of each unit


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One run; `fault_step` is the first that the fault touches, None in a clean run.

    `live` holds the steps of alarms that were raised while the run went on, by who raised them:
    for a guard that sees more than a recording holds. Every run names the same ones.
    """

    steps: Sequence[Step]
    fault_step: int | None = None
    live: Mapping[str, Collection[int]] = field(default_factory=dict)

    @property
    def judged(self) -> list[int]:
        """The steps that count, oldest first."""
        return [s["step"] for s in self.steps if s["step"] >= SETTLED]


Record = Callable[[str | None, int], Recording]  # of a fault (None: clean) and a seed
Fresh = Callable[[int], Sequence[Detector]]  # detectors that have seen nothing, for so many steps


@dataclass
class OwnRules:
    """The guard's rules on loss and gradient norm alone: no counters, no attribution, no answer.

    A step that is held does not enter the windows, since its update would not be made.
    """

    rules: detect.Detector = field(default_factory=detect.Detector)
    name: str = field(default="halfulp, loss and norm", init=False)

    def observe(self, step: int, loss: float, norm: float, units: Mapping[str, float]) -> bool:
        if self.rules.judge(step, loss, norm) is not None:
            return True
        self.rules.accept(loss, norm, units)
        return False


def everyone(steps: int) -> list[Detector]:
    """The guard's own rules and all peers, fresh, for a run of `steps` steps."""
    return [OwnRules(), *peers(steps)]


def measure(
    record: Record, faults: Iterable[str], seeds: int = SEEDS
) -> tuple[dict[str, list[Recording]], list[Recording]]:
    """Recordings of every fault, and of clean runs, with each of the seeds 0, 1, …"""
    faulty = {fault: [record(fault, seed) for seed in range(seeds)] for fault in faults}
    return faulty, [record(None, seed) for seed in range(seeds)]


def table(
    faults: Mapping[str, Sequence[Recording]], clean: Sequence[Recording], detectors: Fresh
) -> str:
    """Markdown: a row for each detector, its false alarms, and its delay for each fault and seed.

    ValueError if there are fewer than SEEDS runs of something, or if a run is too short to tell.
    """
    _check({"no fault": clean, **faults})
    quiet = [alarms(run, detectors) for run in clean]
    found = {fault: [alarms(run, detectors) for run in runs] for fault, runs in faults.items()}
    rows = []
    for name in quiet[0]:
        fired = [by_name[name] for by_name in quiet]
        row = [name, false_alarms(fired, clean)]
        for fault, runs in faults.items():
            heard = [by_name[name] for by_name in found[fault]]
            row.append(_delays(map(delay, heard, runs), fired, clean))
        rows.append(row)
    steps = sum(len(run.judged) for run in clean)
    head = ["detector", f"false alarms in 1000 of {steps} clean steps (95 %)", *faults]
    return common.table(head, rows)


def legend() -> str:
    """How to read `table`, for the text above it."""
    return (
        f"Steps from the fault to the first alarm, seed by seed; – is none within {WITHIN} steps. "
        f"A ? marks a delay that says little: more than {CHANCE:.0%} of all clean stretches of "
        f"that length hold an alarm. The first {SETTLED} steps of a run are not counted. The "
        "interval is exact for alarms that do not come in groups."
    )


def alarms(run: Recording, detectors: Fresh) -> dict[str, Collection[int]]:
    """The steps at which each detector fires, and those of the alarms raised live."""
    fired: dict[str, Collection[int]] = dict(run.live)
    for one in detectors(len(run.steps)):
        fired[one.name] = {
            s["step"]
            for s in run.steps
            if one.observe(s["step"], s["loss"], s["grad_norm"], s["units"])
        }
    return fired


def delay(fired: Collection[int], run: Recording) -> int | None:
    """Steps from the fault to the first alarm, 0 if at once; None if none within WITHIN steps."""
    assert run.fault_step is not None
    late = [step - run.fault_step for step in fired]
    return min((steps for steps in late if 0 <= steps <= WITHIN), default=None)


def false_alarms(fired: Sequence[Collection[int]], clean: Sequence[Recording]) -> str:
    """Alarms in 1000 clean steps with their 95 % interval, as text."""
    steps = sum(len(run.judged) for run in clean)
    count = sum(len({*alarm} & {*run.judged}) for alarm, run in zip(fired, clean, strict=True))
    low, high = (1000 * p for p in exact_interval(count, steps))
    return f"{1000 * count / steps:.1f} ({low:.1f}–{high:.1f})"


def chance(fired: Sequence[Collection[int]], clean: Sequence[Recording], length: int) -> float:
    """Share of all stretches of `length` consecutive clean steps in which there is an alarm."""
    held = [any(alarm) for pair in zip(fired, clean, strict=True) for alarm in _cut(*pair, length)]
    return sum(held) / len(held)


def exact_interval(count: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Bounds of a probability after `count` of `trials` independent ones (Clopper and Pearson)."""
    tail = (1 - level) / 2
    low = _probability(count - 1, trials, 1 - tail) if count else 0.0
    return low, _probability(count, trials, tail) if count < trials else 1.0


def recovered(
    losses: Mapping[str, Mapping[str, Sequence[float]]], unharmed: Sequence[float]
) -> str:
    """Markdown: final loss above that of the run without the fault, by fault and strategy.

    `losses[fault][strategy]` and `unharmed` hold one final loss in nats for each seed; a strategy
    that was not tried is –. The mean over seeds, with the least and the largest.
    """
    rows = []
    for fault, by_strategy in losses.items():
        if unknown := set(by_strategy) - set(STRATEGIES):
            raise ValueError(f"{fault}: strategy {unknown} is none of {', '.join(STRATEGIES)}")
        tried = [by_strategy.get(strategy) for strategy in STRATEGIES]
        rows.append([fault, *("–" if one is None else _gap(one, unharmed) for one in tried)])
    return common.table(["final loss − that without the fault, nats", *STRATEGIES], rows)


def _check(runs: Mapping[str, Sequence[Recording]]) -> None:
    live = {tuple(run.live) for some in runs.values() for run in some}
    if len(live) > 1:
        raise ValueError(f"runs differ in whose live alarms they hold: {live}; record all anew")
    for name, some in runs.items():
        if len(some) < SEEDS:
            raise ValueError(f"{name}: {len(some)} runs; record at least {SEEDS} seeds of it")
        for run in some:
            first, last = run.fault_step or SETTLED, run.steps[-1]["step"]
            if first < SETTLED or last < first + WITHIN:
                raise ValueError(
                    f"{name}: judged from step {first}, ends at {last}; a run is judged from step "
                    f"{SETTLED} on at the earliest, and for {WITHIN} more steps. Record it longer."
                )


def _delays(
    delays: Iterable[int | None], fired: Sequence[Collection[int]], clean: Sequence[Recording]
) -> str:
    def one(steps: int | None) -> str:
        if steps is None:
            return "–"
        return f"{steps}?" if chance(fired, clean, steps + 1) > CHANCE else f"{steps}"

    return ", ".join(map(one, delays))


def _cut(alarm: Collection[int], run: Recording, length: int) -> Iterator[list[bool]]:
    heard = [step in alarm for step in run.judged]
    return (heard[i : i + length] for i in range(len(heard) - length + 1))


def _probability(count: int, trials: int, wanted: float) -> float:
    """The p for which `count` or fewer of `trials` succeed with probability `wanted`."""
    low, high = 0.0, 1.0
    while (p := (low + high) / 2) not in (low, high):
        low, high = (p, high) if _at_most(count, trials, p) > wanted else (low, p)
    return p


def _at_most(count: int, trials: int, p: float) -> float:
    yes, no, whole = math.log(p), math.log1p(-p), math.lgamma(trials + 1)
    logs = (
        whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1) + k * yes + (trials - k) * no
        for k in range(count + 1)
    )
    return math.fsum(map(math.exp, logs))


def _gap(losses: Sequence[float], unharmed: Sequence[float]) -> str:
    gaps = [loss - other for loss, other in zip(losses, unharmed, strict=True)]
    if lost := sum(not math.isfinite(gap) for gap in gaps):
        return f"not finite in {lost} of {len(gaps)}"
    return f"{statistics.fmean(gaps):+.3f} ({min(gaps):+.3f}…{max(gaps):+.3f})"
