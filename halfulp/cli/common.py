"""What commands share: outputs checked before any work, pairs of options, steps that are shown."""

import dataclasses
import math
import os
import shlex
import sys
import time
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from halfulp.errors import ConfigError

_COUNTS = {2: "two", 3: "three", 4: "four"}


def check_outputs(
    options: dict[str, Path | None], *, force: bool, inputs: Iterable[Path | str | None] = ()
) -> None:
    """Before any work: ConfigError for outputs that exist, coincide, or have no directory.

    What is read is not written, not even with `force`.
    """
    given = {name: path for name, path in options.items() if path is not None}
    if len(set(given.values())) < len(given):
        raise ConfigError(
            f"two of {', '.join(options)} name the same file. Give {_COUNTS[len(options)]} names."
        )
    read = {os.path.realpath(item) for item in inputs if item and os.path.exists(item)}
    for name, path in given.items():
        if os.path.realpath(path) in read:
            raise ConfigError(f"{path} is read by this command. Give another name for the output.")
        if path.exists() and not force:
            raise ConfigError(
                f"{path}, to be written by {name}, exists. Give {name} another name, or --force to "
                "replace it."
            )
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigError(
                f"{path} cannot be written: it must be a file in a directory that exists."
            )
        if not os.access(path.parent, os.W_OK):
            raise ConfigError(f"{path.parent} cannot be written to. Give another place.")


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """ "GLOB=VALUE" options as a dict; ConfigError for one without both."""
    found = {}
    for pair in given:
        glob, equals, rule = pair.partition("=")
        if not (equals and glob.strip() and rule.strip()):
            raise ConfigError(f"{option} {pair!r} is not understood. Write GLOB=VALUE.")
        found[glob.strip()] = rule.strip()
    return found


def words(option: str, text: str, example: str = "bf16,e4m3") -> list[str]:
    """The words between commas; ConfigError, with an example, where there are none."""
    found = [word.strip() for word in text.split(",") if word.strip()]
    if not found:
        raise ConfigError(f"{option} is empty. Give for example {example}.")
    return found


def plain(value: Any) -> Any:
    """`value` ready for JSON: dataclasses as dicts, numbers that JSON has no word for as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def command_line() -> str:
    """The command as it was typed."""
    return shlex.join(["halfulp", *sys.argv[1:]])


def quiet_transformers() -> None:
    """No warnings and no progress bars from transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


_SECONDS_BETWEEN_LINES = 10.0


class Steps:
    """What is being done at the moment: a spinner on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __enter__(self) -> "Steps":
        from halfulp.cli.show import is_live

        self.status = None
        if is_live():
            from rich.console import Console

            self.status = Console().status("reading")
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, what: str) -> None:
        """Show `what` until the next call."""
        if self.status is not None:
            self.status.update(what)
        else:
            print(f"… {what}", file=sys.stderr, flush=True)

    def count(self, what: str) -> None:
        """Show `what` where it can be replaced soon; elsewhere at most every ten seconds."""
        now = time.monotonic()
        if self.status is not None or now - self._said > _SECONDS_BETWEEN_LINES:
            self._said = now
            self.say(what)


def overrides_of(named: Mapping[str, Mapping[str, Any]], pairs: list[str]) -> dict[str, Any]:
    """Nested overrides from the named flags and from `section.key=value` pairs."""
    given = {
        section: {key: value for key, value in flags.items() if value is not None}
        for section, flags in named.items()
    }
    if len(given["policy"]) == 1:  # one of recipe and file replaces whichever the TOML file has
        given["policy"] = {"recipe": "", "file": ""} | given["policy"]
    for pair in pairs:
        path, equals, text = pair.partition("=")
        section, dot, key = path.strip().partition(".")
        if not (equals and dot and key):
            raise ConfigError(f"--set {pair!r} is not understood. Write section.key=value.")
        if named.get(section, {}).get(key) is not None:
            raise ConfigError(
                f"--set {pair!r} says again what an option of its own has said. Give one of them."
            )
        given.setdefault(section, {})[key] = _value(text.strip())
    return {section: flags for section, flags in given.items() if flags}


def _value(text: str) -> Any:
    """`text` read as a TOML value, or as a string where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
