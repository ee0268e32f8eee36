"""Strict JSON, where non-finite numbers are strings: "NaN", "Infinity", "-Infinity"."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfulp.errors import RunError

_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def parse(line: bytes) -> dict[str, Any] | None:
    """The object that `line` holds; None if it holds none."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    if not isinstance(value, dict):
        return None
    return _revive(value) if b'"NaN"' in line or b'Infinity"' in line else value


def _revive(value: Any) -> Any:
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, list):
        return [_revive(item) for item in value]
    return {k: _revive(v) for k, v in value.items()} if isinstance(value, dict) else value


def dumps(value: Any, indent: int | None = None) -> str:
    """`value` as JSON; RunError for what JSON cannot spell."""
    try:
        return json.dumps(value, allow_nan=False, default=_plain, indent=indent)
    except ValueError:
        return json.dumps(_spell(value), allow_nan=False, indent=indent)


def _spell(value: Any) -> Any:
    """`value` with every non-finite float as its name."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(k): _spell(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_spell(item) for item in value]
    return value if value is None or isinstance(value, (str, int, float)) else _spell(_plain(value))


def _plain(value: Any) -> Any:
    """A path as text, and a scalar of numpy or torch as a Python number."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        return value.item()
    raise RunError(
        f"an event holds {value!r} ({type(value).__name__}), which JSON cannot spell. "
        "Write numbers, strings, lists and dicts."
    )


def with_nulls(value: Any) -> Any:
    """`value` with None for every number that JSON does not have; tuples become lists."""
    if isinstance(value, Mapping):
        return {str(key): with_nulls(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_nulls(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_whole(path: Path, text: str) -> None:
    """Replace `path` in one step: a reader sees the old text or the new one, never a part."""
    waiting = path.with_name(f"{path.name}.part")
    with open(waiting, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    waiting.replace(path)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Replace `path` by `value`, as `write_whole`."""
    write_whole(path, dumps(value, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, or {} if there is no such file; RunError for anything else."""
    if not path.exists():
        return {}
    value = parse(path.read_bytes())
    if value is None:
        raise RunError(f"{path} is not a JSON object. Restore it, or delete it to go without it.")
    return value
