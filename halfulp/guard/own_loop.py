"""The user's own training loop as a host of the guard: forward passes made again, state put back.

The gradient of a step is that of the mean, or of the sum, of the losses of its forward passes
(micro-batches); the first step tells which.
"""

import copy
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from halfulp.errors import ConfigError
from halfulp.guard.calls import (
    Call,
    Recorder,
    autocast,
    loss_in,
    made_as,
    put_scales,
    random_state,
    scales_of,
    set_random,
    synchronized,
    time_of,
)
from halfulp.guard.host import ALL, Pass
from halfulp.guard.ladder import Ladder
from halfulp.guard.measure import Measure
from halfulp.guard.own_state import (
    is_loader,
    model_tensors,
    on_cpu,
    optimizer_states,
    plain_groups,
    restore_model,
    restore_optimizer,
)
from halfulp.guard.replay import compared, differing, outputs, untouched
from halfulp.guard.ring import Snapshot
from halfulp.optim import AdamW
from halfulp.optim.groups import storage_formats
from halfulp.policy import Policy, Resolution
from halfulp.processes import gathered, local
from halfulp.quantization import Quantized

LossOf = Callable[[Any, tuple[Any, ...], Mapping[str, Any]], Tensor]
FRESH = 3  # accepted steps whose batches stand in for fresh data


