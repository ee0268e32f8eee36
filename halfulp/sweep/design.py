"""The design of a sweep: recipe × learning rate × seed × data set, each run paired by its seed."""

import dataclasses
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfulp.errors import ConfigError
from halfulp.policy import Policy
from halfulp.train.config import DataSection, PolicySection, Stage, TrainConfig, load_config


@dataclass(frozen=True)
class Cell:
    """One point of the grid: one run."""

    recipe: str
    lr: float
    seed: int
    data: str

    @property
    def id(self) -> str:
        """The name of the run's directory."""
        return f"{slug(self.recipe)}-lr{self.lr:.3e}-seed{self.seed}-{slug(self.data)}"


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a sweep runs. Equal designs give equal runs.

    * `recipes`: names of recipes, policy files (*.toml), or stages: "bf16_amp:0.2+te_current"
      computes the first fifth of the run in bf16_amp. `policies` holds the files, name → text.
    * `reference` is the recipe that the others are paired with: a seed decides weights, data order
      and rounding, whatever the recipe.
    * `data`: name → sources. One name and no sources: the configuration's own.
    """

    config: TrainConfig
    recipes: tuple[str, ...]
    reference: str
    lrs: tuple[float, ...]
    seeds: tuple[int, ...]
    data: Mapping[str, tuple[str, ...]]
    policies: Mapping[str, str] = field(default_factory=dict)

    def cells(self) -> tuple[Cell, ...]:
        """All runs: data set by data set, seed by seed, rate by rate, the reference first."""
        first = [self.reference, *(r for r in self.recipes if r != self.reference)]
        return tuple(
            Cell(recipe, lr, seed, data)
            for data in self.data
            for seed in self.seeds
            for lr in self.lrs
            for recipe in first
        )

    def config_of(self, cell: Cell, out: Path, policies: Path) -> TrainConfig:
        """The configuration of one run, written to `out`; its policy files lie in `policies`."""
        base = self.config
        return replace(
            base,
            data=self.data_of(cell.data),
            train=replace(base.train, lr=cell.lr, seed=cell.seed),
            policy=policy_of(cell.recipe, base.policy, policies),
            run=replace(base.run, out=str(out)),
        )

    def data_of(self, name: str) -> DataSection:
        """The section [data] of the runs on one data set."""
        own = self.config.data
        return replace(own, source=self.data[name]) if self.data[name] else own

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for TOML."""
        return {
            "sweep": {
                "recipes": list(self.recipes),
                "reference": self.reference,
                "lrs": list(self.lrs),
                "seeds": list(self.seeds),
                "data": {name: list(sources) for name, sources in self.data.items()},
                "policies": dict(self.policies),
            },
            "base": self.config.to_dict(),
        }

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "Design":
        """The inverse of `to_dict`; ConfigError where something is missing or wrong."""
        try:
            section = value["sweep"]
            design = cls(
                config=load_config(value["base"]),
                recipes=tuple(section["recipes"]),
                reference=section["reference"],
                lrs=tuple(section["lrs"]),
                seeds=tuple(section["seeds"]),
                data={name: tuple(sources) for name, sources in section["data"].items()},
                policies=dict(section["policies"]),
            )
            _check(design)
            return design
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"this is not the config.toml of a sweep ({type(error).__name__}: {error}). "
                "Restore it, or start the sweep in another directory."
            ) from error

    def digest(self) -> str:
        """sha256 of everything that decides the runs."""
        content = self.to_dict()
        content["base"].pop("run")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_design(
    config: TrainConfig,
    *,
    recipes: Sequence[str],
    lrs: Sequence[float],
    seeds: int | Sequence[int] = 3,
    reference: str = "",
    data: Mapping[str, Sequence[str]] | None = None,
    guard: bool = False,
) -> Design:
    """A design that can answer; ConfigError for one that cannot, and for an unknown recipe.

    `seeds` is how many, from train.seed on, or which. The reference is the first recipe unless
    named. The guard is off unless asked for: it would make the recipes alike.
    """
    first = config.train.seed
    chosen = tuple(range(first, first + seeds)) if isinstance(seeds, int) else tuple(seeds)
    policies: dict[str, str] = {}
    labels = tuple(_label(recipe, policies) for recipe in recipes)
    design = Design(
        config=_prepared(config, guard),
        recipes=labels,
        reference=_label(reference, policies) if reference else (labels[0] if labels else ""),
        lrs=tuple(sorted(float(lr) for lr in lrs)),
        seeds=chosen,
        data={name: tuple(map(_source, s)) for name, s in (data or {_name(config): ()}).items()},
        policies=policies,
    )
    _check(design)
    return design


