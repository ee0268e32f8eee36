"""What `halfulp corpus` found in a corpus, as a plan needs it."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfulp.errors import PlanError


@dataclass(frozen=True, kw_only=True)
class Order:
    """Distinct n-symbol sequences; `curve` holds (symbols read, distinct sequences)."""

    n: int
    unit: str
    unique: float
    exponent: float | None  # local exponent d ln U / d ln T at the end
    doubling: float | None  # how much more corpus doubles U
    curve: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Symbols of a corpus, those in documents not seen before, and sequences of every order."""

    file: str
    tokenizer: str
    symbols: float
    unique_symbols: float
    orders: tuple[Order, ...]


def read_facts(path: Path) -> Facts:
    """The facts in a file of `halfulp corpus stats` or `halfulp corpus growth`.

    Raises PlanError for a file that cannot be read, is none of theirs, or counted nothing.
    """
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        facts = _facts(table, path.name)
    except OSError as error:
        raise PlanError(f"--corpus {path} cannot be read: {error.strerror}. {_CURE}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PlanError(
            f"--corpus {path} holds no statistics of a corpus ({error!r} is missing or wrong). "
            f"{_CURE}"
        ) from error
    if not facts.symbols > 0:
        raise PlanError(f"--corpus {path} counted no symbol: the corpus was empty. {_CURE}")
    return facts


_CURE = "Write it with `halfulp corpus stats PATH --json stats.json`."


def _facts(table: Mapping[str, Any], file: str) -> Facts:
    symbols = float(table["symbols"])
    repeated = table.get("duplicate_tokens_share") or 0.0
    return Facts(
        file=file,
        tokenizer=str(table["tokenizer"]),
        symbols=symbols,
        unique_symbols=symbols * (1 - float(repeated)),
        orders=tuple(_order(entry) for entry in table["orders"]),
    )


def _order(entry: Mapping[str, Any]) -> Order:
    curve = entry.get("curve") or ()
    return Order(
        n=int(entry["n"]),
        unit=str(entry["unit"]).rstrip("s"),
        unique=float(entry["unique"]),
        exponent=_number(entry.get("exponent")),
        doubling=_number(entry.get("doubling")),
        curve=tuple((float(t), float(u)) for t, u in curve),
    )


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
