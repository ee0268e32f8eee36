"""Lower learning rates during a step, for the groups that hold parameters of a slowed unit."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


class Slowed:
    """Hooks on an optimizer: `factors` by unit before a step, the rates as they were after it.

    `units_in` says which units a group holds; the lowest of their factors counts.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        factors: Callable[[], Mapping[str, float]],
        units_in: Callable[[Mapping[str, Any]], set[str]],
    ) -> None:
        self._factors, self._units_in = factors, units_in
        self._rates: list[Any] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def remove(self) -> None:
        """Leave the optimizer alone."""
        for hook in self._hooks:
            hook.remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        factors = self._factors()
        self._rates = [group["lr"] for group in optimizer.param_groups] if factors else []
        for group in optimizer.param_groups if factors else ():
            found = [factors[unit] for unit in self._units_in(group) if unit in factors]
            group["lr"] = group["lr"] * min(found, default=1.0)

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate
