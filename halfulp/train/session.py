"""One run while it trains: everything that the steps, evaluations and checkpoints share."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from halfulp.data import Data
from halfulp.guard.faults import Fault
from halfulp.pieces import Piece
from halfulp.run import Run
from halfulp.train.blockwise import Blockwise
from halfulp.train.config import TrainConfig
from halfulp.train.cursor import Cursor
from halfulp.train.parallel import World
from halfulp.train.precision import Precision

if TYPE_CHECKING:
    from halfulp.train.guard import SessionGuard

OnEvent = Callable[[Mapping[str, Any]], None]


@dataclass
class Session:
    """The state of a run after `step` finished steps.

    `model` is the Hugging Face model, `shared` the same as the processes train it (DDP, FSDP2).
    `micro_batches` is the number per step over all processes; it decides the data of a step, so a
    resumed run keeps it whatever the number of processes.
    """

    config: TrainConfig
    world: World
    data: Data
    model: nn.Module
    precision: Precision
    blocks: Mapping[str, str]  # parameter -> block
    pieces: tuple[Piece, ...]  # of the parameters, as sharpness tells them apart
    shape: str  # config.json of the model
    micro_batches: int
    on_event: OnEvent | None = None
    blockwise: Blockwise | None = None  # learning rates per block type
    cursor: Cursor = field(default_factory=Cursor)  # which batch is next
    guard: "SessionGuard | None" = None
    faults: tuple[Fault, ...] = ()  # of a drill
    shared: nn.Module = field(init=False)
    run: Run = field(init=False)  # opened last: until then nothing is written
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # training time, without evaluations and checkpoints
    evaluation: dict[str, Any] = field(default_factory=dict)  # fields of the last `eval`
    first_loss_nats: float | None = None
    saved: int | None = None  # step of the newest checkpoint

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        # DDP must not outlive the process group, and a traceback may keep this session alive.
        self.shared = self.model
        if hasattr(self, "run"):
            self.run.close()

    @property
    def accumulate(self) -> int:
        """Micro-batches of this process per step."""
        return self.micro_batches // self.world.size

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event on process 0 and hand it to the callback there."""
        self.run.write(event, **fields)
        if self.on_event is not None and self.world.main:
            self.on_event({"event": event, **fields})
