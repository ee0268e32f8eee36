"""RESULTS.md: every claim with what was measured, the verdict and the seconds it took."""

import datetime
import inspect
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

from reproduce.common import REFUTED, REPRODUCED, UNKNOWN, Result

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


def render(sections: Sequence[Section]) -> str:
    """The page, in Markdown."""
    parts = ["# Claims measured again", _origin(sections), _RULE, _tally(sections)]
    for section in sections:
        parts += [_title(section), _set_up(section), _table(section.rows)]
    return "\n\n".join(parts) + "\n"


def machine() -> str:
    """What the figures were measured with, in general words."""
    import torch

    import halfulp
    from halfulp.numerics import kernel

    return (
        f"{os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}, "
        f"torch {torch.__version__}, halfulp {halfulp.__version__}, {kernel.status().name} kernel"
    )


def _origin(sections: Sequence[Section]) -> str:
    seconds = sum(spent for section in sections for _, spent in section.rows)
    today = datetime.date.today().isoformat()
    return (
        f"Written by `python -m reproduce` on {today} in {seconds / 60:.0f} minutes: {machine()}."
    )


def _tally(sections: Sequence[Section]) -> str:
    verdicts = [result.verdict for section in sections for result, _ in section.rows]
    counts = (f"{verdicts.count(v)} {v}" for v in (REPRODUCED, REFUTED, UNKNOWN))
    return f"{len(verdicts)} claims: {', '.join(counts)}."


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
