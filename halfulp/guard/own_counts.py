"""What has been counted in one's own loop: by the quantizers, and by a halfulp.AdamW."""

from typing import Any

import torch

from halfulp.guard.readings import Reading, readings_of
from halfulp.optim import AdamW
from halfulp.processes import gathered
from halfulp.quantization import Quantized


class OwnCounts:
    """The counters of the step in question as readings, the same on every process."""

    def __init__(self, handle: Quantized) -> None:
        self.handle = handle
        self._counted = False  # in the last update

    def readings(self, optimizer: torch.optim.Optimizer | None) -> list[Reading]:
        """Of the step's passes, and of the update before it."""
        rows, updates, counting = self.handle.stale(), [], self.handle.clock.counting
        if counting:
            rows += _everywhere(self.handle.counters())
        if isinstance(optimizer, AdamW):
            # Its rows are those of the update before, which came after the last look.
            updates = optimizer.counters()
            updates = _everywhere(updates) if self._counted else updates
            self._counted = counting
            optimizer.count(counting)
        return readings_of(rows, updates)


def _everywhere(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of every process, so that all find the same."""
    return [row for part in gathered(rows) for row in part]
