"""Signs: which signals of a run were abnormal up to an incident, in which block, and since when.

Looked for in the run's own events: loss and gradient norm of every step, counters, warnings of the
guard, and sharpness.
"""

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from halfulp.guard.detect import QUIET, SPIKE, WINDOW, Detector
from halfulp.guard.keeper import MEMORY, NEAR
from halfulp.guard.readings import readings_of
from halfulp.guard.rules import rules
from halfulp.train.counters import shares

GROWN = 20.0  # sharpness over the median of its last measurements, each of which scatters
_EARLIER, _FEWEST = 8, 4  # so many of them, and the fewest that a median is taken of
# The same history as that of the guard: SessionGuard.see_logits.
_KNOWN, _REMEMBERED, _LEAST_SPREAD = 8, 32, 0.05
_EVERY_STEP = ("loss", "gradient norm")
_TWICE = 2  # looks or more, where no rule says how many: a single one may be chance

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Sign:
    """A signal above its threshold from `step` on, `lead` steps before the incident.

    `block` is "" for the whole run. `first` is the value at `step`, `worst` the largest since.
    """

    signal: str
    block: str
    place: str
    step: int
    lead: int
    first: float
    worst: float
    threshold: float


class Look(NamedTuple):
    """One value of a signal, and the threshold that it should not be above."""

    step: int
    value: float
    threshold: float
    place: str = ""
    warned: bool = False  # the guard has found it in all the looks that its rule needs


Key = tuple[str, str]  # signal, block


def signs_before(events: Sequence[Event], step: int, *, vocab: int = 0) -> list[Sign]:
    """The signs of the incident at `step` in the events before it, the earliest first.

    `vocab` is the number of token ids, 0 where it is not known: then log Z has no threshold.

    A signal counts from its first abnormal look of the last 1,000 steps after which, up to the
    incident, it was never quiet for longer than 60 steps, or than one look at what is not looked at
    in every step; nor at all since the guard gave its block another recipe.
    """
    looks: dict[Key, list[Look]] = {}
    for key, look in _looks(events, step, vocab):
        looks.setdefault(key, []).append(look)
    changes = _changes(events, step)
    whole = changes.get("*", [])
    found = (
        _sign(key, mine, step, [*whole, *changes.get(key[1], ())] if key[1] else ())
        for key, mine in looks.items()
    )
    return sorted((s for s in found if s is not None), key=lambda s: (s.step, -_over(s)))


def phases_of(steps: Sequence[Event]) -> set[int]:
    """Steps after which the learning rate does something else: the first and last highest."""
    rates = [(float(e.get("lr") or 0.0), int(e["step"])) for e in steps]
    highest = max((rate for rate, _ in rates), default=0.0)
    at = [step for rate, step in rates if rate == highest]
    return {at[0], at[-1]} if at else set()


def _sign(
    key: Key, looks: Sequence[Look], incident: int, changes: Sequence[int] = ()
) -> Sign | None:
    """The sign of one signal, from all looks at it; a warning of the guard is enough for one.

    `changes` are the steps after which its block had another recipe.
    """
    warned = any(look.warned for look in looks)
    looks = [look for look in looks if incident - MEMORY <= look.step <= incident]
    reach = _reach(key[0], looks)
    abnormal = [look for look in looks if not look.value <= look.threshold]
    quiet = [look.step for look in looks if look.value <= look.threshold]
    episode: list[Look] = []
    for look in reversed(abnormal):
        until = episode[-1].step if episode else incident
        cured = any(look.step <= change < q <= until for change in changes for q in quiet)
        if until - look.step > reach or cured:
            break
        episode.append(look)
    needed = 1 if warned else _needed(key[0])
    if len(episode) < needed or episode[-1].step == incident:
        return None
    first, worst = episode[-1], max(episode, key=lambda look: _rank(look.value))
    return Sign(
        *key, worst.place, first.step, incident - first.step, first.value, worst.value,
        first.threshold,
    )  # fmt: skip


def _changes(events: Iterable[Event], incident: int) -> dict[str, list[int]]:
    """Steps before the incident in which the guard gave a block, or a unit, another recipe."""
    found: dict[str, list[int]] = {}
    for event in events:
        if event.get("event") != "guard" or int(event["step"]) >= incident:
            continue
        for unit in event.get("raised") or ():
            stem, dot, kinds = str(unit).rpartition(".")
            for name in {str(unit), *(f"{stem}{dot}{kind}" for kind in kinds.split("+"))}:
                found.setdefault(name, []).append(int(event["step"]))
    return found


def _reach(signal: str, looks: Sequence[Look]) -> float:
    """Steps for which a signal may have been quiet in between."""
    if signal in _EVERY_STEP:
        return NEAR
    if all(look.warned for look in looks):
        return MEMORY  # the guard warns once, and again only after it has been quiet
    steps = sorted({look.step for look in looks})
    return 2 * statistics.median(b - a for a, b in pairwise(steps)) if len(steps) > 1 else NEAR


