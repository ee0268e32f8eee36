"""RESULTS.md: every claim with what was measured, the verdict and the seconds it took."""

import datetime
import inspect
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from reproduce.common import REFUTED, REPRODUCED, UNKNOWN, Result

_INTRODUCTION = (
    "Written by `python -m reproduce`; `python -m reproduce NAME …` measures the named scripts "
    "again."
)
_RULE = (
    "Brackets are 95% intervals (Student, over seeds or independent samples). A verdict is "
    f'"{REPRODUCED}" when the whole interval lies inside the gate, "{REFUTED}" when it lies '
    f'outside, "{UNKNOWN}" otherwise. Losses are nats/token. Seconds are wall-clock time until the '
    "claim was decided, after the one before it."
)


@dataclass(frozen=True)
class Section:
    """One script and what it found."""

    script: ModuleType
    rows: Sequence[tuple[Result, float]]


def render(sections: Sequence[Section], page: str = "") -> str:
    """The page, in Markdown: `page` with the sections of these scripts put in or replaced."""
    parts = {_command(part): part for part in _split(page)}
    for section in sections:
        pieces = (_title(section), _origin(section), _set_up(section), _table(section.rows))
        part = "\n\n".join(pieces)
        parts[_command(part)] = part
    body = "\n\n".join(parts.values())
    return "\n\n".join(["# Claims measured again", _INTRODUCTION, _RULE, _tally(body), body]) + "\n"


def _split(page: str) -> list[str]:
    """The sections of a page, each from its heading on."""
    return [f"## {part.strip()}" for part in page.split("\n## ")[1:]]


def _command(section: str) -> str:
    """The command under the heading of a section."""
    return section.splitlines()[2]


def machine() -> str:
    """What the figures were measured with, in general words."""
    import torch

    import halfulp
    from halfulp.numerics import kernel

    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, halfulp {halfulp.__version__}, {kernel.status().name} kernel"
    )


def _origin(section: Section) -> str:
    minutes = sum(seconds for _, seconds in section.rows) / 60
    today = datetime.date.today().isoformat()
    kept = " Training runs kept from before are not in the time." if _keeps_runs(section) else ""
    return f"Measured on {today} in {minutes:.1f} minutes: {machine()}.{kept}"


def _keeps_runs(section: Section) -> bool:
    """Whether the script takes training runs from the user's cache where they are there."""
    return getattr(section.script, "KEEPS_RUNS", False)


def _tally(body: str) -> str:
    """Verdicts are the bold cells of the tables."""
    counts = {v: body.count(f"| **{v}** |") for v in (REPRODUCED, REFUTED, UNKNOWN)}
    words = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return f"{sum(counts.values())} claims: {words}."


def _title(section: Section) -> str:
    summary = (inspect.getdoc(section.script) or "").splitlines()[0].rstrip(".")
    name = section.script.__name__.rpartition(".")[2]
    return f"## {summary}\n\n`python -m reproduce.{name}`"


def _set_up(section: Section) -> str:
    return (inspect.getdoc(section.script) or "").partition("\n\n")[2].replace("\n", " ")


def _table(rows: Sequence[tuple[Result, float]]) -> str:
    lines = ["| claim | source | measured | verdict | s |", "|---|---|---|---|--:|"]
    for result, seconds in rows:
        cells = (result.claim, result.source, result.measured, f"**{result.verdict}**")
        lines.append(f"| {' | '.join(map(_cell, cells))} | {seconds:.0f} |")
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
