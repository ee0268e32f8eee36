"""The guard around one's own training loop: `halfulp.Guard`."""

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.errors import ConfigError, RunError, StoppedError, require
from halfulp.guard.budget import HORIZON, Budget
from halfulp.guard.calls import Call
from halfulp.guard.detect import Trigger
from halfulp.guard.host import Pass
from halfulp.guard.incident import BACK, RETRY, STOP, Incident
from halfulp.guard.incident_log import Log, tell
from halfulp.guard.keeper import Keeper
from halfulp.guard.loop_setup import (
    check_arguments,
    check_loss,
    check_optimizer,
    digest_of,
    ladder_of,
    restorable,
    stopped,
)
from halfulp.guard.numeric import YOUNG, Numeric
from halfulp.guard.own_counts import OwnCounts
from halfulp.guard.own_loop import LoopHost, LossOf, unwrapped
from halfulp.guard.rehearsal import Rehearsal
from halfulp.guard.ring import EVERY, KEPT, Ring, check_memory
from halfulp.guard.slowed import Slowed
from halfulp.guard.withheld import abnormal, allow, sent, why_waiting, withhold
from halfulp.policy import Policy
from halfulp.processes import count as processes
from halfulp.processes import local

COUNT_EVERY = 25  # steps between two looks at the counters of the quantizers
MOST_SKIPS = 40  # steps in a row that a loss scaler may skip


@dataclass
class _Made:
    """A step whose update the loop has been allowed to make."""

    calls: list[Call]
    seen: Pass | None  # None: still on its way from the device
    values: Tensor | None = None
    event: torch.cuda.Event | None = None
    stepped: bool = False  # the optimizer has