def _needed(signal: str) -> int:
    """Abnormal looks that make a sign."""
    rule = rules().get(signal)
    if rule is None:
        return _TWICE
    return rule.needs if rule.look in ("check", "measurement") else 1


def _looks(events: Sequence[Event], incident: int, vocab: int) -> Iterator[tuple[Key, Look]]:
    latest = _last_of_each_step(events)
    yield from _of_steps(latest["step"], incident)
    for event in latest["counters"]:
        yield from _of_counters(event)
    for event in events:
        if event.get("event") == "signal":
            key = str(event["rule"]), str(event["block"])
            yield (
                key,
                Look(
                    event["step"], event["value"], event["threshold"], event["place"], warned=True
                ),
            )
    noise = rules()["gradient_noise"].warn or math.inf
    for event in latest["gradient_error"]:
        for unit, error in event["units"].items():
            yield ("gradient_noise", unit), Look(int(event["step"]), error, noise)
    yield from _of_sharpness(latest["sharpness"])
    yield from _of_logits(latest["sharpness"], vocab)


def _last_of_each_step(events: Iterable[Event]) -> dict[str, list[Event]]:
    """Events by kind; one that was repeated after a resume counts once."""
    kinds = ("step", "counters", "sharpness", "gradient_error")
    found: dict[str, dict[int, Event]] = {kind: {} for kind in kinds}
    for event in events:
        if event.get("event") in found:
            found[event["event"]][int(event["step"])] = event
    return {kind: [rows[step] for step in sorted(rows)] for kind, rows in found.items()}


def _of_steps(steps: Sequence[Event], incident: int) -> Iterator[tuple[Key, Look]]:
    detector, phases = Detector(), phases_of(steps)
    for event in steps:
        step, loss, norm = int(event["step"]), event.get("loss_nats"), event.get("grad_norm")
        if loss is None or norm is None or not incident - MEMORY - WINDOW <= step <= incident:
            continue
        if math.isfinite(loss) and math.isfinite(norm):
            z = detector.deviations(loss, norm)
            detector.accept(loss, norm, {})
        else:
            z = {"z loss": math.inf, "z log norm": math.inf}
        if step in phases:
            detector.begin_phase()
        yield ("loss", ""), Look(step, z["z loss"], QUIET)
        # Gradient norms of healthy runs have heavy tails.
        yield ("gradient norm", ""), Look(step, z["z log norm"], SPIKE)


def _of_counters(event: Event) -> Iterator[tuple[Key, Look]]:
    gemms, optimizer = event.get("gemms") or (), event.get("optimizer") or ()
    worst: dict[Key, Look] = {}
    for reading in readings_of(map(shares, gemms), map(shares, optimizer)):
        rule, key = rules()[reading.rule], (reading.rule, reading.block)
        threshold = min(t for t in (rule.warn, rule.act) if t is not None)
        look = Look(int(event["step"]), reading.value, threshold, reading.place)
        worst[key] = max(worst.get(key, look), look, key=lambda found: _rank(found.value))
    yield from worst.items()


def _of_sharpness(events: Sequence[Event]) -> Iterator[tuple[Key, Look]]:
    """Each measurement of a block over the median of those before it."""
    earlier: dict[Key, list[float]] = {}
    for event in events:
        for row in event.get("blocks") or ():
            key, value = ("sharpness", str(row["block"])), float(row["sharpness"])
            before = earlier.setdefault(key, [])
            middle = statistics.median(before[-_EARLIER:]) if len(before) >= _FEWEST else 0.0
            if middle > 0:
                yield key, Look(int(event["step"]), value / middle, GROWN)
            if math.isfinite(value):
                before.append(value)


def _of_logits(events: Sequence[Event], vocab: int) -> Iterator[tuple[Key, Look]]:
    """log Z above that of equal chances, and the sharpness of the logits against its history."""
    history: list[float] = []
    for event in events:
        step, logits = int(event["step"]), event.get("logits") or {}
        if vocab and "logz" in logits:
            drift = abs(logits["logz"]) - math.log(vocab)
            yield ("logz", "head"), Look(step, drift, rules()["logz"].warn or 0.0)
        sharpness = float(logits.get("sharpness_centered", 0.0))
        if not sharpness > 0:
            continue
        if len(history) >= _KNOWN:
            middle = statistics.median(history)
            spread = 1.4826 * statistics.median(abs(value - middle) for value in history)
            z = (math.log(sharpness) - middle) / max(spread, _LEAST_SPREAD)
            limit = rules()["logits_sharpness"].warn or 0.0
            yield ("logits_sharpness", "head"), Look(step, z, limit)
        history = [*history, math.log(sharpness)][-_REMEMBERED:]


def _over(sign: Sign) -> float:
    return _rank(sign.worst) / sign.threshold if sign.threshold else math.inf


def _rank(value: float) -> float:
    return value if math.isfinite(value) else math.inf
