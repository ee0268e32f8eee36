"""Plans: a format for every group, with the fewest bits that a budget of nats per token allows.

Prices add up (round-off spec 3.3), so that a plan is a knapsack: halfulp.knapsack solves it.
What may be chosen is narrowed first, by pins and by what the hardware multiplies; every exclusion
is kept with its reason. fp32 is the reference and costs nothing.
"""

import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from halfulp.blocks import BlockMap
from halfulp.check.groups import Group
from halfulp.check.hardware import load_hardware
from halfulp.check.plan_policy import policy_toml
from halfulp.errors import CheckError, ConfigError
from halfulp.formats import format_bits
from halfulp.knapsack import allocate
from halfulp.policy import Policy

EXACT = "fp32"
DEFAULT_PINS = {"head": "never below bf16", "logits": "never below bf16"}
_PIN = re.compile(r"(never below|exactly) +(\S+)|free")
_WORTH = 0.99  # a change is worth telling when it leaves at most this share of the whole KL
_ENOUGH = 0.1  # and enough when it leaves at most this share of its groups' price


@dataclass(frozen=True, kw_only=True)
class Excluded:
    """A format that a group ("*": every group) may not have, and why."""

    group: str
    format: str
    why: str


@dataclass(frozen=True, kw_only=True)
class WhatIf:
    """One change: all groups of `kind` that have fewer bits get `format`."""

    kind: str
    format: str
    before: tuple[str, ...]  # the formats they have, each once
    kl_before: float
    kl_after: float
    bits_before: float
    bits_after: float

    def __str__(self) -> str:
        return (
            f"{self.kind} in {self.format} instead of {', '.join(self.before)}: "
            f"KL {_short(self.kl_before)} → {_short(self.kl_after)} nats/token, "
            f"{self.bits_before:.2f} → {self.bits_after:.2f} bits"
        )


@dataclass(frozen=True, kw_only=True)
class LowestSafe:
    """The formats of fewest bits that keep a block within the budget.

    `alone`: while everything else is exact. `together`: if each block spends an equal share.
    """

    block: str
    alone: str
    together: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A format for every group, what it is predicted to cost, and what was ruled out."""

    formats: Mapping[str, str]  # group → word of halfulp.formats
    groups: tuple[Group, ...]
    budget: float  # nats per token
    predicted_kl: float
    average_bits: float  # scales of blocks included, weighted by the groups' sizes
    hardware: str
    excluded: tuple[Excluded, ...]
    what_if: tuple[WhatIf, ...]

    @property
    def fits(self) -> bool:
        """False when even the best formats that pins and hardware leave exceed the budget."""
        return self.predicted_kl <= self.budget * (1 + 1e-9)

    def to_toml(
        self,
        blocks: BlockMap,
        *,
        backward: str = "bf16",
        out: str = EXACT,
        rest: str = EXACT,
        name: str = "plan",
    ) -> str:
        """A policy file for `halfulp train --policy`: halfulp.check.plan_policy says how."""
        stored = next((g.name for g in self.groups if g.role == "stored"), None)
        if stored is not None:
            raise CheckError(
                f"this plan decides stored tensors ({stored}), and a policy decides the operands "
                "of GEMMs and tables. Plan gemm_groups(prices, blocks) for a policy."
            )
        return policy_toml(
            self.formats, blocks, backward=backward, out=out, rest=rest, name=name,
            roles={g.name: g.role for g in self.groups}, hardware=load_hardware(self.hardware),
        )  # fmt: skip

    def to_policy(self, blocks: BlockMap, **options: str) -> Policy:
        """The policy of `to_toml`, which takes the same options."""
        return Policy.from_table(tomllib.loads(self.to_toml(blocks, **options)))


def plan(
    groups: Sequence[Group],
    budget: float,
    *,
    formats: Sequence[str] | None = None,
    pins: Mapping[str, str] | None = None,
    hardware: str = "any",
    top: int = 5,
) -> Plan:
    """The formats of fewest average bits whose prices sum to at most `budget` nats per token.

    * `formats`: which of the priced ones to choose from; fp32 is always there.
    * `pins`: glob over names, blocks and kinds of groups → "never below FORMAT" (in bits),
      "exactly FORMAT" or "free". The first match decides, before DEFAULT_PINS.
    * `hardware`: a name of halfulp.check.hardware; both operands of a GEMM share a format, so that
      only formats it multiplies with themselves remain.
    * A price of NaN is unknown: such a format is excluded, never taken to be free.

    Raises ConfigError for a budget that is no positive number, a pin that matches nothing or does
    not parse, and a group that is left without any format.
    """
    _check_budget(budget)
    words = _words(groups, formats)
    allowed, excluded = _narrow(groups, words, pins or {}, hardware)
    sizes = np.array([g.size for g in groups], dtype=float)
    per_element = np.array([format_bits(w) for w in words])
    prices = np.array([[_price(g, w) for w in words] for g in groups]).reshape(-1, len(words))
    usable = np.array([[w in allowed[g.name] for w in words] for g in groups])
    prices = np.where(usable.reshape(prices.shape), prices, math.inf)
    chosen = allocate(sizes[:, None] * per_element, prices, budget)
    decided = {g.name: words[i] for g, i in zip(groups, chosen, strict=True)}
    return Plan(
        formats=decided,
        groups=tuple(groups),
        budget=budget,
        predicted_kl=predicted_kl(groups, decided),
        average_bits=average_bits(groups, decided),
        hardware=load_hardware(hardware).name,
        excluded=excluded,
        what_if=what_if(groups, decided, formats=words, top=top),
    )


def predicted_kl(groups: Sequence[Group], formats: Mapping[str, str]) -> float:
    """Nats per token of the groups in these formats; NaN when a price is unknown."""
    return math.fsum(_price(g, formats[g.name]) for g in groups)


def average_bits(groups: Sequence[Group], formats: Mapping[str, str]) -> float:
    """Bits per element, weighted by the groups' sizes."""
    total = math.fsum(g.size for g in groups)
    return math.fsum(g.size * format_bits(formats[g.name]) for g in groups) / (total or math.nan)


