"""Which batches a run trains on: one after another, except those that are skipped."""

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

Range = tuple[int, int]  # first and last


@dataclass
class Cursor:
    """`position` counts the batches of the corpus (0-based); it runs ahead of the step by skips."""

    position: int = 0
    skipped: list[Range] = field(default_factory=list)  # in order, apart from each other

    def advance(self) -> None:
        """Go to the next batch that is not skipped."""
        self.position = self.ahead(1)

    def settle(self) -> None:
        """If the present batch is skipped, go to the next one that is not."""
        self.position = self._free(self.position)

    def ahead(self, places: int) -> int:
        """The position so many batches further on, over skipped ones."""
        position = self.position
        for _ in range(places):
            position = self._free(position + 1)
        return position

    def is_skipped(self, position: int) -> bool:
        """Whether the batch at `position` is never trained on."""
        return self._free(position) != position

    def skip(self, first: int, last: int) -> int:
        """Never train on the batches `first` to `last`; how many of them are newly skipped."""
        before = _count(self.skipped)
        self.skipped = _joined([*self.skipped, (max(0, first), last)])
        return _count(self.skipped) - before

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"position": self.position, "skipped": [list(pair) for pair in self.skipped]}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.position = state["position"]
        self.skipped = [(first, last) for first, last in state["skipped"]]

    def _free(self, position: int) -> int:
        """The first position from `position` on that is not skipped."""
        i = bisect_right(self.skipped, position, key=lambda pair: pair[0]) - 1
        return max(position, self.skipped[i][1] + 1) if i >= 0 else position


def cursor_at_start(skip: Iterable[int]) -> Cursor:
    """A cursor before the first step, with single batches skipped."""
    cursor = Cursor(0, _joined([(p, p) for p in skip]))
    cursor.settle()
    return cursor


def _joined(ranges: Iterable[Range]) -> list[Range]:
    """Ranges in order; those that meet are one, and empty ones none."""
    joined: list[Range] = []
    for first, last in sorted(pair for pair in ranges if pair[0] <= pair[1]):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = joined[-1][0], max(last, joined[-1][1])
        else:
            joined.append((first, last))
    return joined


def _count(ranges: Iterable[Range]) -> int:
    return sum(last - first + 1 for first, last in ranges)
