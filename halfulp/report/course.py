"""The course of a run in its events: which of them count, and which a rollback has taken back."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from halfulp.guard.incident import BACK

Event = Mapping[str, Any]

# What happens in a step, and has not happened once the run has gone back behind it.
_OF_A_STEP = frozenset(
    (
        *("step", "eval", "counters", "sharpness", "signal", "gradient_error"),
        *("loss_scale", "lr_ratios", "schedule"),
    )
)


@dataclass(frozen=True)
class Course:
    """`events` count, in the order of the file; `withdrawn` has those that each rollback took."""

    events: tuple[Event, ...]
    withdrawn: tuple[tuple[Event, ...], ...] = ()


def course_of(events: Iterable[Event]) -> Course:
    """The course that a run has taken in the end. Incidents stay, whatever they have undone."""
    *_, last = courses(events)
    return last


def courses(events: Iterable[Event]) -> Iterator[Course]:
    """The course as it was right before each incident, which is not in it; and in the end."""
    kept: list[Event] = []
    withdrawn: list[tuple[Event, ...]] = []
    for event in events:
        if event.get("event") == "guard":
            yield Course(tuple(kept), tuple(withdrawn))
            if event.get("action") == BACK:
                taken = [e for e in kept if _is_after(e, int(event["to"]))]
                kept = [e for e in kept if not _is_after(e, int(event["to"]))]
                withdrawn.append(tuple(taken))
        kept.append(event)
    yield Course(tuple(kept), tuple(withdrawn))


def _is_after(event: Event, step: int) -> bool:
    return event.get("event") in _OF_A_STEP and int(event.get("step", 0)) > step
