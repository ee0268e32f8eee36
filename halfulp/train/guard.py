"""The guard of a training session: how it looks again, goes back and changes the precision."""

import math
import os
import shlex
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from halfulp.blocks import block_map
from halfulp.guard.attribute import HARDWARE
from halfulp.guard.budget import Budget
from halfulp.guard.detect import Trigger
from halfulp.guard.host import ALL, Pass
from halfulp.guard.keeper import Incident, Keeper
from halfulp.guard.ladder import FALLBACK, Ladder
from halfulp.guard.ring import Ring, Snapshot, check_memory
from halfulp.guard.rules import YOUNG, Finding, Numeric, Reading, readings_of
from halfulp.guard.units import Units
from halfulp.policy import Policy
from halfulp.site import histories
from halfulp.train import nonfinite
from halfulp.train.checkpoint import path_of, steps_in
from halfulp.train.counters import shares
from halfulp.train.looks import Looks
from halfulp.train.parallel import local
from halfulp.train.schedule import warmup_steps
from halfulp.train.session import Session
from halfulp.train.state import check_replicas, model_tensors, optimizer_tensors
from halfulp.train.step import (
    agree,
    drop_gradients,
    forward_backward,
    forward_only,
    place_of_loss,
)

SHADOW = 250  # steps between two comparisons of all gradients with the reference ones
_KNOWN, _REMEMBERED = 8, 32  # measurements of the logits' sharpness
_LEAST_SPREAD = 0.05
STORAGE = ("lost_updates", "v_underflow")  # rules on how weights and moments are stored


