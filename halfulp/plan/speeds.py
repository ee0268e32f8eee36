"""Step times of one's own: `fp8=1.35,nvfp4=1.6`, or a JSON file."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfulp.errors import PlanError
from halfulp.plan.precisions import precision_of
from halfulp.plan.said import said
from halfulp.speedups import Speed


def read_speeds(text: str) -> dict[str, Speed]:
    """Precision -> measured speed over BF16, from "fp8=1.35,…" or the path of a JSON file.

    The file holds an object: precision -> ratio, or {"ratio", "low", "high", "source"}. Step times
    of simulated formats are no speeds: they tell what simulating costs.
    Raises PlanError for what is no ratio, and for a speed of BF16 other than 1.
    """
    table, source = (
        (_read(Path(text)), text) if text.endswith(".json") else (_pairs(text), said("yours"))
    )
    found = {name: _entry(name, value, source) for name, value in table.items()}
    if "bf16" in found and found.pop("bf16").ratio != 1:
        raise PlanError(f"bf16={table['bf16']} is impossible: ratios are over BF16, which is 1.")
    return found


def _pairs(text: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, _, ratio = (part.strip() for part in pair.partition("="))
        if name in found:
            raise PlanError(f"--speed {text!r} gives {name} twice. Give it once.")
        try:
            found[name] = float(ratio)
        except ValueError as error:
            raise PlanError(
                f"--speed {pair!r} is not understood. Write fp8=1.35,nvfp4=1.6 or give a .json."
            ) from error
    return found


def _read(path: Path) -> Mapping[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(table, dict):
            raise ValueError("it holds no object")
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--speed {path} cannot be read: {error}. Give a JSON object such as "
            '{"fp8": {"ratio": 1.3, "low": 1.2, "high": 1.4, "source": "where"}}.'
        ) from error
    return table


def _entry(name: str, value: Any, source: str) -> Speed:
    precision_of(name)
    entry = value if isinstance(value, Mapping) else {"ratio": value}
    try:
        ratio = float(entry["ratio"])
        low, high = float(entry.get("low", ratio)), float(entry.get("high", ratio))
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(
            f"the speed of {name} is {value!r}, which is no number. Write {name}=1.3."
        ) from error
    if not (0 < low <= ratio <= high < math.inf):
        raise PlanError(
            f"the speed of {name} is {ratio:g} ({low:g} to {high:g}): give a positive ratio "
            "inside its range, the step time in BF16 over that in the format."
        )
    source = entry.get("source", source)
    source = source if isinstance(source, str) else str(source)
    return Speed(ratio=ratio, low=low, high=high, source=source, measured=True)