class LoopHost:
    """A loop as halfulp.guard.host.Host describes it; `now` are the calls of the step in question.

    `done` counts finished steps and `position` the steps that batches were taken for.
    """

    def __init__(
        self, model: nn.Module, handle: Quantized | None, ladder: Ladder, loss: LossOf | None
    ) -> None:
        self.model, self.bare = model, unwrapped(model)
        self.handle, self.ladder, self.units, self._loss = handle, ladder, ladder.units, loss
        compiled = hasattr(model, "_orig_mod")
        self.recorder = Recorder(model if compiled else self.bare, handle)
        self.device = self.recorder.device
        self.optimizer: torch.optim.Optimizer | None = None
        self.also: Sequence[Any] = ()
        self.scaler: Any = None
        cpu = self.device.type == "cpu"
        self.deterministic = cpu or torch.are_deterministic_algorithms_enabled()
        self.sum_loss = self.sum_gradient = False  # of micro-batches; False: their mean
        self.now: list[Call] = []
        self.recent: deque[list[Call]] = deque(maxlen=FRESH)
        self.done = self.position = 0
        self.skips: set[int] = set()
        self.kept: list[Tensor] = []
        self.measure = Measure(self.bare, self.units)
        self._mark = time_of(handle), scales_of(handle)
        self._loaders: list[Any] = []

    # What the guard asks of a loop.

    def replay(
        self,
        off: Collection[str] = (),
        *,
        fresh: int = 0,
        backward: bool = True,
        keep: bool = False,
        compare: bool = False,
    ) -> Pass:
        """The calls again; fresh data are those of the accepted steps before."""
        calls = self.now
        if fresh and self.recent:
            calls = self.recent[-min(fresh, len(self.recent))]
        with self._untouched(), self._plain(off):
            if not backward:
                with torch.no_grad():
                    losses = [self._again(call) for call in calls]
                loss = self.measure.over_processes(self.total(losses).reshape(1))
                return Pass(loss.item(), math.nan)
            found = self.measure.as_pass(self.measure.values(self.run(calls)))
            gradients = self.measure.gradients()
            if keep:
                self.kept = [gradient.clone() for _, gradient in gradients]
            if not compare:
                return found
            return compared(found, self.units, gradients, self.kept, self.measure.add)

    def differing_unit(self) -> str:
        with self._untouched():
            runs = [self._outputs() for _ in range(2)]
        return self._unit_of(differing(runs)[:1])

    def broken_unit(self) -> str:
        with self._untouched():
            names = [n for n, v in self._outputs().items() if not torch.isfinite(v).all()]
            if any(gathered(names[:1])):
                return self._unit_of(names[:1])
            self.run(self.now)
            names = [n for n, g in self.measure.gradients() if not torch.isfinite(g).all()]
        # The backward pass has met the last parameters first.
        return self._unit_of([name.rpartition(".")[0] for name in names[-1:]])

    def capture(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Copies on the CPU; those from a GPU may still be under way (`settled`)."""
        tensors = {f"model/{name}": t for name, t in model_tensors(self.bare)}
        plain: dict[str, Any] = {}
        for name, value in optimizer_states(self.optimizer):
            into = tensors if isinstance(value, Tensor) else plain
            into[f"optimizer/{name}"] = value
        time, scales = self._mark
        tensors |= {f"quantizers/{name}": amaxes for name, (amaxes, *_) in scales.items()}
        facts = {
            "time": list(time),
            "position": self.position,
            "optimizer": plain,
            "groups": plain_groups(self.optimizer),
            "also": [
                saved if is_loader(o) else copy.deepcopy(o.state_dict())
                for o, saved in zip(self.also, self._loaders, strict=True)
            ],
        }
        return {name: on_cpu(local(t)) for name, t in tensors.items()}, facts

    def restore(self, snapshot: Snapshot) -> None:
        self.drop_gradients()
        self.settled()
        facts, tensors = snapshot.facts, snapshot.tensors
        with torch.no_grad():
            restore_model(self.bare, tensors)
            scheduled = any(isinstance(o, LRScheduler) for o in self.also)
            states = {**tensors, **facts["optimizer"]}
            restore_optimizer(self.optimizer, states, facts["groups"], scheduled=scheduled)
        self.restore_histories(tensors, facts["time"])
        for o, state in zip(self.also, facts["also"], strict=True):
            o.load_state_dict(copy.deepcopy(state))
        self.done = snapshot.step
        if self.rewinds:
            self.position, self._loaders = facts["position"], list(facts["also"])

    def apply(self, policy: Policy) -> None:
        assert self.handle is not None  # without quantizers nothing can be raised
        resolution = policy.resolve(self.ladder.blocks)
        self.handle.switch(resolution)
        if isinstance(self.optimizer, AdamW):
            for group in self.optimizer.param_groups:
                self._store_as(group, resolution)

    def skip(self, first: int, last: int) -> int:
        """Batches of these steps are withheld when they come (again)."""
        start = self.position - (self.done + 1 - first)
        new = set(range(max(0, start), self.position + (last - self.done))) - self.skips
        self.skips |= new
        return len(new)

    # What the loop around it needs.

    @property
    def rewinds(self) -> bool:
        """Whether going back takes the data along."""
        return any(is_loader(o) for o in self.also)

    @property
    def time(self) -> tuple[int, int]:
        """The quantizers' clock after the last step that counts."""
        return self._mark[0]

    def settled(self) -> None:
        """Wait until the copies of `capture` are complete."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def note_loaders(self) -> None:
        """Keep where the loaders stand: the batches of this step are the last ones taken."""
        self._loaders = [copy.deepcopy(o.state_dict()) if is_loader(o) else None for o in self.also]

    def finish(self) -> None:
        """The step's passes count: their amaxes go into the delayed scales."""
        if self.handle is not None:
            self.handle.end_step()
        self.set_mark()

    def set_mark(self) -> None:
        self._mark = time_of(self.handle), scales_of(self.handle)

    def forget(self) -> None:
        """The step's passes did not happen: no gradient, no amax, no step of random numbers."""
        self.drop_gradients()
        if self.handle is not None:
            time, scales = self._mark
            self.handle.forget_seen()
            put_scales(self.handle, scales)
            self.handle.clock.set(*time)

    def drop_gradients(self) -> None:
        for p in self.bare.parameters():
            p.grad = None

    def run(self, calls: Sequence[Call]) -> Tensor:
        """The calls' loss; their gradient, as the user's loop makes it, is left in `.grad`."""
        self.drop_gradients()
        scale, losses = self.scaler.get_scale() if self.scaler else 1.0, []
        for i, call in enumerate(calls):
            last = i == len(calls) - 1
            with self._quiet(), synchronized(self.model, last):
                with made_as(call, self.handle, self.device):
                    loss = self._forward(call)
                    # A division, as users write it: a product would round differently.
                    share = loss if self.sum_gradient else loss / len(calls)
                    (share * scale).backward()
                losses.append(loss.detach())
        if self.scaler:
            for _, gradient in self.measure.gradients():
                gradient.mul_(1.0 / scale)
        return self.total(losses)

    def given(self, loss: Tensor | float | None, calls: Sequence[Call]) -> Tensor:
        """The loss of the step, fp64 on the device: `loss`, or what the calls' outputs have."""
        if loss is not None:
            return torch.as_tensor(loss, dtype=torch.float64, device=self.device).detach()
        losses = [call.loss for call in calls if call.loss is not None]
        if len(losses) < len(calls):
            raise ConfigError(
                "the model's outputs have no loss. Give it: guard.step(loss), the mean over the "
                "step's micro-batches."
            )
        return self.total(losses)

    def total(self, losses: Sequence[Tensor]) -> Tensor:
        """The loss of a step from those of its micro-batches, fp64."""
        each = torch.stack([loss.double() for loss in losses])
        return each.sum() if self.sum_loss else each.mean()

    def units_in(self, group: Mapping[str, Any]) -> set[str]:
        """The units whose parameters a group of the optimizer holds."""
        return {self.units.parameters[name] for name in self._owners(group).values()}

    def state(self) -> dict[str, Any]:
        """Where the loop stands between two steps, and the delayed scales, as plain values."""
        return {
            "done": self.done,
            "position": self.position,
            "skips": sorted(self.skips),
            "sums": [self.sum_loss, self.sum_gradient],
            "histories": self.handle.state_dict() if self.handle else {},
            "time": list(self.time),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`; puts the policy of the ladder in force."""
        self.done, self.position = state["done"], state["position"]
        self.skips = set(state["skips"])
        self.sum_loss, self.sum_gradient = state["sums"]
        if self.ladder.is_raised:
            self.apply(self.ladder.policy())
        saved = {f"quantizers/{name}": t for name, t in state["histories"].items()}
        self.restore_histories(saved, state["time"])
        self.note_loaders()

    def restore_histories(self, tensors: Mapping[str, Tensor], time: Sequence[int]) -> None:
        """Those that the policy in force still has; a raised block has none, or begins anew."""
        if self.handle is None:
            return
        mine = self.handle.state_dict()
        saved = {name: tensors.get(f"quantizers/{name}", own) for name, own in mine.items()}
        self.handle.load_state_dict(saved)
        self.handle.clock.set(*time)
        self.set_mark()

    # How it does that.

    def _forward(self, call: Call) -> Tensor:
        with autocast(call, self.device):
            output = self.model(*call.args, **call.kwargs)
            loss = self._loss(output, call.args, call.kwargs) if self._loss else loss_in(output)
        if loss is None:
            raise ConfigError(
                f"the output of {type(self.bare).__name__} has no loss, so the guard cannot do a "
                "step again. Give labels to the model, or a function: halfulp.Guard(…, "
                "loss=lambda output, args, kwargs: …)."
            )
        return loss

    def _again(self, call: Call) -> Tensor:
        with self._quiet(), made_as(call, self.handle, self.device):
            return self._forward(call).detach()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Inside, forward passes are the guard's own."""
        training, self.recorder.on = self.model.training, False
        self.model.train()
        try:
            with torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad():
                yield
        finally:
            self.recorder.on = True
            self.model.train(training)

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Inside, passes leave no trace; see halfulp.guard.host.Host."""
        random = random_state(self.device)
        try:
            with untouched(self.bare, self.handle):
                yield
        finally:
            set_random(random, self.device)

    @contextmanager
    def _plain(self, off: Collection[str]) -> Iterator[None]:
        """Inside, the units `off` compute in fp32."""
        with ExitStack() as stack:
            if off and self.handle is not None:
                blocks = {block for unit in off if unit in self.units.blocks
                          for block in self.units.blocks[unit]}  # fmt: skip
                everywhere = tuple(off) == ALL
                handle = self.handle
                stack.enter_context(handle.off() if everywhere else handle.off_in(blocks))
            if hasattr(self.model, "_orig_mod"):
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield

    def _outputs(self) -> dict[str, Tensor]:
        """The output of every leaf module in a forward pass of the first call."""
        with self._plain(()), torch.no_grad():
            return outputs(self.bare, lambda: self._again(self.now[0]))

    def _unit_of(self, modules: list[str]) -> str:
        """The unit of the first module that any process names."""
        found = [name for part in gathered(modules) for name in part]
        of = self.units.parameters
        units = (unit for name, unit in of.items() if found and name.startswith(f"{found[0]}."))
        return next(units, "")

    def _store_as(self, group: dict[str, Any], resolution: Resolution) -> None:
        """Give a group of a halfulp.AdamW the storage formats that all its parameters have."""
        names = self._owners(group).values()
        found = [storage_formats(resolution.parameters[name]) for name in names]
        alike = found and all(formats == found[0] for formats in found)
        if alike and all(p.dtype is torch.float32 for p in group["params"]):
            group.update(found[0])

    def _owners(self, group: Mapping[str, Any]) -> dict[int, str]:
        """The parameters of a group that are the model's, as id → name."""
        names = {id(p): name for name, p in self.bare.named_parameters()}
        return {id(p): names[id(p)] for p in group["params"] if id(p) in names}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod  # pyright: ignore[reportAssignmentType]
        else:
            return model
