"""`--assume NAME=VALUE` of `halfulp report SWEEP`: what a bill rests on beside its options.

They are fields of halfulp.sweep.inputs.Inputs; `extra_tokens` has one per recipe, `guard` those of
halfulp.sweep.cost.Guard.
"""

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from halfulp.errors import ConfigError

PLAIN = ("prior_octaves", "proxy_fraction", "search_seeds", "success_prior", "adoption_usd")
NEEDED = ("spikes_per_hour", "rollback_hours")  # of a guard


def assumptions(given: Sequence[str]) -> dict[str, Any]:
    """Fields of Inputs; ConfigError for a name or a value that is not understood."""
    from halfulp.sweep.cost import Guard

    found: dict[str, Any] = {}
    guard: dict[str, float] = {}
    for pair in given:
        name, value = _read(pair)
        section, _, key = name.partition(".")
        if name in PLAIN:
            _put(found, name, _plain(name, value, pair))
        elif section == "extra_tokens" and key:
            _put(found.setdefault(section, {}), key, _number(value, pair))
        elif section == "guard" and key in {f.name for f in fields(Guard)}:
            _put(guard, key, _number(value, pair))
        else:
            raise _unknown(name, [f.name for f in fields(Guard)])
    missing = [f"guard.{key}" for key in NEEDED if guard and key not in guard]
    if missing:
        raise ConfigError(f"--assume guard.… is not complete: give {' and '.join(missing)} too.")
    return found | ({"guard": Guard(**guard)} if guard else {})


def _read(pair: str) -> tuple[str, Any]:
    name, equals, text = pair.partition("=")
    try:
        return name.strip(), tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError as error:
        example = "proxy_fraction=0.02" if equals else "NAME=VALUE, such as proxy_fraction=0.02"
        raise ConfigError(f"--assume {pair!r} is not understood. Write {example}.") from error


def _put(section: dict[str, Any], name: str, value: Any) -> None:
    if name in section:
        raise ConfigError(f"--assume {name} is given twice. Give it once.")
    section[name] = value


def _plain(name: str, value: Any, pair: str) -> Any:
    if name == "success_prior":
        if not isinstance(value, list) or len(value) != 2:
            raise ConfigError(
                f"--assume {pair!r}: the prior of the success probability is a Beta distribution, "
                "with two numbers: success_prior=[0.5,0.5]."
            )
        return _number(value[0], pair), _number(value[1], pair)
    if name == "search_seeds" and not (isinstance(value, int) and not isinstance(value, bool)):
        raise ConfigError(f"--assume {pair!r}: seeds are counted. Give an integer.")
    return _number(value, pair)


def _number(value: Any, pair: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"--assume {pair!r} has no number. Write for example proxy_fraction=0.02."
        )
    return value


def _unknown(name: str, of_guard: Sequence[str]) -> ConfigError:
    known = [*PLAIN, "extra_tokens.RECIPE", *(f"guard.{key}" for key in of_guard)]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known
    return ConfigError(
        f"--assume {name!r} is no figure of the bill. Nearest: {', '.join(near)}. "
        "docs/sweep_cost.md explains them."
    )
