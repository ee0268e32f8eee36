"""What the guard costs while nothing happens, in % of a training step.

    python benchmarks/guard_overhead.py [--quick] [--threads N]

The model and step of training.py: 2.9 M parameters, 1024 tokens. Each part is timed by itself, in
turns with the same without it, and spread over its interval; all at the defaults.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from common import (
    how,
    interleave,
    machine,
    parser,
    per_threads,
    section,
    table,
    use_threads,
    verdict,
)
from training import COUNT_EVERY, run_in

from halfulp.guard.numeric import Finding, Numeric
from halfulp.guard.readings import Reading
from halfulp.train.guard import SHADOW
from halfulp.train.model import next_token_loss
from halfulp.train.session import Session
from halfulp.train.step import agree, batch_of, drop_gradients, forward_backward, run_step

RECIPES = ("te_delayed", "te_current", "nvfp4_all")
GOAL = 2.0
_LOOKS = ("first look", "second look", "last look")  # at the codes of weights; the last at more
_QUIET = 30  # a step with no look, count, comparison or snapshot, when histories are full
SUM, COUNTERS = "the guard in total", "counters, which a run has without a guard too"


class Calm(Numeric):
    """Rules that are judged, and change nothing: later calls find the same precision."""

    def observe(self, step: int, readings: Iterable[Reading]) -> list[Finding]:
        super().observe(step, readings)
        return []


def parts(s: Session, threads: int, seconds: float) -> dict[str, float]:
    """% of a step that each part costs, averaged over the run."""
    calls = Calls(s)
    timed = interleave(calls.all(), threads=threads, seconds=seconds)
    least = {name: time.best for name, time in timed.items()}
    snapshots = s.config.guard.snapshot_every
    seconds_each = {
        "norms of units and weights, judging, stale scales, every step": (
            least["watched"] - least["bare"]
        ),
        f"looks inside the pass, 3 of {COUNT_EVERY} steps": (
            (sum(least[name] for name in _LOOKS) - 3 * least["forward"]) / COUNT_EVERY
        ),
        f"rules on counters, every {COUNT_EVERY} steps": (
            (least["checked"] - least["idle check"]) / COUNT_EVERY
        ),
        f"gradients compared with the reference, every {SHADOW} steps": (
            (least["shadow"] - least["idle check"]) / SHADOW
        ),
        f"snapshots, every {snapshots} steps": least["snapshot"] / snapshots,
        COUNTERS: (least["counted"] - least["step"]) / COUNT_EVERY,
    }
    return {name: 100 * cost / least["step"] for name, cost in seconds_each.items()} | {
        "ms": 1e3 * least["step"]
    }


class Calls:
    """What is timed, on a session with a guard; each call leaves the next one its place."""

    def __init__(self, session: Session) -> None:
        assert session.guard is not None
        self.s, self.guard = session, session.guard
        self.guard.numeric = Calm()
        self.rows: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
        for _ in range(3):  # moments and amax histories come into being
            self.step()
        self.counted()
        self.batch_BT = batch_of(session, 0)
        self.losses = forward_backward(session)
        self.gradients = [parameter.grad for parameter in session.model.parameters()]
        seen = agree(session, self.losses, interrupted=False).seen
        for _ in range(200):  # the windows of the detector are full
            self.guard.accept(seen)

    def all(self) -> Mapping[str, Callable[[], object]]:
        """By name."""
        calls = (self.bare, self.watched, self.idle_check, self.checked, self.shadow, self.snapshot)
        calls += (self.step, self.counted)
        looks = {name: partial(self.forward, 3 - i) for i, name in enumerate(_LOOKS)}
        others = {call.__name__.replace("_", " "): call for call in calls}
        return {"forward": self.forward, **looks, **others}

    def step(self) -> None:
        """A training step without a guard."""
        drop_gradients(self.s)
        with self._unguarded():
            run_step(self.s, interrupted=False)

    def counted(self) -> None:
        """The same with counters."""
        handle, optimizer = self.s.precision.handle, self.s.precision.optimizer
        handle.count(True)
        optimizer.count(True)
        self.step()
        self.rows = handle.counters(), optimizer.counters()
        handle.count(False)
        optimizer.count(False)

    def bare(self) -> None:
        """What follows the passes of a step without a guard."""
        self._put_gradients()
        with self._unguarded():
            agree(self.s, self.losses, interrupted=False)

    def watched(self) -> None:
        """What follows them with one."""
        self._put_gradients()
        self.s.step = _QUIET - 1
        seen = agree(self.s, self.losses, interrupted=False).seen
        assert self.guard.judge(_QUIET, seen) is None
        self.s.step = _QUIET
        self.guard.accept(seen)
        self.guard.check([], [])
        self.guard.keep()

    def idle_check(self) -> None:
        self.s.step = _QUIET
        self.guard.check([], [])

    def checked(self) -> None:
        self.s.step = COUNT_EVERY
        self.guard.check(*self.rows)

    def shadow(self) -> None:
        self.s.step = SHADOW
        self.guard.check([], [])

    def snapshot(self) -> None:
        self.guard.keeper.snapshot(self.s.step)

    @torch.no_grad()
    def forward(self, left: int = 0) -> None:
        """A forward pass; with the guard's looks where it is `left` steps before a count."""
        self.s.step = COUNT_EVERY - left
        with self.guard.looks.around(0) if left else nullcontext():
            next_token_loss(self.s.model, self.batch_BT)

    def _put_gradients(self) -> None:
        for parameter, gradient in zip(self.s.model.parameters(), self.gradients, strict=True):
            parameter.grad = gradient

    @contextmanager
    def _unguarded(self) -> Iterator[None]:
        self.s.guard = None
        try:
            yield
        finally:
            self.s.guard = self.guard


def measured(recipe: str, threads: int, seconds: float) -> dict[str, float]:
    """`parts` of a fresh run in this recipe."""
    with (
        tempfile.TemporaryDirectory() as folder,
        run_in(folder, {"recipe": recipe}, guard=True) as s,
    ):
        return parts(s, threads, seconds)


def main() -> None:
    args = parser("What the guard costs while nothing happens.").parse_args()
    if not args.threads:
        print(f"## Guard, while nothing happens\n\n{machine()}", flush=True)
        per_threads(__file__, args)
        return
    use_threads(args.threads)
    costs = {r: measured(r, args.threads, 1.0 if args.quick else 5.0) for r in RECIPES}
    names = [name for name in costs[RECIPES[0]] if name != "ms"]
    rows = [[name, *(f"{cost[name]:.2f}" for cost in costs.values())] for name in names]
    for label, left_out in ((SUM, ()), (f"{SUM}, without counters", (COUNTERS,))):
        sums = [sum(c[n] for n in names if n not in left_out) for c in costs.values()]
        rows.append([label, *(f"{x:.2f} ({verdict(x, GOAL)})" for x in sums)])
    rows.append(["step without it, ms", *(f"{cost['ms']:.1f}" for cost in costs.values())])
    section(f"% of a step, {how(args.threads)}", table(["what", *RECIPES], rows))


if __name__ == "__main__":
    main()
