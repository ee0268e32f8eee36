"""Reading recipes: the shipped TOML files of halfulp/recipes, inheritance, and a strict schema."""

import difflib
import re
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from halfulp.errors import FormatError, PolicyError
from halfulp.numerics.quantizer import Quantizer, check_stored, parse_quantizer
from halfulp.recipe import (
    ACCUMULATES,
    OPERANDS,
    OUTPUTS,
    QUANTIZERS,
    ROLES,
    SPEC_KEYS,
    GemmSpec,
    Keep,
    LossScale,
    Recipe,
)

FAMILY = "mask_eXmY"
"""The name of a family: any format, `mask_e5m7`, and optionally its rounding, `_nearest`."""

_MASK = re.compile(r"mask_(e\d+m\d+)(?:_(nearest|stochastic|truncate))?")
_ACCUMULATE = re.compile(r"fp32|fast|split|promote\([1-9]\d*\)")
# What one key of a role's table stands for.
_SHORTHANDS = {
    "operands": OPERANDS,
    "fprop": OPERANDS[0:2],
    "dgrad": OPERANDS[2:4],
    "wgrad": OPERANDS[4:6],
    "out": OUTPUTS,
    "accumulate": ACCUMULATES,
}
_REQUIRED = (
    "summary", "source", "high", *ROLES, *QUANTIZERS, "update_rounding", "expand_moments",
)  # fmt: skip
_TOP_KEYS = (*_REQUIRED, "extends", "master", "loss_scale", "keep", "not_simulated")


def recipe_names() -> list[str]:
    """The shipped recipes, sorted; beside them `load_recipe` knows the family `mask_eXmY`."""
    names = (f.name.removesuffix(".toml") for f in _folder().iterdir() if f.name.endswith(".toml"))
    return sorted(name for name in names if name != FAMILY)


def is_shipped(name: str) -> bool:
    """Whether `load_recipe` knows the name."""
    return name in recipe_names() or _MASK.fullmatch(name) is not None


@cache
def load_recipe(name: str) -> Recipe:
    """The shipped recipe `name`, or a member of the family `mask_eXmY[_ROUNDING]`.

    Raises PolicyError naming the nearest recipes.
    """
    return build_recipe(name, shipped_table(name), shipped_table)


def build_recipe(
    name: str, table: Mapping[str, Any], find: Callable[[str], Mapping[str, Any]]
) -> Recipe:
    """The recipe that `table` spells; `find` gives the table of a recipe it extends.

    Raises PolicyError for unknown or missing keys, values that do not parse, and circles of
    `extends`.
    """
    merged = _inherit(name, table, find, (name,))
    where = f"recipe {name!r}"
    check_keys(merged, _TOP_KEYS, where)
    missing = [key for key in _REQUIRED if key not in merged]
    if missing:
        raise PolicyError(
            f"{where} does not decide {', '.join(missing)}. Add these keys, or extends = "
            '"NAME of a recipe" to inherit them.'
        )
    high = _choice(merged["high"], ("fp32", "bf16", "fp16"), f"{where}, high")
    quantizers = {key: _stored(merged[key], key, high, where) for key in QUANTIZERS}
    rounding = _choice(
        merged["update_rounding"], ("nearest", "stochastic"), f"{where}, update_rounding"
    )
    master = merged.get("master", "none")
    return Recipe(
        name=name,
        summary=typed(merged["summary"], str, f"{where}, summary"),
        source=typed(merged["source"], str, f"{where}, source"),
        high=high,
        gemms=_gemms(merged, high, where),
        **quantizers,
        update_rounding=rounding,
        master=None if master == "none" else _stored(master, "master", high, where),
        expand_moments=typed(merged["expand_moments"], bool, f"{where}, expand_moments"),
        loss_scale=_loss_scale(merged.get("loss_scale", "none"), f"{where}, loss_scale"),
        keep=_keep(merged.get("keep", []), f"{where}, keep"),
        not_simulated=tuple(
            typed(sentence, str, f"{where}, not_simulated")
            for sentence in typed(merged.get("not_simulated", []), list, f"{where}, not_simulated")
        ),
    )


def nearest(name: str, valid: Collection[str], otherwise: Collection[str] = ()) -> str:
    """The valid names closest to `name`, for an error message; `otherwise` if none is close.

    Without `otherwise` it is all that are valid.
    """
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.4)
    return ", ".join(near or sorted(otherwise or valid))


