"""Incidents of the guard in words, for pages and terminals."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfulp.guard.host import ALL
from halfulp.guard.incident import BACK, LOWER, RAISE, RETRY, SKIP, STOP
from halfulp.guard.rules import rules
from halfulp.report import words
from halfulp.report.incidents import Cost, Explained, Story
from halfulp.report.signs import Sign

FALLBACK = "fallback"
# What an action is called, once and several times.
_NOUNS = {
    RAISE: ("precision raised", "precisions raised"),
    RETRY: ("step repeated", "steps repeated"),
    SKIP: ("batch skipped", "batches skipped"),
    BACK: ("rollback", "rollbacks"),
    LOWER: ("look at a lower precision", "looks at a lower precision"),
    STOP: ("stop", "stops"),
    FALLBACK: ("fallback of the whole model", "fallbacks of the whole model"),
}
_TIMES = {1: "once", 2: "twice"}
GLOSSARY = (
    ("z loss, z log norm", "robust standard deviations of the loss and of the logarithm of the "
     "gradient norm above the last 128 steps; a spike is above 8"),
    ("sustained, divergence", "the mean loss of 10 steps stays above its best for 20 steps, or is "
     "0.5 nats above it"),
    ("weight", "the norm of a matrix is not what the last updates can have made of it"),
    ("numeric", "a counter of a block is above the threshold from which more precision helps"),
    ("same arithmetic", "the batch again, as it was: another result is the hardware"),
    ("reference", "the batch again in fp32: as bad, and precision is not to blame"),
    ("fresh batch, reference", "another batch in fp32: as bad, and the state is to blame; else "
     "the data"),
    ("gain", "nats by which the loss of the batch falls with this unit alone in fp32 (or the "
     "gradient norm, where only that was broken)"),
    ("gradient error", "norm of the difference of the unit's gradient from that in fp32, over the "
     "norm of that; from 0.58 on it is noise"),
    ("growth", "gradient norm of the unit over its mean so far"),
    ("over threshold", "value of the counter that named the unit over its threshold"),
    ("margin", "gain or growth of the first unit over that of the next one"),
    ("withheld, replayed, passes", "steps that were computed and not made; steps that were done "
     "again after a rollback; forward and backward passes that looked for the culprit"),
    ("shadow passes", "passes at regular steps that compare every gradient with that in fp32"),
)  # fmt: skip


def seen(incident: Mapping[str, Any]) -> str:
    """ "spike (z loss 31.9, z log norm 11.1)"."""
    signals = incident.get("signals") or {}
    shown = [f"{key} {number(value)}" for key, value in list(signals.items())[:3]]
    more = f", {len(signals) - 3} more" if len(signals) > 3 else ""
    return f"{incident['trigger']} ({', '.join(shown)}{more})" if shown else incident["trigger"]


def judged(incident: Mapping[str, Any], *, most: int = 3) -> str:
    """ "precision in layers.1.ffn"."""
    units = list(incident.get("units") or ())
    where = f" in {words.listing(units, most=most)}" if units else ""
    return f"{incident['verdict']}{where}"


def warning(event: Mapping[str, Any]) -> str:
    """An event `signal`: "underflow 62 % (above 50 %) in layers.1.qk.q_proj dgrad.g"."""
    found, bar = (value(event["rule"], event[key]) for key in ("value", "threshold"))
    return f"{name(event['rule'])} {found} (above {bar}) in {event['place'] or event['block']}"


def done(incident: Mapping[str, Any]) -> str:
    """What was done, in the words of the guard."""
    return "; ".join(incident.get("done") or ()) or "nothing"


def booked(cost: Cost) -> str:
    """ "1 step withheld, 99 replayed, 3 passes"."""
    parts = [
        (cost.withheld, "step withheld" if cost.withheld == 1 else "steps withheld"),
        (cost.replayed, "replayed"),
        (cost.passes, "pass" if cost.passes == 1 else "passes"),
        (cost.shadows, "shadow passes"),
    ]
    return ", ".join(f"{value:,.3g} {what}" for value, what in parts if value) or "nothing"


def acted(stories: Sequence[Story]) -> str:
    """ "acted three times: two rollbacks and one batch skipped"."""
    counts = Counter(_kind(story.incident) for story in stories)
    named = [
        f"{words.count(counts[action])} {nouns[counts[action] > 1]}"
        for action, nouns in _NOUNS.items()
        if counts[action]
    ]
    times = _TIMES.get(len(stories), f"{words.count(len(stories))} times")
    return f"acted {times}: {words.listing(named)}"


def _kind(incident: Mapping[str, Any]) -> str:
    """What is counted: the action, or that the whole model has fallen back."""
    return FALLBACK if ALL[0] in (incident.get("raised") or {}) else incident["action"]


def raised_at_the_end(stories: Sequence[Story]) -> dict[str, str]:
    """The blocks that ended above the run's own policy, and their recipes."""
    return above(stories[-1].incident) if stories else {}


