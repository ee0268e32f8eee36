"""The numeric signals of low-precision training, and when they are abnormal: rules.toml."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A signal is abnormal when it is above a threshold in `needs` of `window` looks.

    `look` says when one looks: every "step", every "check", or in a "replay" by the guard. Above
    `warn` the finding is a warning. Above `act` it asks for more precision where `raises` says that
    this is a cure, and is a warning otherwise. None: there is no such threshold.
    """

    name: str
    failure: str
    signal: str
    unit: str
    look: str = "check"
    window: int = 3
    needs: int = 2
    warn: float | None = None
    act: float | None = None
    raises: bool = False
    remedy: str
    source: str

    def threshold(self, value: float) -> float | None:
        """The highest threshold that `value` is above; None for NaN, a failure of its own."""
        passed = [t for t in (self.warn, self.act) if t is not None and value > t]
        return max(passed, default=None)


@cache
def rules() -> Mapping[str, Rule]:
    """All rules by name."""
    file = resources.files("halfulp.guard") / "rules.toml"
    table = tomllib.loads(file.read_text(encoding="utf-8"))
    return {name: Rule(name=name, **row) for name, row in table.items()}


def table() -> str:
    """The rules as a Markdown table, as it stands in docs/signals.md."""
    head = ("rule", "mode", "signal", "unit", "window", "warn", "act", "remedy", "source")
    rows = [head, ("---",) * len(head), *map(_cells, rules().values())]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cells(rule: Rule) -> tuple[str, ...]:
    return (
        f"`{rule.name}`",
        rule.failure,
        rule.signal,
        rule.unit,
        _window(rule),
        _limits(rule.warn, None if rule.raises else rule.act),
        _limits(rule.act if rule.raises else None),
        rule.remedy,
        rule.source,
    )


def _limits(*thresholds: float | None) -> str:
    return ", ".join(f"> {t:.3g}" for t in thresholds if t is not None) or "–"


def _window(rule: Rule) -> str:
    if rule.window == 1:
        return f"every {rule.look}"
    return f"{rule.needs} of {rule.window} {rule.look}s"
