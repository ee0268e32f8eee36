"""The guard's looks inside the forward passes of a session, on the steps that count."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from halfulp.blocks import BlockMap
from halfulp.guard.flip_back import FlipBack
from halfulp.guard.probes import probes
from halfulp.guard.readings import Reading, worst
from halfulp.train.session import Session

_CONSECUTIVE = 3  # steps that flip_back compares; the last one counts


class Looks:
    """What was seen in the first micro-batch of the present step; `take` hands it out.

    Codes of weights are noted in the last three steps up to one that counts; `state` has them.
    """

    def __init__(self, session: Session, blocks: BlockMap) -> None:
        self.session, self.blocks = session, blocks
        self.flips = FlipBack()
        self._readings: list[Reading] = []

    @contextmanager
    def around(self, micro: int) -> Iterator[None]:
        """Around the forward pass of a micro-batch of the session's step."""
        s = self.session
        step, every = s.step + 1, s.config.train.count_every
        ahead = -step % every if every else every
        if micro or not every or ahead >= _CONSECUTIVE or (s.config.train.compile and ahead):
            yield
            return
        with ExitStack() as stack:
            if not s.config.train.compile:  # compiled graphs have no room for a hook
                stack.enter_context(self.flips.look(s.model, step))
            found = [] if ahead else stack.enter_context(probes(s.model, self.blocks))
            yield
        self._readings = found + (self.flips.readings() if not ahead else [])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(facts, codes by GEMM): the same on every process, whose weights are whole in a pass."""
        state = self.flips.state_dict()
        return {"step": state["step"], "blocks": state["blocks"]}, state["codes"]

    def load(self, facts: Mapping[str, Any], codes: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        device = self.session.world.device
        here = {name: tensor.to(device) for name, tensor in codes.items()}
        self.flips.load_state_dict({**facts, "codes": here})

    def take(self) -> list[Reading]:
        """The readings of the step that has just been made, the worst of all processes."""
        found, self._readings = self._readings, []
        if not self.session.config.train.count_every:
            return []
        if self.session.step % self.session.config.train.count_every:
            return []
        return worst(reading for part in self.session.world.gather(found) for reading in part)
