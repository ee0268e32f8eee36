"""A training session as the guard sees it: how it looks again, goes back, changes precision."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from halfulp.guard.host import ALL, Pass
from halfulp.guard.replay import compared, differing, outputs, untouched
from halfulp.guard.ring import Snapshot
from halfulp.guard.units import Units
from halfulp.policy import Policy
from halfulp.processes import local
from halfulp.site import histories
from halfulp.train import nonfinite
from halfulp.train.session import Session
from halfulp.train.state import model_tensors, optimizer_tensors
from halfulp.train.step import (
    agree,
    drop_gradients,
    forward_backward,
    forward_only,
    place_of_loss,
)


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
            gradients = self._named_gradients()
            if keep:
                self.kept = [gradient.clone() for _, gradient in gradients]
            if not compare:
                return found
            add = s.world.sum if s.world.mode == "fsdp2" else torch.Tensor.clone
            return compared(found, self.units, gradients, self.kept, add)

    def differing_unit(self) -> str:
        """The first unit whose output differs between two equal forward passes; "" for none."""
        s = self.session
        with self._untouched():
            runs = [self._outputs() for _ in range(2)]
        found = [name for part in s.world.gather(differing(runs)[:1]) for name in part]
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

    def _untouched(self) -> AbstractContextManager[None]:
        return untouched(self.session.model, self.session.precision.handle)

    def _named_gradients(self) -> list[tuple[str, Tensor]]:
        named = self.session.model.named_parameters()
        return [(n, local(p.grad)) for n, p in named if p.grad is not None]

    def _outputs(self) -> dict[str, Tensor]:
        """The output of every leaf module in a forward pass of the step's first micro-batch."""
        with torch.compiler.set_stance("force_eager"):
            return outputs(self.session.model, lambda: forward_only(self.session))

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
