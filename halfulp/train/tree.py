"""Strict conversion between nested dicts (TOML) and a tree of frozen dataclasses."""

import collections.abc
import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any

from halfulp.errors import ConfigError


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """`known` as a phrase that begins with the closest name: "did you mean 'lr'? known: …"."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}."


def build(kind: type, raw: Mapping[str, Any], where: str = "") -> Any:
    """`raw` as an instance of the dataclass `kind`.

    ConfigError for an unknown key, a missing one or a wrong type.
    """
    known = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    values = {}
    for key, value in raw.items():
        if key not in names:
            raise ConfigError(
                f"unknown key {key!r} in {_section(where)}. {nearest(str(key), names)}"
            )
        values[key] = _convert(value, known[key], f"{where}.{key}" if where else key)
    _check_complete(kind, values, where)
    return kind(**values)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with every leaf of `over` put on top, section by section.

    ConfigError where `base` has a value in the place of a section.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and key in merged:
            if not isinstance(old, Mapping):
                raise ConfigError(f"{key} must be a table, got {old!r}. Write it as [{key}].")
            value = merge(old, value)
        merged[key] = value
    return merged


def plain(value: Any) -> Any:
    """A dataclass tree as dicts, lists and scalars, in the order of the fields."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (tuple, list)) else value


def _check_complete(kind: type, values: Mapping[str, Any], where: str) -> None:
    for field in dataclasses.fields(kind):
        optional = (field.default, field.default_factory) != (dataclasses.MISSING,) * 2
        if field.name not in values and not optional:
            raise ConfigError(f"{_section(where)} has no {where}.{field.name}. Give it.")


def _section(where: str) -> str:
    return f"section [{where}]" if where else "the top level of the configuration"


def _convert(value: Any, kind: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a table, got {value!r}. Write it as [{where}].")
        return build(typing.cast(type, kind), value, where)
    if typing.get_origin(kind) is tuple:
        return _convert_tuple(value, typing.get_args(kind), where)
    if typing.get_origin(kind) is collections.abc.Mapping:
        if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
            raise ConfigError(f"{where} must be a table of strings, got {value!r}.")
        return dict(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ConfigError(
            f"{where} must be {_words(kind)}, got {value!r} ({type(value).__name__}). "
            f"Write {where} as {_words(kind)}."
        )
    if kind is int and not -(2**63) <= value < 2**63:
        raise ConfigError(f"{where} = {value} needs more than 64 bits. Give a smaller number.")
    return value


def _convert_tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if isinstance(value, str) and kinds[0] is str:
        value = [value]
    if not isinstance(value, (list, tuple)):
        raise ConfigError(f"{where} must be a list, got {value!r}. Write it in brackets.")
    if kinds[-1] is Ellipsis:
        return tuple(_convert(item, kinds[0], f"{where}[{i}]") for i, item in enumerate(value))
    if len(value) != len(kinds):
        raise ConfigError(f"{where} must be a list of {len(kinds)} values, got {len(value)}.")
    pairs = enumerate(zip(value, kinds, strict=True))
    return tuple(_convert(item, kind, f"{where}[{i}]") for i, (item, kind) in pairs)


def _words(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
    return names.get(kind, str(kind))