def policy_of(recipe: str, base: PolicySection, policies: Path) -> PolicySection:
    """The precision that a recipe of a sweep stands for: a name, a policy file, or stages."""
    *stages, (last, _) = _stages(recipe)
    schedule = [Stage(until=until, **_source_of(name, policies)) for name, until in stages]
    return replace(base, **_source_of(last, policies), schedule=tuple(schedule))


def slug(text: str) -> str:
    """`text` as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9_.+]+", "-", Path(text).stem if text.endswith(".toml") else text)


def _prepared(config: TrainConfig, guard: bool) -> TrainConfig:
    # A run's bits must not depend on who else is running, or on which worker it meets.
    threads = config.train.threads or 1
    device = _device(config.train.device)
    return dataclasses.replace(
        config,
        train=replace(config.train, threads=threads, device=device, lr=1.0, seed=0),
        policy=replace(config.policy, recipe="", file="", schedule=()),
        guard=replace(config.guard, on=True) if guard else type(config.guard)(on=False),
        run=replace(config.run, out=""),
    )


def _device(asked: str) -> str:
    import torch

    return asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _check(design: Design) -> None:
    from halfulp.train.config import check

    _enough(design)
    if design.reference not in design.recipes:
        raise ConfigError(
            f"the reference {design.reference!r} is none of the recipes "
            f"{', '.join(design.recipes)}. Every gap is against the reference: add it to them."
        )
    for lr in design.lrs:
        if not (math.isfinite(lr) and lr > 0):
            raise ConfigError(f"the learning rate {lr:g} cannot be used. Give rates above 0.")
    for seed in design.seeds:
        if not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ConfigError(f"the seed {seed!r} cannot be used. Give integers from 0 to 2⁶³ − 1.")
    for recipe in design.recipes:
        check(replace(design.config, policy=policy_of(recipe, design.config.policy, Path())))
    names = [*design.recipes, *(cell.id for cell in design.cells())]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"two runs of the grid are the same or would share the name {twice[0]}. Give every "
            "recipe, learning rate and seed once, and data sets names that differ in ASCII letters."
        )
    _check_data(design.data)


def _check_data(data: Mapping[str, tuple[str, ...]]) -> None:
    seen: dict[tuple[str, ...], str] = {}
    for name, sources in data.items():
        if (other := seen.setdefault(sources, name)) != name:
            raise ConfigError(
                f"the data set {name!r} has the same sources as {other!r}. Give it its own."
            )


def _enough(design: Design) -> None:
    for what, found, why in (
        ("recipe", design.recipes, "one is the reference, and nothing would be compared with it"),
        ("learning rate", design.lrs, "a window has two ends: give for example 1e-4:1e-1:7"),
        ("seed", design.seeds, "one run cannot tell chance from precision: give 3 or more"),
    ):
        if len(set(found)) < 2:
            given = ", ".join(str(x) for x in found) or "none"
            raise ConfigError(f"a sweep needs two {what}s or more, and has {given}: {why}.")


def _name(config: TrainConfig) -> str:
    return slug(Path(config.data.source[0]).name) if config.data.source else "data"


def _source(source: str) -> str:
    return source if source == "stdlib" else str(Path(source).absolute())


def _stages(recipe: str) -> list[tuple[str, float]]:
    """(recipe or policy file, share of the run at which it ends), the last at 1."""
    *early, last = recipe.split("+")
    found = []
    for stage in early:
        name, _, until = stage.rpartition(":")
        try:
            found.append((name, float(until)))
        except ValueError:
            raise ConfigError(
                f"the stage {stage!r} of {recipe!r} does not say where it ends. Write "
                "RECIPE:SHARE+RECIPE, such as bf16_amp:0.2+te_current."
            ) from None
    return [*found, (last, 1.0)]


def _label(recipe: str, policies: dict[str, str]) -> str:
    """`recipe` with its policy files by name only; their text goes to `policies`."""
    parts = []
    for name, until in _stages(recipe):
        label = Path(name).name if name.endswith(".toml") else name
        if name.endswith(".toml"):
            text = Policy.load(name).to_toml()
            if policies.setdefault(label, text) != text:
                raise ConfigError(f"two policy files are called {label}. Rename one of them.")
        else:
            Policy.from_recipe(name)
        parts.append(label if until == 1 else f"{label}:{until:g}")
    return "+".join(parts)


def _source_of(name: str, policies: Path) -> dict[str, str]:
    file = name.endswith(".toml")
    return {"recipe": "" if file else name, "file": str(policies / name) if file else ""}
