"""The first step done a second time: whether a loop can be repeated, and how it adds up losses."""

import math

from torch import Tensor

from halfulp.errors import ConfigError
from halfulp.guard.calls import Call
from halfulp.guard.host import Pass
from halfulp.guard.own_loop import LoopHost

_SAME = 1e-3  # relative difference at most between a step and its rehearsal


class Rehearsal:
    """One step of each number of micro-batches is rehearsed; `notes` receives what was found."""

    def __init__(self, host: LoopHost, notes: list[str]) -> None:
        self.host, self.notes, self._known = host, notes, set[int]()

    def of(self, calls: list[Call], loss: Tensor | float | None, values: Tensor) -> Tensor:
        """The values of a step, as they are once it is known how the loop adds up its losses.

        Raises ConfigError for a step that cannot be repeated.
        """
        host, count = self.host, len(calls)
        seen = host.measure.as_pass(values) if count not in self._known else None
        if seen is None or not (math.isfinite(seen.loss) and math.isfinite(seen.norm)):
            return values  # a later step will tell
        host.now = calls
        host.sum_loss = host.sum_gradient = False
        again = host.replay()
        host.sum_gradient = count > 1 and _close(seen.norm, count * again.norm)
        host.sum_loss = count > 1 and _close(seen.loss, count * again.loss)
        if loss is None:
            host.sum_loss = host.sum_gradient
            values = host.measure.values(host.given(None, calls))
        if host.sum_gradient or host.sum_loss:
            seen, again = host.measure.as_pass(values), host.replay()
        self._compare(seen, again, count)
        self._known.add(count)
        return values

    def _compare(self, seen: Pass, again: Pass, count: int) -> None:
        if not _close(seen.loss, again.loss) or not _close(seen.norm, again.norm):
            raise ConfigError(_unlike(seen, again, count))
        if self.host.deterministic and (seen.loss, seen.norm) != (again.loss, again.norm):
            self.host.deterministic = False
            self.notes.append("a step done again differs in the last bits: it cannot show hardware")


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=_SAME)


def _unlike(seen: Pass, again: Pass, count: int) -> str:
    """Why the first step could not be repeated."""
    return (
        f"the guard has done the step a second time and has found something else: loss "
        f"{again.loss:.6g} and gradient norm {again.norm:.6g}, where the loop has loss "
        f"{seen.loss:.6g} and norm {seen.norm:.6g} ({count} micro-batches: all forward passes in "
        "training mode since the last guard.step). It must be able to do a step again. Call "
        "guard.step before gradients are clipped and after they are unscaled; give it the mean "
        "loss of the micro-batches; make passes of no step (validation) under torch.no_grad(); use "
        "no optimizer that takes a closure; and where the loss is not the one in the model's "
        "output, give halfulp.Guard(…, loss=…)."
    )