def _folder() -> Traversable:
    return resources.files("halfulp") / "recipes"


@cache
def shipped_table(name: str) -> Mapping[str, Any]:
    """The TOML table of a shipped recipe or of a member of the family; else PolicyError."""
    mask = _MASK.fullmatch(name)
    file = _folder() / f"{FAMILY if mask else name}.toml"
    # A file system may ignore case; names of recipes do not.
    if not is_shipped(name):
        raise PolicyError(
            f"no recipe is called {name!r}. Nearest names: {nearest(name, recipe_names())}. "
            f"`halfulp recipes` lists them; {FAMILY} is a family, for example mask_e5m7 or "
            "mask_e8m3_nearest."
        )
    text = file.read_text(encoding="utf-8")
    if mask:
        text = text.replace("eXmY", mask[1]).replace("ROUNDING", mask[2] or "truncate")
    return tomllib.loads(text)


def _inherit(
    name: str,
    table: Mapping[str, Any],
    find: Callable[[str], Mapping[str, Any]],
    path: tuple[str, ...],
) -> dict[str, Any]:
    """`table` over what it extends: role tables merge key by key, all else replaces."""
    own = {key: value for key, value in table.items() if key != "extends"}
    for role in ROLES:
        if isinstance(own.get(role), Mapping):
            own[role] = _expand(own[role], f"recipe {name!r}, {role}")
    if "extends" not in table:
        return own
    base_name = typed(table["extends"], str, f"recipe {name!r}, extends")
    if base_name in path:
        raise PolicyError(
            f"recipe {name!r} extends itself: {' → '.join([*path, base_name])}. "
            "Let one of them extend a shipped recipe."
        )
    base = _inherit(base_name, find(base_name), find, (*path, base_name))
    merged = base | own
    merged.setdefault("summary", "")
    if "summary" not in own:
        changed = ", ".join(own) or "nothing"
        merged["summary"] = f"{base_name} with other {changed}"
    for role in ROLES:
        mine, theirs = own.get(role), base.get(role)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping) and "like" not in mine:
            merged[role] = {**theirs, **mine}
        elif isinstance(mine, Mapping) and isinstance(theirs, str) and "like" not in mine:
            merged[role] = {"like": theirs, **mine}
    return merged