class SessionHost:
    """A session as halfulp.guard.host.Host describes it."""

    def __init__(self, session: Session, units: Units) -> None:
        self.session, self.units = session, units
        cpu = session.world.device.type == "cpu"
        self.deterministic = cpu or torch.are_deterministic_algorithms_enabled()
        self.kept: list[Tensor] = []

    def replay(
        self,
        off: Collection[str] = (),
        *,
        fresh: int = 0,
        backward: bool = True,
        keep: bool = False,
        compare: bool = False,
    ) -> Pass:
        s, blocks = self.session, self._blocks(off)
        with self._untouched(), ExitStack() as stack:
            if tuple(off) == ALL:
                stack.enter_context(s.precision.handle.off())
            elif off:
                stack.enter_context(s.precision.handle.off_in(blocks))
            if off and s.config.train.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            if not backward:
                losses = s.world.sum(forward_only(s, ahead=fresh))
                return Pass(losses.mean().item(), float("nan"))
            losses = forward_backward(s, ahead=fresh, plain=blocks)
            found = agree(s, losses, interrupted=False).seen
            return self._compared(found) if compare else self._kept(found, keep)

    def differing_unit(self) -> str:
        """The first unit whose output differs between two equal forward passes; "" for none."""
        s = self.session
        with self._untouched():
            runs = [self._outputs() for _ in range(2)]
        own = [n for n, value in runs[0].items() if not torch.equal(value, runs[1][n])]
        found = [name for part in s.world.gather(own[:1]) for name in part]
        blocks = (s.blocks[n] for n in s.blocks if found and n.startswith(f"{found[0]}."))
        return next((self.units.of[block] for block in blocks), "")

    def broken_unit(self) -> str:
        """The unit where the step first left the finite numbers; "" if none can be named."""
        s = self.session
        with self._untouched():
            losses = s.world.sum(forward_backward(s))
            if torch.isfinite(losses).all():
                place = nonfinite.in_gradients(s.model, s.blocks, s.world)
            else:
                place = place_of_loss(s)
        return self.units.of.get(place.block, "")

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the CPU of this process's part of everything that a step changes."""
        s = self.session
        tensors = {f"model/{name}": t for name, t in model_tensors(s)}
        tensors |= {f"optimizer/{name}": t for name, t in optimizer_tensors(s)}
        tensors |= {f"quantizers/{n}": t for n, t in s.precision.handle.state_dict().items()}
        copies = {name: local(t).detach().to("cpu", copy=True) for name, t in tensors.items()}
        facts = {
            "position": s.cursor.position,
            "tokens": s.tokens,
            "loss_scale": s.precision.scaler.state(),
            "blockwise": s.blockwise.state() if s.blockwise else None,
            "evaluation": dict(s.evaluation),
            "first_loss_nats": s.first_loss_nats,
        }
        return copies, facts

    def restore(self, snapshot: Snapshot) -> None:
        """Put the session back; batches skipped since stay skipped, raised blocks raised."""
        s, facts = self.session, snapshot.facts
        drop_gradients(s)
        with torch.no_grad():
            for name, tensor in model_tensors(s):
                local(tensor).copy_(snapshot.tensors[f"model/{name}"])
            self._restore_optimizer(snapshot.tensors)
        self._restore_histories(snapshot.tensors)
        s.precision.scaler.load(facts["loss_scale"])
        if s.blockwise is not None:
            s.blockwise.load(facts["blockwise"])
        s.step, s.tokens = snapshot.step, facts["tokens"]
        s.evaluation, s.first_loss_nats = dict(facts["evaluation"]), facts["first_loss_nats"]
        s.cursor.position = facts["position"]
        s.cursor.settle()

    def apply(self, policy: Policy) -> None:
        self.session.precision.put(policy)

    def skip(self, first: int, last: int) -> int:
        cursor, now = self.session.cursor, self.session.step + 1
        skipped = cursor.skip(cursor.position - (now - first), cursor.ahead(max(0, last - now)))
        cursor.settle()
        return skipped

    def _blocks(self, off: Collection[str]) -> set[str]:
        """The blocks of the units `off`."""
        units = self.units
        names = units.names if tuple(off) == ALL else off
        return {block for name in names for block in units.blocks[name]}

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Gradients, scale histories, counters and buffers are afterwards as before."""
        s = self.session
        handle, parameters = s.precision.handle, list(s.model.parameters())
        gradients = [p.grad for p in parameters]
        seen = {name: h.seen for name, (h, _) in histories(handle.sites).items()}
        buffers = {name: b.clone() for name, b in s.model.named_buffers()}
        counting, handle.clock.counting = handle.clock.counting, False
        for p in parameters:
            p.grad = None
        try:
            yield
        finally:
            for p, gradient in zip(parameters, gradients, strict=True):
                p.grad = gradient
            for name, (history, _) in histories(handle.sites).items():
                history.seen = seen.get(name)
            for name, buffer in s.model.named_buffers():
                buffer.copy_(buffers[name])
            handle.clock.counting = counting

    def _named_gradients(self) -> list[tuple[str, Tensor]]:
        named = self.session.model.named_parameters()
        return [(n, local(p.grad)) for n, p in named if p.grad is not None]

    def _kept(self, found: Pass, keep: bool) -> Pass:
        if keep:
            self.kept = [gradient.clone() for _, gradient in self._named_gradients()]
        return found

    def _compared(self, found: Pass) -> Pass:
        """With what separates the gradient from the kept one; unit by unit, over all processes."""
        s, rows = self.session, []
        for (name, new), old in zip(self._named_gradients(), self.kept, strict=True):
            new64, old64 = new.double(), old.double()
            three = (new64 - old64).square().sum(), (new64 * old64).sum(), old64.square().sum()
            rows.append((self.units.parameters[name], torch.stack(three)))
        names = tuple(dict.fromkeys(unit for unit, _ in rows))
        sums = torch.zeros(len(names), 3, dtype=torch.float64, device=s.world.device)
        for unit, three in rows:
            sums[names.index(unit)] += three
        if s.world.mode == "fsdp2":
            sums = s.world.sum(sums)
        differences, cosines = {}, {}
        for unit, (square, dot, old) in zip(names, sums.tolist(), strict=True):
            norm = found.units.get(unit, 0.0) * old**0.5 if old >= 0 else float("nan")
            differences[unit], cosines[unit] = square**0.5, dot / norm if norm else 0.0
        return Pass(found.loss, found.norm, found.units, differences, cosines)

    def _outputs(self) -> dict[str, Tensor]:
        """The output of every leaf module in a forward pass of the step's first micro-batch."""
        s, outputs = self.session, {}

        def keeper(name: str):
            def hook(module: object, inputs: object, output: object) -> None:
                if isinstance(output, Tensor) and name not in outputs:
                    outputs[name] = output.detach().clone()

            return hook

        leaves = [(n, m) for n, m in s.model.named_modules() if n and not list(m.children())]
        hooks = [m.register_forward_hook(keeper(n)) for n, m in leaves]
        try:
            with torch.compiler.set_stance("force_eager"):
                forward_only(s)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    def _restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        s = self.session
        for group in s.precision.optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                state = s.precision.optimizer.state
                if f"optimizer/{name}/step" not in tensors:
                    state.pop(parameter, None)  # before its first update
                    continue
                for key, value in state[parameter].items():
                    local(value).copy_(tensors[f"optimizer/{name}/{key}"])

    def _restore_histories(self, tensors: Mapping[str, Tensor]) -> None:
        """Those that the policy in force still has; a raised block has none, or begins anew."""
        for name, (history, q) in histories(self.session.precision.handle.sites).items():
            if (saved := tensors.get(f"quantizers/{name}")) is not None:
                history.restore(q, saved)


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
        self._index: tuple[list[str], Tensor] | None = None

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
        acts = [finding for finding in findings if finding.level == "act"]
        for storage in (False, True):
            self._raise([f for f in acts if (f.rule in STORAGE) == storage], storage=storage)
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

    def _raise(self, findings: list[Finding], *, storage: bool) -> None:
        """Raise the units of some findings, the same on every process."""
        if not findings:
            return
        of, suspects = self.host.units.of, dict[str, float]()
        for f in findings:
            over = f.value / f.threshold if f.threshold else math.inf
            suspects[of[f.block]] = max(over, suspects.get(of[f.block], 0.0))
        incident = self.keeper.check(
            self.session.step,
            suspects,
            storage=storage,
            backward=any(f.backward for f in findings),
            signals={f"{f.rule} of {f.place}": f.value for f in findings},
        )
        for unit in incident.raised if incident else ():
            for block in self.host.units.blocks.get(unit, self.host.units.of):
                self.numeric.forget(block)

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
        names, units = [name for name, _ in named], self.host.units
        if self._index is None or self._index[0] != names:
            places = [units.names.index(units.parameters[name]) for name in names]
            self._index = names, torch.tensor(places, device=squares.device)
        sums = torch.zeros(len(units.names), dtype=torch.float64, device=squares.device)
        return units.names, sums.index_add_(0, self._index[1], squares)

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


