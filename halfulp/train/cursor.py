"""Which batches a run trains on: one after another, except those that are skipped."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Cursor:
    """`position` counts the batches of the corpus (0-based); it runs ahead of the step by skips."""

    position: int = 0
    skipped: list[tuple[int, int]] = field(default_factory=list)  # first and last of each range

    def advance(self) -> None:
        """Go to the next batch that is not skipped."""
        self.position += 1
        self.settle()

    def settle(self) -> None:
        """If the present batch is skipped, go to the next one that is not."""
        while self.is_skipped(self.position):
            self.position += 1

    def ahead(self, places: int) -> int:
        """The position so many batches further on, over skipped ones."""
        position = self.position
        for _ in range(places):
            position += 1
            while self.is_skipped(position):
                position += 1
        return position

    def is_skipped(self, position: int) -> bool:
        """Whether the batch at `position` is never trained on."""
        return any(first <= position <= last for first, last in self.skipped)

    def skip(self, first: int, last: int) -> int:
        """Never train on the batches `first` to `last`; how many of them are newly skipped."""
        first = max(0, first)
        new = sum(not self.is_skipped(p) for p in range(first, last + 1))
        if new:
            self.skipped.append((first, last))
        return new

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"position": self.position, "skipped": [list(pair) for pair in self.skipped]}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.position = state["position"]
        self.skipped = [(first, last) for first, last in state["skipped"]]


def cursor_at_start(skip: Iterable[int]) -> Cursor:
    """A cursor before the first step, with single batches skipped."""
    cursor = Cursor(0, [(p, p) for p in skip])
    cursor.settle()
    return cursor
