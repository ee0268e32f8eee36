"""Scaling laws as data: the table of laws.toml."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from halfulp.errors import PlanError
from halfulp.plan.said import Said, said

LOSS_KINDS = ("loss", "repetition")  # laws that a plan can be made with


@dataclass(frozen=True, kw_only=True)
class Law:
    """A published law: N parameters, D tokens, C FLOPs, losses in nats per token."""

    name: str
    kind: str
    title: str
    formula: str
    source: str
    read: str  # "source" or "second hand"
    coefficients: Mapping[str, float] = field(default_factory=dict)
    errors: Mapping[str, float] = field(default_factory=dict)  # standard errors, as published
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # what was fitted on
    notes: tuple[str, ...] = ()
    warning: str = ""
    notes_ja: tuple[str, ...] = ()  # of the notes that the page of a plan shows
    warning_ja: str = ""

    def note(self) -> Said:
        """The first of the notes, which is for plans."""
        return Said(self.notes[0], "".join(self.notes_ja[:1]))

    def outside(self, **values: float) -> tuple[Said, ...]:
        """One sentence for each of the `values` that lies outside what the law was fitted on.

        `values` are named as in `ranges`: N, D, C, L or epochs; those without a range are not
        judged.
        """
        found = []
        for name, value in values.items():
            low, high = self.ranges.get(name, (value, value))
            if not low <= value <= high:
                where = {"value": value, "factor": value / high, "low": low, "high": high}
                key = "above" if value > high else "below"
                found.append(said(key, law=self.name, name=name, **where))
        return tuple(found)


def law_names(*kinds: str) -> tuple[str, ...]:
    """The laws of the table, of some kinds or of all."""
    return tuple(name for name in _table() if not kinds or load_law(name).kind in kinds)


@cache
def load_law(name: str) -> Law:
    """The law `name`; PlanError naming the nearest ones."""
    table = _table()
    if name not in table:
        near = difflib.get_close_matches(name, table, n=3, cutoff=0.4) or list(table)
        raise PlanError(
            f"law {name!r} is unknown. Nearest: {', '.join(near)}. See `halfulp plan laws`; "
            "a fit of your own runs is a .json or .csv file."
        )
    entry = _whole(table[name])
    entry["ranges"] = {key: (low, high) for key, (low, high) in entry.get("ranges", {}).items()}
    for notes in ("notes", "notes_ja"):
        entry[notes] = tuple(entry.get(notes, ()))
    return Law(name=name, **entry)


def _whole(entry: dict) -> dict:
    """The entry with what it takes over from the law that it is like."""
    if "like" not in entry:
        return dict(entry)
    base = _whole(_table()[entry["like"]])
    coefficients = base["coefficients"] | entry.get("coefficients", {})
    own = {key: value for key, value in entry.items() if key != "like"}
    return base | own | {"coefficients": coefficients}


@cache
def _table() -> dict[str, dict]:
    file = resources.files("halfulp.plan") / "laws.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