def stopped(s: Session, incident: Incident) -> str:
    """Why the run was stopped, and the command that goes on."""
    trigger, verdict = incident.trigger, incident.verdict
    units = f" in {', '.join(verdict.units[:4])}" if verdict.units else ""
    return (
        f"the guard stopped the run at step {trigger.step}: {incident.done[-1]}. It saw {trigger}; "
        f"its verdict is {verdict.kind}{units}. Nothing of that step was updated or saved. What "
        f"happened: halfulp guard explain {shlex.quote(str(s.run.path))}. {_cure(s, incident)}"
    )


def _cure(s: Session, incident: Incident) -> str:
    resume = shlex.join(["halfulp", "train", "--resume", str(s.run.path)])
    over = incident.exceeded
    if over is not None and over.enough is not None:
        return f"To go on with a larger budget: {resume} --set guard.{over.budget}={over.enough:g}"
    if incident.verdict.kind == HARDWARE:
        return f"To go on from the last checkpoint, on another machine: {resume}"
    folder = s.run.path / "checkpoints"
    earlier = [step for step in steps_in(folder) if step != s.saved]
    again = f"To go on from an earlier checkpoint: {resume} --from-step {max(earlier, default=0)}"
    return (
        f"It would meet the same again. To start anew from the last good weights, with a lower "
        f"learning rate and in {FALLBACK}: {_anew(s)}. {again}"
    )


def _anew(s: Session) -> str:
    """The command of a run from the last checkpoint's weights that is less likely to fail."""
    path, config = s.run.path, s.config
    words = ["halfulp", "train", str(path / "config.toml"), "--recipe", FALLBACK]
    words += ["--lr", f"{config.train.lr / 2:g}", "--out", f"{path}-anew"]
    if s.saved:
        words += ["--model", str(path_of(path / "checkpoints", s.saved))]
        words += [w for key in ("layers", "hidden") for w in ("--set", f"model.{key}=0")]
    if config.policy.schedule:
        words += ["--set", "policy.schedule=[]"]
    return shlex.join(words)


def open_guard(session: Session) -> SessionGuard | None:
    """The guard that the configuration asks for.

    PolicyError for a ladder that is none, ConfigError for snapshots that do not fit into memory.
    """
    if not session.config.guard.on:
        return None
    guard = SessionGuard(session)
    guard.check_memory()
    return guard