def above(incident: Mapping[str, Any]) -> dict[str, str]:
    """The blocks above the run's own policy after an incident, and their recipes."""
    recipes = incident.get("map") or {}
    return {block: recipes[block] for block in incident.get("above") or () if block in recipes}


def fell_back(stories: Sequence[Story]) -> str:
    """The recipe that the whole model has fallen back to; "" if it has not."""
    raised = (story.incident.get("raised") or {} for story in stories)
    return next((names[ALL[0]] for names in raised if ALL[0] in names), "")


def recipe(name: str) -> str:
    """ "te_current_forward_bf16_amp" → "bf16_amp, forward only"."""
    _, half, upper = name.rpartition("_forward_")
    return f"{upper}, forward only" if half else name


def headline(found: Explained) -> str:
    """One sentence about all incidents of a run."""
    if not found.stories:
        watched = "the guard watched" if found.guarded else "no guard was there, and in"
        rest = "saw nothing to act on" if found.guarded else "nothing looks abnormal"
        return f"no incident: {watched} {found.last_step:,} steps {'and ' * found.guarded}{rest}."
    if not found.guarded:
        count = words.count(len(found.stories))
        noun = "incident" if len(found.stories) == 1 else "incidents"
        return f"no guard was there; its detector finds {count} {noun} in the recorded steps."
    share = words.share(found.share)
    return f"the guard {acted(found.stories)}; it cost {share} of the run ({booked(found.cost)})."


def where(sign: Sign, count: int = 1) -> str:
    """The place of a sign, which may stand for `count` blocks."""
    if not sign.block:
        return "the whole run"
    place = sign.place.removeprefix(f"{sign.block}.") if sign.place != sign.block else ""
    one = f"{sign.block} {place}".strip()
    return f"{count} blocks, worst {one}" if count > 1 else one


@dataclass(frozen=True)
class First:
    """The first sign of a block, or of several that began together: then of the worst of them.

    `also` names the other signals of these blocks that were abnormal later.
    """

    sign: Sign
    blocks: int
    also: tuple[str, ...]


def firsts(signs: Iterable[Sign]) -> list[First]:
    """The first sign of every block; three or more blocks of one signal and step are one."""
    mine: dict[tuple[str, str], list[Sign]] = {}
    for sign in signs:
        mine.setdefault((sign.block, "" if sign.block else sign.signal), []).append(sign)
    groups: dict[tuple[str, int], list[list[Sign]]] = {}
    for block in mine.values():
        groups.setdefault((block[0].signal, block[0].step), []).append(block)
    rows: list[First] = []
    for group in groups.values():
        rows += [_first([block]) for block in group] if len(group) < 3 else [_first(group)]
    return rows


def _first(group: Sequence[Sequence[Sign]]) -> First:
    leaders = [block[0] for block in group]
    worst = max(leaders, key=lambda s: s.worst if math.isfinite(s.worst) else math.inf)
    later = dict.fromkeys(name(sign.signal) for block in group for sign in block[1:])
    return First(worst, len(group), tuple(later))


def value(signal: str, x: float) -> str:
    """The value of a signal with its unit."""
    unit = rules()[signal].unit if signal in rules() else "ratio" if signal == "sharpness" else "z"
    if unit == "share":
        return words.share(x)
    text = number(x)
    return {"ratio": f"{text}×", "nats": f"{text} nats"}.get(unit, f"z {text}")


def name(signal: str) -> str:
    """ "underflow_energy" → "underflow energy"."""
    return signal.replace("_", " ")


def number(x: Any) -> str:
    """Three significant digits; text and what is not finite as it is."""
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        return str(x)
    if not math.isfinite(x):
        return "not a number" if math.isnan(x) else "∞" if x > 0 else "−∞"
    text = f"{x:,.0f}" if 1000 <= abs(x) < 1e6 else f"{x:.3g}"
    return text.replace("-", "−")