class Guard:
    """Watches a training loop, and answers after each backward pass whether to update.

        guard = halfulp.Guard(model, optimizer, policy="te_delayed", also=[scheduler], steps=10_000)
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            if guard.step(loss):
                optimizer.step()
            optimizer.zero_grad()

    * `model` may be wrapped in DistributedDataParallel, fully_shard or torch.compile. `policy`
      quantizes it; a model that is quantized keeps its policy. Without quantizers there is no
      precision to raise, and incidents are answered by skipping and rolling back alone.
    * `also`: what else is put back in a rollback, by state_dict and load_state_dict: the scheduler,
      and a loader that can rewind. After a rollback that took a loader along, `rewound` is true
      until the next step: leave the loop over the loader and begin it anew. Without such a loader
      the data simply goes on.
    * `loss`: (output, args, kwargs) → scalar, for models whose output has no `loss`.
    * `steps`: planned, which `budget` has shares of. `log`: a file for one JSON line per incident,
      or a function that receives it as a dict; by default they go to the logger halfulp.guard.
    * `scaler`: the loop's GradScaler; call `scaler.unscale_(optimizer)` before `guard.step`. Steps
      that it will skip are no incidents.

    All forward passes in training mode since the last step are its micro-batches. The first step is
    done a second time (its gradients stay), to make sure that the guard can do a step again. Clip
    gradients after `guard.step`. A loop must not write into its batches.

    Raises PolicyError for a policy that does not cover the model; ConfigError for arguments that
    cannot be used, a ring that does not fit in memory, and a first step that cannot be repeated.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        policy: Policy | str | Path | None = None,
        budget: Budget | None = None,
        steps: int = HORIZON,
        also: Iterable[Any] = (),
        loss: LossOf | None = None,
        log: Log = None,
        scaler: Any = None,
        hints: Mapping[str, str] | None = None,
        snapshot_every: int = EVERY,
        snapshots: int = KEPT,
    ) -> None:
        budget = budget or Budget()
        check_arguments(budget, steps, snapshot_every, snapshots)
        bare = unwrapped(model)
        ladder, handle = ladder_of(bare, policy, hints)
        self.handle, self._ladder, self._log = handle, ladder, log
        self._host = LoopHost(model, handle, ladder, loss)
        self._host.scaler = scaler
        self._keeper = Keeper(
            self._host, ladder, steps, budget, self._report, Ring(snapshot_every, snapshots)
        )
        self._numeric = Numeric()
        self._made: _Made | None = None
        self._skipped_by_scaler = 0
        self._counts = OwnCounts(handle) if handle else None
        self._late = False  # answering for a step that is over
        self.incidents: list[Incident] = []
        self.notes: list[str] = []
        self._rehearsal = Rehearsal(self._host, self.notes)
        self.rewound = False
        self.optimizer: torch.optim.Optimizer | None = None
        if optimizer is not None:
            self.attach(optimizer, also)

    def attach(self, optimizer: torch.optim.Optimizer, also: Iterable[Any] = ()) -> None:
        """Take the optimizer, where it is made after the guard, and what else goes back with it."""
        if self.optimizer is not None:
            raise ConfigError("this guard has an optimizer already. Make one guard per optimizer.")
        host = self._host
        check_optimizer(optimizer, self.model)
        self.optimizer = host.optimizer = optimizer
        host.also = [restorable(o) for o in also]
        host.note_loaders()
        if not host.rewinds:
            self.notes.append("the data does not rewind: after a rollback it goes on")
        self._in_flight = False
        if host.device.type == "cuda":
            why = why_waiting(optimizer, host.scaler)
            self._in_flight = not why
            self.notes += [why] if why else []
        slowed = Slowed(optimizer, lambda: self._keeper.factors(host.done), host.units_in)
        self._hooks = [slowed, optimizer.register_step_post_hook(self._stepped)]
        size = sum(p.numel() * (p.element_size() + 8) for p in map(local, host.bare.parameters()))
        here = int(os.environ.get("LOCAL_WORLD_SIZE", processes()))
        check_memory(size, self._keeper.ring.most, "snapshots", processes=here)

    def step(self, loss: Tensor | float | None = None) -> bool:
        """After the backward pass: whether to make the update. The same on every process.

        `loss`: of the step, in nats; the mean over its micro-batches where there are several. None
        takes it from the model's outputs. False: gradients are gone; go on with the next batch.

        True after an incident may come with other gradients: the guard has raised a precision and
        has done the step again. On a GPU with a fused torch optimizer nothing waits for the device:
        an update that the device finds abnormal is withheld there although the answer is True, and
        the incident follows in the next step.

        Raises StoppedError when nothing that the guard may do has helped.
        """
        host, calls = self._host, self._host.recorder.take()
        allow(self._check_step(calls))
        if loss is not None:
            check_loss(loss)
        self.rewound = False
        if not self._keeper.ring.snapshots:
            self._keeper.begin(host.done)
        values = host.measure.values(host.given(loss, calls))
        values = self._rehearsal.of(calls, loss, values)
        late = self._finish()
        went_back = isinstance(late, Incident) and late.action == BACK
        host.position += not (went_back and host.rewinds)
        if went_back:
            return self._withhold()
        host.now = calls
        if host.position in host.skips:
            return self._withhold()
        if isinstance(late, Incident) and late.action == RETRY:
            values = host.measure.values(host.run(calls))
        if self._in_flight and late is None:
            return self._let_go(calls, values)
        seen = host.measure.as_pass(values)
        return self._decide(seen, late if isinstance(late, Trigger) else None)

    def forget(self) -> None:
        """Drop the forward passes since the last step: the loop gives this step up.

        For loops that catch an error (out of memory, say) between forward and backward pass.
        """
        self._host.recorder.take()
        self._host.forget()

    @property
    def model(self) -> nn.Module:
        """The guarded model, without what wraps it."""
        return self._host.bare

    def map(self) -> dict[str, str]:
        """The precision map: the recipe of every block."""
        return self._ladder.map()

    def policy(self) -> Policy:
        """The precision map as a policy for the next run; `to_toml` writes it."""
        return self._ladder.policy()

    @property
    def spent(self) -> dict[str, Any]:
        """What the guard has cost so far, in steps' worth of tokens: see halfulp.guard.budget."""
        return self._keeper.spent.state()

    def state_dict(self) -> dict[str, Any]:
        """Everything that it knows, between two steps: plain values and the snapshots' tensors.

        The batches that stand in for fresh data are not part of it.
        """
        self._finish()
        self._host.settled()
        return {
            "policy": digest_of(self._ladder.base),
            **self._host.state(),
            "keeper": self._keeper.state(),
            "numeric": self._numeric.state_dict(),
            "ring": self._keeper.ring.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`; model, optimizer and the others are put back by the user.

        Raises RunError if the guard was saved under another policy.
        """
        if state.get("policy") != digest_of(self._ladder.base):
            raise RunError(
                "the saved guard belongs to another policy. Give halfulp.Guard the policy of the "
                "saved run, or begin with a new guard."
            )
        self._made = None
        self._keeper.load(state["keeper"])
        self._numeric.load_state_dict(state["numeric"])
        self._host.load(state)
        self._keeper.ring.load(state["ring"])

    def close(self) -> None:
        """Leave model and optimizer alone; the model stays quantized as it is."""
        self._host.recorder.close()
        for hook in self._hooks if self.optimizer is not None else []:
            hook.remove()

    def hf(self) -> Any:
        """A callback for transformers.Trainer: see halfulp.integrations.hf."""
        from halfulp.integrations.hf import GuardCallback

        return GuardCallback(self)

    def lightning(self) -> Any:
        """A callback for lightning.pytorch.Trainer: see halfulp.integrations.lightning.

        MissingExtraError where Lightning is not installed.
        """
        require("lightning.pytorch", "lightning")
        from halfulp.integrations.lightning import GuardCallback

        return GuardCallback(self)

    # The step in question.

    def _decide(self, seen: Pass, trigger: Trigger | None = None) -> bool:
        """Judge what the host has seen; act until the step is good or given up."""
        host, keeper = self._host, self._keeper
        while True:
            if trigger is None:
                if self._scaler_skips(seen):
                    return True
                trigger = keeper.judge(host.done + 1, seen)
            if trigger is None:
                self._allow(_Made(host.now, seen))
                return True
            incident = keeper.respond(replace(trigger, step=host.done + 1), seen)
            if incident.action != RETRY:
                return self._answer(incident)
            trigger, seen = None, host.measure.as_pass(host.measure.values(host.run(host.now)))

    def _allow(self, made: _Made) -> None:
        """The update may be made: what is known of the step before it."""
        host, self._made = self._host, made
        host.finish()
        due = host.done + 1
        if due % self._keeper.ring.every == 0:
            host.note_loaders()
        self._look(due)
        if self.handle is not None:
            self.handle.count((due + 1) % COUNT_EVERY == 0)

    def _answer(self, incident: Incident) -> bool:
        if incident.action == STOP:
            raise StoppedError(stopped(incident))
        self.rewound = incident.action == BACK and self._host.rewinds
        return self._withhold()

    def _withhold(self) -> bool:
        if self.handle is not None and self.handle.clock.counting:
            self.handle.counters()  # those of a step that was not made are forgotten
        self._host.forget()
        return False

    def _let_go(self, calls: list[Call], values: Tensor) -> bool:
        """Let the device decide about the update, and look at its decision in the next step."""
        assert self.optimizer is not None
        norm_square = values[1 + len(self._host.units.names)]
        held = abnormal(self._keeper.detector, values[0], norm_square)
        withhold(self.optimizer, held)
        self._allow(_Made(calls, None, *sent(torch.cat([values, held.double().reshape(1)]))))
        return True

    def _finish(self) -> Trigger | Incident | None:
        """The step before is over: accept it, or answer what the device has found in it."""
        made, self._made = self._made, None
        if made is None:
            return None
        host, keeper, seen = self._host, self._keeper, made.seen
        trigger, held = None, False
        if seen is None:
            assert made.values is not None
            if made.event is not None:
                made.event.synchronize()
            *numbers, held = made.values.tolist()
            seen = host.measure.as_pass(numbers)
            trigger = keeper.judge(host.done + 1, seen)
        if held:
            trigger = trigger or Trigger("spike", host.done + 1, host.done + 1, 1)
            return self._answer_late(trigger, seen, made.calls)
        if made.stepped:
            host.done += 1
            host.recent.append(made.calls)
            keeper.accept(host.done, seen)
            keeper.keep(host.done)
            keeper.descend(host.done)
        return trigger

    def _answer_late(self, trigger: Trigger, seen: Pass, calls: list[Call]) -> Incident:
        """Answer for the step before, whose update the device has withheld."""
        host = self._host
        now, host.now = host.now, calls
        self._late = True
        incident = self._keeper.respond(trigger, seen)
        self._late, host.now = False, now
        if incident.action == STOP:
            raise StoppedError(stopped(incident))
        self.rewound = incident.action == BACK and host.rewinds
        return incident

    def _look(self, step: int) -> None:
        """Numeric rules on what the quantizers and a halfulp.AdamW have counted."""
        if self._counts is None or step < YOUNG:
            return
        findings = self._numeric.observe(step, self._counts.readings(self.optimizer))
        if self._keeper.heed(step, findings, self._numeric):
            self._host.set_mark()

    def _scaler_skips(self, seen: Pass) -> bool:
        """Whether the loss scaler will skip this step, and will be able to go on."""
        broken = math.isfinite(seen.loss) and not math.isfinite(seen.norm)
        if self._host.scaler is None or not broken:
            self._skipped_by_scaler = 0
            return False
        self._skipped_by_scaler += 1
        return self._skipped_by_scaler <= MOST_SKIPS

    def _stepped(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        if self._made is not None:
            self._made.stepped = True
        if self._in_flight:
            allow(optimizer)

    def _check_step(self, calls: list[Call]) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ConfigError("the guard has no optimizer. Give it one: guard.attach(optimizer).")
        if not calls:
            raise ConfigError(
                "guard.step was called, and the guarded model has made no forward pass in training "
                "mode since the last one. Call it once per step, after loss.backward(), and give "
                "the guard the module that the loop calls."
            )
        return self.optimizer

    def _report(self, incident: Incident) -> None:
        done = list(incident.done)
        if incident.action == BACK:
            done.append(
                "the loader is rewound"
                if self._host.rewinds
                else "the data goes on: no loader that rewinds was given"
            )
        if incident.action == RETRY and self._late:
            done.append("the batch of the withheld step is not repeated")
        incident = replace(incident, done=tuple(done))
        self.incidents.append(incident)
        tell(self._log, incident, self._ladder)
