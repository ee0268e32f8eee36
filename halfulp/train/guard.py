"""The guard of a training session: what the training loop asks it, and what it keeps."""

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from halfulp.blocks import block_map
from halfulp.guard.budget import Budget
from halfulp.guard.detect import Trigger
from halfulp.guard.host import ALL, Pass
from halfulp.guard.incident import Incident
from halfulp.guard.keeper import Keeper
from halfulp.guard.ladder import Ladder
from halfulp.guard.numeric import YOUNG, Numeric
from halfulp.guard.readings import Reading, readings_of
from halfulp.guard.ring import Ring, Snapshot, check_memory
from halfulp.guard.units import UnitSums
from halfulp.processes import local
from halfulp.train.counters import shares
from halfulp.train.guard_host import SessionHost
from halfulp.train.looks import Looks
from halfulp.train.schedule import warmup_steps
from halfulp.train.session import Session
from halfulp.train.state import check_replicas

SHADOW = 250  # steps between two comparisons of all gradients with the reference ones
_KNOWN, _REMEMBERED = 8, 32  # measurements of the logits' sharpness
_LEAST_SPREAD = 0.05


class SessionGuard:
    """Keeper and host of a session, and what the training loop asks of them."""

    def __init__(self, session: Session) -> None:
        self.session, section = session, session.config.guard
        policy = session.precision.policies[session.precision.stage]
        blocks = block_map(session.model, session.config.model.hints)
        self.ladder = Ladder(policy, blocks, section.ladder)
        self.host = SessionHost(session, self.ladder.units)
        budget = Budget(
            rollbacks=section.rollbacks,
            wasted=section.wasted,
            raised=section.raised,
            attribution=section.attribution,
        )
        self.keeper = Keeper(
            self.host,
            self.ladder,
            session.config.train.steps,
            budget,
            self._report,
            Ring(section.snapshot_every, section.snapshots),
        )
        self.numeric, self.looks = Numeric(), Looks(session, blocks)
        self._logits: list[float] = []  # logarithms of their sharpness, oldest first
        self._pending: list[Reading] = []
        self._expected: tuple[int, Pass | None] = 0, None  # step, and what it must give
        self._unit_sums = UnitSums(self.host.units)

    def begin(self) -> None:
        """Before the first step: take the first snapshot."""
        self.keeper.begin(self.session.step)

    def check_memory(self) -> None:
        """ConfigError, on every process, for a ring that does not fit into this machine."""
        s, ring = self.session, self.keeper.ring
        own = 3 * sum(local(p).numel() * 4 for p in s.model.parameters())  # with two moments
        here = int(os.environ.get("LOCAL_WORLD_SIZE", s.world.size))
        size = max(s.world.gather(own))
        s.world.from_main(lambda: check_memory(size, ring.most, "guard.snapshots", processes=here))

    def judge(self, step: int, seen: Pass) -> Trigger | None:
        """Whether the (1-based) step is held."""
        trigger, other = self.keeper.judge(step, seen), self._irreproducible(step, seen)
        # A weight that has jumped explains other bits.
        return trigger if trigger is not None and trigger.kind == "weight" else other or trigger

    def _irreproducible(self, step: int, seen: Pass) -> Trigger | None:
        """Whether a step gave other bits than its rehearsal, where kernels are deterministic."""
        (expected, before), self._expected = self._expected, (0, None)
        if before is None or expected != step or not self.host.deterministic:
            return None
        finite = math.isfinite(seen.loss) and math.isfinite(seen.norm)
        if not finite or (before.loss, before.norm) == (seen.loss, seen.norm):
            return None
        evidence = {"loss": seen.loss, "norm": seen.norm}
        evidence |= {"loss before": before.loss, "norm before": before.norm}
        return Trigger("irreproducible", step, step, 1, evidence)

    def respond(self, trigger: Trigger, seen: Pass) -> Incident:
        """Attribute and act; the session is afterwards where it is to go on."""
        return self.keeper.respond(trigger, seen)

    def accept(self, seen: Pass) -> None:
        """The update of the session's step has been made."""
        s = self.session
        self.keeper.accept(s.step, seen)
        if s.step in self._phases():
            self.keeper.detector.begin_phase()

    def check(self, gemms: list[dict[str, Any]], optimizer: list[dict[str, Any]]) -> None:
        """After every step: numeric rules on what was counted in it, then descents."""
        s = self.session
        if s.step < YOUNG:
            return
        readings = readings_of(s.precision.handle.stale())
        readings += readings_of(map(shares, gemms), map(shares, optimizer))
        readings += self.looks.take() + self._shadow() + self._pending
        self._pending = []
        findings = self.numeric.observe(s.step, readings)
        last = s.step == s.config.train.steps  # no update is left that could be more precise
        for finding in findings:
            if last or finding.level == "warn":
                s.emit("signal", step=s.step, **vars(finding))
        if last:
            return
        self.keeper.heed(s.step, findings, self.numeric)
        self.keeper.descend(s.step)

    def see_logits(self, sharpness: float) -> None:
        """Take in a measurement of the centered sharpness of the logits."""
        history = self._logits
        if len(history) >= _KNOWN and sharpness > 0:
            middle = statistics.median(history)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in history)
            z = (math.log(sharpness) - middle) / max(spread, _LEAST_SPREAD)
            self._pending = [Reading("logits_sharpness", "head", "logits", z)]
        if sharpness > 0:
            self._logits = [*history, math.log(sharpness)][-_REMEMBERED:]

    def _shadow(self) -> list[Reading]:
        """Every SHADOW steps: how far each unit's gradient is from that of the reference."""
        s, errors = self.session, {}
        if s.step % SHADOW or not s.precision.handle.sites:
            return []
        # The step that comes next computes the same: its result is known.
        self._expected = s.step + 1, self.host.replay(keep=True)
        reference = self.host.replay(off=ALL, compare=True)
        self.keeper.spent.shadows += 2.0
        for unit, difference in reference.differences.items():
            if norm := reference.units[unit]:
                errors[unit] = difference / norm
        s.emit("gradient_error", step=s.step, units=errors)
        units = self.host.units
        return [
            Reading("gradient_noise", units.blocks[unit][0], f"{unit} gradient", error, True)
            for unit, error in errors.items()
        ]

    def facts(self) -> dict[str, Any]:
        """The fields of summary.json: what the guard has done, and the precision map."""
        keeper = self.keeper
        return {"guard": {**keeper.spent.state(), "map": self.ladder.map()}}

    def keep(self) -> None:
        """Take a snapshot if one is due; the last thing of a step before its checkpoint."""
        if self.keeper.ring.due(self.session.step):
            check_replicas(self.session)
            self.keeper.snapshot(self.session.step)

    def enter_stage(self) -> None:
        """A stage of the schedule begins: raised blocks stay raised where that is still higher."""
        s = self.session
        self._expected = 0, None  # the rehearsal was in the arithmetic of the stage before
        self.ladder.rebase(s.precision.policies[s.precision.stage])
        if self.ladder.is_raised:
            s.precision.put(self.ladder.policy())

    def factors(self, step: int) -> dict[str, float]:
        """Factor on the learning rate of every slowed block in the 0-based `step`."""
        slowed = self.keeper.factors(step)
        return {block: f for unit, f in slowed.items() for block in self.host.units.blocks[unit]}

    def sums(
        self, named: Iterable[tuple[str, Tensor]], squares: Tensor
    ) -> tuple[tuple[str, ...], Tensor]:
        """The units, and the sum of `squares` (one per gradient) of each."""
        names = [name for name, _ in named]
        return self.host.units.names, self._unit_sums.add(names, squares)

    def state(self) -> dict[str, Any]:
        """Everything but `tensors`, as plain values."""
        ring = [
            {"step": r.step, "facts": dict(r.facts), "good": r.good}
            for r in self.keeper.ring.snapshots
            if self.session.config.guard.save_snapshots
        ]
        numeric = self.numeric.state_dict()
        pending = [vars(reading) for reading in self._pending]
        state = {"keeper": self.keeper.state(), "numeric": numeric, "ring": ring}
        looks, _ = self.looks.state()
        return state | {"logits": list(self._logits), "pending": pending, "looks": looks}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """This process's parts of the snapshots by "step/name", and codes by "looks/GEMM"."""
        for name, codes in self.looks.state()[1].items():
            yield f"looks/{name}", codes
        saved = self.session.config.guard.save_snapshots
        for snapshot in self.keeper.ring.snapshots if saved else ():
            for name, part in snapshot.tensors.items():
                yield f"{snapshot.step}/{name}", part

    def load(self, state: Mapping[str, Any]) -> None:
        """Put back what `state` holds and the policy in force; `load_tensors` follows."""
        self.keeper.load(state["keeper"])
        self.numeric.load_state_dict(state["numeric"])
        self._logits = list(state["logits"])
        self._pending = [Reading(**reading) for reading in state["pending"]]
        if self.ladder.is_raised:
            self.session.precision.put(self.ladder.policy())

    def load_tensors(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """The snapshots of `state`, and codes, from what `tensors` gave."""
        self.looks.load(state["looks"], _under("looks", tensors))
        self.keeper.ring.snapshots = [
            Snapshot(row["step"], _under(str(row["step"]), tensors), row["facts"], row["good"])
            for row in state["ring"]
        ]

    def _phases(self) -> tuple[int, ...]:
        """Steps after which the learning rate does something else."""
        train = self.session.config.train
        ends = [warmup_steps(train)]
        if train.schedule == "wsd":
            ends.append(train.steps - round(train.decay * train.steps))
        return tuple(ends)

    def _report(self, incident: Incident) -> None:
        self._expected = 0, None
        ladder = self.ladder
        self.session.emit("guard", **incident.fields(), map=ladder.map(), above=ladder.above())


def _under(folder: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors called "folder/name", by name."""
    paths = ((*path.partition("/"), tensor) for path, tensor in tensors.items())
    return {name: tensor for first, _, name, tensor in paths if first == folder}


def open_guard(session: Session) -> SessionGuard | None:
    """The guard that the configuration asks for.

    PolicyError for a ladder that is none, ConfigError for snapshots that do not fit into memory.
    """
    if not session.config.guard.on:
        return None
    guard = SessionGuard(session)
    guard.check_memory()
    return guard
