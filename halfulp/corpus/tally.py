"""What is counted of one definition, in the order of the units' priorities.

A unit is a document, or a piece of one where there are few. Its priority is a hash, so that the
units of the lowest priorities are a random part of the corpus, whatever order its files are in: the
growth curve needs no shuffling.
"""

from dataclasses import dataclass, field, replace

import numpy as np

from halfulp.corpus import murmur
from halfulp.corpus.adaptive import Sample

STEPS = 65  # parts of 2^(−j/2), j = 0 … 64
GROUPS = 16  # of units, by the lowest bits of the priority
PLACE_BITS = 40  # of a place: the rest is the shard


@dataclass
class Tally:
    """Occurrences and a sample of the distinct ones.

    The sample's marks are the place where a sequence first ends (shard << PLACE_BITS | symbols in
    the shard before it), or the length in symbols of a line or document.

    `steps` [GROUPS, STEPS] int64: the occurrences in the units of each group whose priority lies
    in the lowest 2^(−j/2) of the range and not in the next smaller part.
    """

    sample: Sample
    steps: np.ndarray = field(default_factory=lambda: np.zeros((GROUPS, STEPS), np.int64))

    def count(self, occurrences: np.ndarray, cells: np.ndarray) -> None:
        """Take in how often it occurs in each unit, and their `cells_of` priorities."""
        np.add.at(self.steps.reshape(-1), cells, occurrences)

    def merge(self, other: "Tally") -> None:
        """Take in another part of the corpus."""
        self.steps = self.steps + other.steps  # arrays that come from Ray cannot be written
        self.sample.merge(other.sample)

    def settled(self) -> "Tally":
        """The same, without what speeds up counting: small to send and to store."""
        self.sample.settle()
        return Tally(replace(self.sample), self.steps)

    @property
    def occurrences(self) -> int:
        """How many sequences there were."""
        return int(self.steps.sum())


def priorities_of(numbers: np.ndarray) -> np.ndarray:
    """The priority [n] uint32 of each numbered unit."""
    mixed = numbers + np.uint64(1)
    murmur.fmix(mixed, np.empty_like(mixed))
    return (mixed >> np.uint64(32)).astype(np.uint32)


def cells_of(priorities: np.ndarray) -> np.ndarray:
    """Where in a tally's `steps`, flat, the units of these priorities are counted."""
    return group_of(priorities) * STEPS + step_of(priorities)


def step_of(priorities: np.ndarray) -> np.ndarray:
    """The largest j for which the priority lies in the lowest 2^(−j/2) of their range."""
    steps = np.floor(2 * (32 - np.log2(priorities + 1.0)))
    return np.minimum(steps, STEPS - 1).astype(np.int64)


def group_of(priorities: np.ndarray) -> np.ndarray:
    """The group of each unit, independent of its place in the order."""
    return (priorities % GROUPS).astype(np.int64)
