"""What one run of a sweep came to."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

# finished: reached its last step. nonfinite, stopped: the recipe's own failures.
# refused: the recipe, model or data do not fit. stalled, died: nobody knows what the run would
# have come to.
STATUSES = ("finished", "nonfinite", "stopped", "refused", "stalled", "died")
LOST = ("stalled", "died")
_READ = {str: str, int: int, float: (int, float)}  # what a field of this type may hold


def _sound(value: object, type_: object) -> bool:
    if type_ not in _READ:
        return isinstance(value, Mapping) and all(_sound(v, float) for v in value.values())
    return isinstance(value, _READ[type_]) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One run on the grid recipe × learning rate × seed × data set.

    Losses are in nats per token and nan where there is none. `message` says why a run did not
    finish. Training losses: `tail_nats` is the median of the last 5 % (10 steps or more),
    `best_nats` the smallest of the smoothed ones. `unigram_nats` is the loss of the best model
    without context.
    """

    id: str
    recipe: str
    lr: float
    seed: int
    data: str
    status: str
    message: str = ""
    steps: int = 0
    planned_steps: int = 0
    tokens: int = 0
    parameters: int = 0
    seconds: float = 0.0  # in training steps
    wall_seconds: float = 0.0  # from the start of the task to its end
    loss_nats: float = math.nan  # held out, in the recipe's arithmetic
    loss_nats_fp32: float = math.nan  # held out, the same weights in fp32
    initial_nats: float = math.nan
    tail_nats: float = math.nan
    best_nats: float = math.nan
    unigram_nats: float = math.nan
    spikes: Mapping[str, float] = field(default_factory=dict)  # convention → share of steps
    sharpness: float = math.nan  # of the held-out logits, in the recipe's arithmetic
    sharpness_centered: float = math.nan
    logz: float = math.nan

    @property
    def lost(self) -> bool:
        """Nobody knows what the run would have come to."""
        return self.status in LOST

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Result":
        """The inverse of `to_dict`; unknown keys are passed over. KeyError, TypeError otherwise."""
        known = {f.name: f.type for f in fields(cls)}
        result = cls(**{key: v for key, v in value.items() if key in known})
        for key, type_ in known.items():
            found = getattr(result, key)
            if not _sound(found, type_) or (type_ in (int, float) and key != "logz" and found < 0):
                raise TypeError(f"{key} is {found!r}")
        if result.status not in STATUSES:
            raise TypeError(f"no such status: {result.status!r}")
        return result