def what_if(
    groups: Sequence[Group],
    assigned: Mapping[str, str],
    *,
    formats: Sequence[str] | None = None,
    by: str = "kind",
    top: int = 5,
) -> tuple[WhatIf, ...]:
    """The single changes to `assigned` (group → format) that lower the predicted KL most.

    A change gives all groups of one `by` ("kind", "block" or "name") the format of fewest bits that
    takes away nine tenths of their price, or else the most. Changes worth less than 1 % are left
    out.
    """
    words = sorted(_words(groups, formats), key=format_bits)
    classes: dict[str, list[Group]] = {}
    for g in groups:
        classes.setdefault(getattr(g, by), []).append(g)
    total = predicted_kl(groups, assigned)
    found = [
        _change(key, members, assigned, words, total, average_bits(groups, assigned), groups)
        for key, members in classes.items()
    ]
    gains = [change for change in found if change and change.kl_after < _WORTH * change.kl_before]
    return tuple(sorted(gains, key=lambda change: change.kl_after)[:top])


def _change(
    kind: str,
    members: Sequence[Group],
    assigned: Mapping[str, str],
    words: Sequence[str],
    kl: float,
    bits: float,
    groups: Sequence[Group],
) -> WhatIf | None:
    price = math.fsum(_price(g, assigned[g.name]) for g in members)
    best = None
    for word in words:
        raised = {
            g.name: word
            for g in members
            if format_bits(word) > format_bits(assigned[g.name])
            and _price(g, word) < _price(g, assigned[g.name])
        }
        left = math.fsum(_price(g, raised.get(g.name, assigned[g.name])) for g in members)
        if raised and (best is None or left < best[0]):
            best = left, word, raised
        if best is not None and best[0] <= _ENOUGH * price:
            break
    if best is None:
        return None
    left, word, raised = best
    return WhatIf(
        kind=kind,
        format=word,
        before=tuple(dict.fromkeys(assigned[name] for name in raised)),
        kl_before=kl,
        kl_after=kl - price + left,
        bits_before=bits,
        bits_after=average_bits(groups, {**assigned, **raised}),
    )


def lowest_safe(
    groups: Sequence[Group],
    budget: float,
    *,
    formats: Sequence[str] | None = None,
    pins: Mapping[str, str] | None = None,
    hardware: str = "any",
    by: str = "block",
) -> tuple[LowestSafe, ...]:
    """The lowest safe format of every block, or kind or name of groups; arguments as in `plan`."""
    _check_budget(budget)
    words = sorted(_words(groups, formats), key=format_bits)
    allowed, _ = _narrow(groups, words, pins or {}, hardware)
    classes: dict[str, list[Group]] = {}
    for g in groups:
        classes.setdefault(getattr(g, by), []).append(g)

    def lowest(members: Sequence[Group], limit: float) -> str:
        fits = (
            word
            for word in words
            if all(word in allowed[g.name] for g in members)
            and math.fsum(_price(g, word) for g in members) <= limit
        )
        return next(fits, EXACT)

    return tuple(
        LowestSafe(
            block=key,
            alone=lowest(members, budget),
            together=lowest(members, budget / len(classes)),
        )
        for key, members in classes.items()
    )


