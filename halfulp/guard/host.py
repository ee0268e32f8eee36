"""What the guard needs of a training loop: to look again at a batch, to go back, to change."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from halfulp.guard.ring import Snapshot
from halfulp.policy import Policy

ALL = ("*",)  # every unit


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass over the batch of a step; the same on every process.

    `differences` are the norms of what separates each unit's gradient from that of the pass that
    was kept, `cosines` the cosines of the two; empty unless asked for.
    """

    loss: float  # nats
    norm: float  # of the gradient, before clipping
    units: Mapping[str, float] = field(default_factory=dict)  # gradient norm per unit
    differences: Mapping[str, float] = field(default_factory=dict)
    cosines: Mapping[str, float] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)  # norm of each matrix, before


class Host(Protocol):
    """A training loop, as the guard sees it. Every call is made on every process alike.

    Replays leave no trace: parameters, buffers, gradients, histories, counters and random streams
    are afterwards what they were.
    """

    deterministic: bool  # equal inputs give equal bits

    def replay(
        self,
        off: Collection[str] = (),
        *,
        fresh: int = 0,
        backward: bool = True,
        keep: bool = False,
        compare: bool = False,
    ) -> Pass:
        """The batch of the step in question again, with the units `off` in fp32 (ALL: all).

        `fresh` > 0 takes the batch so many places further on instead. Without `backward` the pass
        has the loss alone. `keep` keeps the gradient, `compare` compares with the kept one.
        """
        ...

    def differing_unit(self) -> str:
        """The first unit whose output differs between two equal forward passes; "" for none."""
        ...

    def broken_unit(self) -> str:
        """The unit where the step first left the finite numbers; "" if none can be named."""
        ...

    def capture(self) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
        """(tensors, facts) of the run after its last finished step; copies."""
        ...

    def restore(self, snapshot: Snapshot) -> None:
        """Put the run back to where `snapshot` was taken."""
        ...

    def apply(self, policy: Policy) -> None:
        """Put `policy` in force; what it does not change goes on undisturbed."""
        ...

    def skip(self, first: int, last: int) -> int:
        """Never train (again) on the batches of the steps `first` to `last`; how many those are."""
        ...
