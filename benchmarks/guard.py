"""How soon the guard and other detectors see a fault, how often they cry wolf, what it saves.

    python benchmarks/guard.py [--quick] [-j N] [--work DIR]

Works on recordings: what runs with a fault, and clean ones, reported step by step. The runs are
made by guard_runs.py, and peers are in guard_detectors.py.
"""

import argparse
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import common
from guard_detectors import Detector, peers
from guard_runs import DRILLED, Result, Task, all_of, fault_step

from halfulp.guard import detect
from halfulp.train.drill import faults_of

SEEDS = 3  # at least
RECIPES = ("te_delayed", "te_current", "mxfp8", "nvfp4_all", "bf16_amp")
GUARD, SERIES = "halfulp, the whole guard, live", "halfulp, loss, norm and weights"
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
    weights: NotRequired[Mapping[str, float]]  # norm of each matrix


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

    def observe(
        self,
        step: int,
        loss: float,
        norm: float,
        units: Mapping[str, float],
        weights: Mapping[str, float] | None = None,
    ) -> bool:
        jump = self.rules.jump(step, weights or {})
        if jump is not None or self.rules.judge(step, loss, norm) is not None:
            return True
        self.rules.accept(loss, norm, units, weights)
        return False

    def alarms(self, steps: Iterable[Step]) -> list[int]:
        """The steps at which it fires when it sees the norms of the weights too."""
        return [
            s["step"]
            for s in steps
            if self.observe(s["step"], s["loss"], s["grad_norm"], s["units"], s.get("weights"))
        ]


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
    losses: Mapping[str, Mapping[str, Sequence[float | None]]], unharmed: Sequence[float]
) -> str:
    """Markdown: final loss above that of the run without the fault, by fault and strategy.

    `losses[fault][strategy]` and `unharmed` hold one final loss in nats for each seed; a strategy
    that was not tried is –. The mean over seeds, with the least and the largest. A run that was
    stopped has a final loss of None.
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


def _gap(losses: Sequence[float | None], unharmed: Sequence[float]) -> str:
    pairs = list(zip(losses, unharmed, strict=True))
    gaps = [loss - other for loss, other in pairs if loss is not None]
    if stopped := len(pairs) - len(gaps):
        return f"stopped in {stopped} of {len(pairs)}"
    if lost := sum(not math.isfinite(gap) for gap in gaps):
        return f"not finite in {lost} of {len(gaps)}"
    return f"{statistics.fmean(gaps):+.3f} ({min(gaps):+.3f}…{max(gaps):+.3f})"


def clean_runs(recipe: str, answer: str, steps: int) -> list[Task]:
    """A run without a fault for each seed."""
    return [Task(recipe, seed, steps, answer) for seed in range(SEEDS)]


def faulty_runs(fault: str, answer: str, steps: int) -> list[Task]:
    """A run with the fault for each seed."""
    at = fault_step(steps)
    return [Task(DRILLED, seed, steps, answer, fault, at) for seed in range(SEEDS)]


def recordings(unanswered: Iterable[Task], results: Mapping[str, Result]) -> list[Recording]:
    """Of runs that nobody answers, with the alarms of the guard in those that it has answered."""
    made = []
    for task in unanswered:
        steps = results[task.name]["steps"]
        guarded = alarms_of(results[replace(task, answer="guard").name])
        live = {GUARD: [one["step"] for one in guarded], SERIES: OwnRules().alarms(steps)}
        made.append(Recording(steps=steps, fault_step=task.at or None, live=live))
    return made


def alarms_of(result: Result) -> list[dict]:
    """The incidents of a guarded run but for tries to lower a precision again."""
    return [one for one in result["incidents"] if one["trigger"] != "lock"]


def gates(guarded: Iterable[Task], results: Mapping[str, Result]) -> list[str]:
    """A row about the clean runs of one recipe: what the guard did, and whether bits are the same.

    Goals: at most one skip in 1000 steps, no rollback.
    """
    runs = [(results[t.name], results[replace(t, answer="off").name]) for t in guarded]
    steps = sum(t.steps for t in guarded)
    acts = [one["action"] for run, _ in runs for one in alarms_of(run)]
    skips, backs, raises = (acts.count(act) for act in ("skip", "roll back", "raise"))
    low, high = (1000 * p for p in exact_interval(skips, steps))
    quiet = [run["digest"] == off["digest"] for run, off in runs if not run["incidents"]]
    verdict = "met" if 1000 * skips <= steps and not backs else "missed"
    return [
        f"{1000 * skips / steps:.1f} ({low:.1f}–{high:.1f})",
        *map(str, (backs, raises, len(acts) - skips - backs - raises)),
        verdict,
        f"{sum(quiet)} of {len(quiet)}" if quiet else "none was quiet",
    ]


def evidence(tasks: Iterable[Task], results: Mapping[str, Result]) -> str:
    """A line for each alarm of the guard in the clean runs `tasks`."""
    lines = [_incident(task, one) for task in tasks for one in alarms_of(results[task.name])]
    return "\n".join(lines) or "The guard raised no alarm in any clean run."


def main() -> None:
    cli = argparse.ArgumentParser(description="The guard and its peers on clean runs and faults.")
    cli.add_argument("--quick", action="store_true", help="two recipes, and runs of 300 steps")
    cli.add_argument("-j", type=int, default=2, help="runs at a time, one thread each")
    cli.add_argument("--work", type=Path, help="finished runs are kept here, and not made again")
    args = cli.parse_args()
    work = args.work or Path(tempfile.mkdtemp(prefix="halfulp-guard-"))
    print(f"to go on after a crash: --work {work}", file=sys.stderr)
    recipes = (RECIPES[0], RECIPES[-1]) if args.quick else RECIPES
    clean, drilled = (300, 300) if args.quick else (1000, 420)
    faults = list(faults_of(Task(DRILLED, 0, drilled, "guard").config(work)))
    tasks = [t for r in recipes for a in ("guard", "off") for t in clean_runs(r, a, clean)]
    tasks += [t for r in (RECIPES[0], RECIPES[-1]) for t in clean_runs(r, "nothing", clean)]
    tasks += [t for f in faults for a in STRATEGIES for t in faulty_runs(f, a, drilled)]
    results = all_of(tasks, work, args.j)
    print(f"## Guard\n\n{common.machine()}. {_ABOUT.format(drilled=drilled, clean=clean)}")
    _show_detection(faults, clean, drilled, results)
    _show_gates([clean_runs(r, "guard", clean) for r in recipes], results)
    _show_losses(faults, drilled, results)


def _show_detection(
    faults: Iterable[str], clean: int, drilled: int, results: Mapping[str, Result]
) -> None:
    def quiet(recipe: str) -> list[Recording]:
        return recordings(clean_runs(recipe, "nothing", clean), results)

    hit = {f: recordings(faulty_runs(f, "nothing", drilled), results) for f in faults}
    text = table(hit, quiet(DRILLED), everyone)
    common.section(f"Detection, {DRILLED}", f"{legend()}\n\n{text}")
    other = RECIPES[-1]
    common.section(f"False alarms, {other}", table({}, quiet(other), everyone))


def _show_gates(guarded: Sequence[Sequence[Task]], results: Mapping[str, Result]) -> None:
    head = ["clean runs", "skips in 1000 steps (95 %)", "rollbacks", "raises", "other"]
    head += ["≤ 1 skip in 1000, no rollback", "quiet runs with the bits of guard.on = false"]
    rows = [[tasks[0].recipe, *gates(tasks, results)] for tasks in guarded]
    lines = evidence([t for tasks in guarded for t in tasks], results)
    common.section("The whole guard on clean runs", f"{common.table(head, rows)}\n\n{lines}")


def _show_losses(faults: Iterable[str], drilled: int, results: Mapping[str, Result]) -> None:
    bases = [task.base for task in faulty_runs("", "guard", drilled)]
    losses = {
        fault: {a: [results[t.name]["loss"] for t in faulty_runs(fault, a, drilled)]
                for a in STRATEGIES}
        for fault in faults
    }  # fmt: skip
    text = recovered(losses, [results[task.name]["loss"] for task in bases])
    found = sum(len(results[task.name]["incidents"]) for task in bases)
    note = f"Incidents in the runs without a fault: {found}."
    common.section("Recovered loss", f"{_LOSSES}\n\n{text}\n\n{note}")


_ABOUT = (
    "The runs are those of `halfulp guard drill`: llama-tiny on the bytes of this Python's own "
    f"library, 512 tokens a step, {SEEDS} seeds. Faults happen at 60 % of {{drilled}} steps in "
    f"{DRILLED}; clean runs have {{clean}} steps. Everything of the guard is at its defaults, "
    "counters every 50 steps."
)
_LOSSES = (
    "`skip`: updates that OLMo's rule calls outliers are withheld, and their batches gone. A loss "
    "that is not finite without a guard ends a run of halfulp; other loops go on without a number."
)


def _incident(task: Task, one: Mapping) -> str:
    signals = ", ".join(f"{name} {value:.3g}" for name, value in one["signals"].items())
    told = f"{one['trigger']} ({signals}): {one['verdict']}, {'; '.join(one['done'])}"
    return f"* {task.recipe}, seed {task.seed}, step {one['step']}: {told}"


if __name__ == "__main__":
    main()