def _short(value: float) -> str:
    """1.1e-4 for 0.000113."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if exponent else mantissa


def _check_budget(budget: float) -> None:
    if not (math.isfinite(budget) and budget > 0):
        raise ConfigError(
            f"budget = {budget} is no positive number of nats per token. Give for example 1e-3, "
            "which changes about 2 % of the most likely next tokens."
        )


def _price(group: Group, word: str) -> float:
    return 0.0 if word == EXACT else group.prices.get(word, math.nan)


def _words(groups: Sequence[Group], formats: Sequence[str] | None) -> list[str]:
    """The formats to choose from, fp32 among them."""
    priced = dict.fromkeys(word for g in groups for word in g.prices)
    if formats is not None:
        missing = [w for w in formats if w not in priced and w != EXACT]
        if missing:
            raise ConfigError(
                f"format {missing[0]!r} is not priced for any group; priced are "
                f"{', '.join(priced)}. Add it to the formats that are priced."
            )
    return list(dict.fromkeys([*(priced if formats is None else formats), EXACT]))


def _narrow(
    groups: Sequence[Group], words: Sequence[str], pins: Mapping[str, str], hardware: str
) -> tuple[dict[str, set[str]], tuple[Excluded, ...]]:
    """{group: formats it may have}, and why not the others."""
    machine, excluded = load_hardware(hardware), []
    refused = {word: machine.refuses(word) for word in words}
    excluded += [Excluded(group="*", format=w, why=why) for w, why in refused.items() if why]
    allowed: dict[str, set[str]] = {}
    parsed = _parse_pins(pins, groups)
    for g in groups:
        reasons = {word: _unusable(g, word) or _pinned(g, word, parsed) for word in words}
        excluded += [Excluded(group=g.name, format=w, why=why) for w, why in reasons.items() if why]
        allowed[g.name] = {w for w in words if not reasons[w] and not refused[w]}
        if not allowed[g.name]:
            told = "; ".join(f"{w}: {refused[w] or reasons[w]}" for w in words)
            raise ConfigError(f"no format is left for {g.name} ({told}). Loosen its pin.")
    return allowed, tuple(excluded)


def _unusable(group: Group, word: str) -> str:
    price = _price(group, word)
    if math.isnan(price):
        return "its price is unknown"
    return "it overflows" if math.isinf(price) else ""


def _parse_pins(
    pins: Mapping[str, str], groups: Sequence[Group]
) -> list[tuple[str, str, str | None]]:
    """(glob, pin as written, "never below" | "exactly" | None) with its format, users' first."""
    names = list(dict.fromkeys(n for g in groups for n in (g.block, g.kind, g.name)))
    result = []
    for glob, pin in {**pins, **{k: v for k, v in DEFAULT_PINS.items() if k not in pins}}.items():
        match = _PIN.fullmatch(pin)
        if match is None:
            raise ConfigError(
                f"pin {glob!r} = {pin!r} is not understood. Write 'never below bf16', "
                "'exactly bf16' or 'free'."
            )
        if match[2]:
            format_bits(match[2])
        if glob in pins and not any(fnmatchcase(n, glob) for n in names):
            near = difflib.get_close_matches(glob, names, n=3, cutoff=0.3) or names[:3]
            raise ConfigError(f"pin {glob!r} matches no group. Nearest names: {', '.join(near)}.")
        result.append((glob, match[1] or "", match[2]))
    return result


def _pinned(group: Group, word: str, pins: Sequence[tuple[str, str, str | None]]) -> str:
    """Why the first pin that matches the group forbids `word`; "" if it does not."""
    for glob, rule, floor in pins:
        if any(fnmatchcase(n, glob) for n in (group.name, group.block, group.kind)):
            if floor is None:
                return ""
            fine = word == floor if rule == "exactly" else format_bits(word) >= format_bits(floor)
            return "" if fine else f"pinned: {glob} {rule} {floor}"
    return ""