def _expand(table: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The role table with its shorthands spelled out; a specific key beats a shorthand."""
    check_keys(table, ("like", *SPEC_KEYS, *_SHORTHANDS), where)
    full = {key: table[key] for key in ("like",) if key in table}
    for short in ("operands", *(s for s in _SHORTHANDS if s != "operands")):
        if short in table:
            full |= dict.fromkeys(_SHORTHANDS[short], table[short])
    return full | {key: table[key] for key in SPEC_KEYS if key in table}


def _gemms(merged: Mapping[str, Any], high: str, where: str) -> dict[str, GemmSpec]:
    plain: dict[str, str] = {key: "fp32" if key in ACCUMULATES else high for key in SPEC_KEYS}
    bases: dict[str, Mapping[str, Any]] = {"high": plain}
    for role in ROLES:
        here = f"{where}, {role}"
        value = merged[role]
        likes = ("high",) if role == "linear" else ("high", "linear")
        if isinstance(value, Mapping):
            base = {}
            if "like" in value:
                base = bases[_choice(value["like"], likes, f"{here}.like")]
            table = {**base, **{key: v for key, v in value.items() if key != "like"}}
        else:
            table = bases[_choice(value, likes, here)]
        missing = [key for key in SPEC_KEYS if key not in table]
        if missing:
            raise PolicyError(
                f'{here} does not decide {", ".join(missing)}. Add them, or like = "high".'
            )
        bases[role] = table
    return {role: _spec(bases[role], high, f"{where}, {role}") for role in ROLES}


def _spec(table: Mapping[str, Any], high: str, where: str) -> GemmSpec:
    values: dict[str, Any] = {}
    for key in SPEC_KEYS:
        here = f"{where}.{key}"
        if key in ACCUMULATES:
            values[key] = typed(table[key], str, here)
            if not _ACCUMULATE.fullmatch(values[key]):
                raise PolicyError(
                    f"{here} = {values[key]!r} is no way to accumulate. "
                    "Give fp32, fast, split or promote(N)."
                )
        else:
            values[key] = _quantizer(table[key], high, here)
        if key in OUTPUTS:
            _check_stored(values[key], "result", here)
    spec = GemmSpec(**values)
    for one, other in zip(OPERANDS[::2], OPERANDS[1::2], strict=True):
        if getattr(spec, one).hadamard != getattr(spec, other).hadamard:
            raise PolicyError(
                f"{where}: {one} = {getattr(spec, one)} and {other} = {getattr(spec, other)}. A "
                "transform cancels only where both operands have the same: give both the word "
                "hadamard(N), or neither."
            )
    return spec


def _loss_scale(value: Any, where: str) -> LossScale | None:
    if value == "none":
        return None
    keys = tuple(field.name for field in fields(LossScale))
    table = complete(value, keys, where)
    numbers = {
        key: float(typed(table[key], (int, float), f"{where}.{key}"))
        for key in ("init", "growth", "backoff")
    }
    interval = typed(table["interval"], int, f"{where}.interval")
    sensible = numbers["init"] > 0 and numbers["growth"] > 1 > numbers["backoff"] > 0
    if not sensible or interval < 1:
        raise PolicyError(f"{where}: needs init > 0, growth > 1, 0 < backoff < 1, interval >= 1.")
    return LossScale(
        init=numbers["init"],
        growth=numbers["growth"],
        interval=interval,
        backoff=numbers["backoff"],
    )


def _keep(value: Any, where: str) -> tuple[Keep, ...]:
    result = []
    for entry in typed(value, list, where):
        table = complete(entry, ("first", "last", "recipe"), where)
        first, last = (typed(table[key], int, f"{where}.{key}") for key in ("first", "last"))
        if first < 0 or last < 0 or first + last == 0:
            raise PolicyError(
                f"{where}: first = {first}, last = {last} names no layer. Give numbers of layers "
                ">= 0, not both 0, or keep = []."
            )
        name = typed(table["recipe"], str, f"{where}.recipe")
        result.append(Keep(first=first, last=last, recipe=name))
    return tuple(result)


def complete(value: Any, keys: Collection[str], where: str) -> Mapping[str, Any]:
    """`value` if it is a table with exactly these keys, else PolicyError."""
    table = typed(value, dict, where)
    check_keys(table, keys, where)
    if missing := [key for key in keys if key not in table]:
        raise PolicyError(f"{where} lacks {', '.join(missing)}. It needs {', '.join(keys)}.")
    return table


def _quantizer(value: Any, high: str, where: str) -> Quantizer:
    text = typed(value, str, where)
    try:
        return parse_quantizer(high if text == "high" else text)
    except FormatError as error:
        raise PolicyError(f"{where}: {error}") from error


def _stored(value: Any, key: str, high: str, where: str) -> Quantizer:
    q = _quantizer(value, high, f"{where}, {key}")
    _check_stored(q, key, f"{where}, {key}")
    return q


_REFUSED = {
    **dict.fromkeys(("weight", "master"), (("stochastic", "truncate"), "Give update_rounding.")),
    "result": (("stochastic",), "Results of GEMMs are rounded to nearest or truncated."),
}


def _check_stored(q: Quantizer, what: str, where: str) -> None:
    refused, cure = _REFUSED.get(what, ((), ""))
    try:
        check_stored(q, what, refused=refused, cure=cure)
    except FormatError as error:
        raise PolicyError(f"{where}: {error}") from error


def check_keys(table: Mapping[str, Any], valid: Collection[str], where: str) -> None:
    """PolicyError for a key that is not valid, naming the nearest ones."""
    for key in table:
        if key not in valid:
            raise PolicyError(
                f"{where} has no key {key!r}. Nearest valid keys: {nearest(key, valid)}."
            )


def _choice(value: Any, valid: Collection[str], where: str) -> str:
    if value not in valid:
        raise PolicyError(f"{where} = {value!r}. Give one of: {', '.join(valid)}, or a table.")
    return value


def typed(value: Any, kind: Any, where: str) -> Any:
    """`value` if it is a `kind` (bool is no number), else PolicyError."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        wanted = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise PolicyError(f"{where} = {value!r} is {type(value).__name__}; give {wanted}.")
    return value
