"""Nested dicts as TOML text; `tomllib` reads it back."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from halfulp.errors import ConfigError

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def dumps(table: Mapping[str, Any]) -> str:
    """`table` as a TOML document with one [section] per nested dict, in the order given.

    None has no spelling in TOML: a key whose value is None is left out.
    ConfigError for a value that is no string, bool, number, list or dict.
    """
    return _table(table, "").lstrip("\n")


def _table(table: Mapping[str, Any], where: str) -> str:
    present = {key: value for key, value in table.items() if value is not None}
    sections = {key: value for key, value in present.items() if isinstance(value, Mapping)}
    lines = [
        f"{_key(key)} = {_value(value, f'{where}{key}')}\n"
        for key, value in present.items()
        if key not in sections
    ]
    for key, value in sections.items():
        name = f"{where}{_key(key)}"
        lines.append(f"\n[{name}]\n{_table(value, f'{name}.')}")
    return "".join(lines)


def _key(key: object) -> str:
    text = str(key)
    return text if _BARE.fullmatch(text) else _string(text)


def _value(value: Any, where: str) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        # TOML spells the special values nan and inf, as Python does.
        return repr(float(value)) if math.isfinite(value) else str(float(value))
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_value(item, where) for item in value)}]"
    if isinstance(value, Mapping):
        pairs = (
            f"{_key(k)} = {_value(v, f'{where}.{k}')}" for k, v in value.items() if v is not None
        )
        return f"{{{', '.join(pairs)}}}"
    raise ConfigError(
        f"{where} = {value!r} ({type(value).__name__}) has no spelling in TOML. "
        "Give a string, bool, number, list or dict."
    )


def _string(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{text!r} is not valid Unicode, which TOML needs. Rename the file, or give a path "
            "of other characters."
        ) from error
    # A TOML basic string escapes as JSON does, and DEL as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
