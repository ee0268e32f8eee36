"""Policies: ordered rules *block pattern → recipe*, and what they decide for one model."""

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import translate
from pathlib import Path
from typing import Any, NamedTuple

from halfulp.block_names import block_type, globbed, layer_of
from halfulp.blocks import BlockMap, Gemm
from halfulp.errors import PolicyError
from halfulp.numerics.quantizer import Quantizer
from halfulp.recipe import (
    ROLES,
    GemmSpec,
    Keep,
    LossScale,
    Recipe,
    RecipeRow,
    recipe_table,
    recipe_to_table,
)
from halfulp.recipe_reader import (
    FAMILY,
    build_recipe,
    check_keys,
    complete,
    is_shipped,
    load_recipe,
    nearest,
    recipe_names,
    shipped_table,
    typed,
)
from halfulp.toml import dumps

__all__ = [
    "FAMILY",
    "ROLES",
    "Decision",
    "GemmSpec",
    "Keep",
    "LossScale",
    "Policy",
    "Recipe",
    "RecipeRow",
    "Resolution",
    "Rule",
    "load_recipe",
    "recipe_names",
    "recipe_table",
    "refuse_partial",
]


@dataclass(frozen=True)
class Rule:
    """A glob over GEMM names and block names, and the recipe of what it matches."""

    match: str
    recipe: Recipe
    layers: tuple[int, ...] = ()  # only in these layers; () everywhere. Set by a recipe's keep

    def __str__(self) -> str:
        where = f" in layers {', '.join(map(str, self.layers))}" if self.layers else ""
        return f"{self.match!r}{where} → {self.recipe.name}"


class Decision(NamedTuple):
    """The recipe of one GEMM, the part of it for the GEMM's role, and which rule decided."""

    gemm: Gemm
    recipe: Recipe
    spec: GemmSpec
    rule: int  # index into Resolution.rules


@dataclass(frozen=True)
class Resolution:
    """What a policy decides for one model.

    `rules` are those of the policy with every `keep` spelled out as a rule of its own.
    `parameters` and `blocks` map every parameter to its recipe and its block; `embeds` and `norms`
    map modules to the quantizer of their table or affine parameters. `unquantized` names what hints
    left out: no recipe rounds its products.
    """

    gemms: tuple[Decision, ...]
    parameters: Mapping[str, Recipe]
    blocks: Mapping[str, str]
    embeds: Mapping[str, Quantizer]
    norms: Mapping[str, Quantizer]
    rules: tuple[Rule, ...]
    unquantized: tuple[str, ...] = ()

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """The recipes that decide a GEMM or a parameter, in the order of the rules."""
        used = {d.recipe.name for d in self.gemms} | {r.name for r in self.parameters.values()}
        return tuple(
            {r.recipe.name: r.recipe for r in self.rules if r.recipe.name in used}.values()
        )

    def rows(self) -> list[tuple[str, str, int]]:
        """(match, recipe, number of GEMMs it decides) of every rule."""
        counts = [sum(d.rule == i for d in self.gemms) for i in range(len(self.rules))]
        return [
            (str(rule).partition(" → ")[0].replace("'", ""), rule.recipe.name, count)
            for rule, count in zip(self.rules, counts, strict=True)
        ]


@dataclass(frozen=True)
class Policy:
    """Ordered rules; the first one that matches decides. `recipes` are those it defines itself.

    A rule matches a GEMM by its name or its block. A parameter gets the recipe of its block, so
    that a tied head's weight is stored as `emb` says and multiplied as `head` says.
    """

    rules: tuple[Rule, ...]
    name: str = "policy"
    recipes: Mapping[str, Recipe] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known: dict[str, Recipe] = dict(self.recipes)
        for recipe in (rule.recipe for rule in self.rules):
            if known.setdefault(recipe.name, recipe) != recipe:
                raise PolicyError(
                    f"policy {self.name!r} has two different recipes called {recipe.name!r}. "
                    "Rename one of them."
                )

    @classmethod
    def from_recipe(cls, name: str) -> "Policy":
        """One recipe for the whole model: the single rule `*`."""
        return cls((Rule("*", load_recipe(name)),), name=name)

    @classmethod
    def load(cls, path: str | Path) -> "Policy":
        """The policy of a TOML file, called after the file unless it says `name`.

        Raises PolicyError, naming the file, for what cannot be read or does not fit the schema.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise PolicyError(
                f"policy file {path} cannot be read: {error}. Give a TOML file with "
                '[[rule]] entries such as match = "*", recipe = "te_current".'
            ) from error
        try:
            return cls.from_table(table, name=path.stem)
        except PolicyError as error:
            raise PolicyError(f"policy file {path}: {error}") from error

    @classmethod
    def from_table(cls, table: Mapping[str, Any], *, name: str = "policy") -> "Policy":
        """The policy of a parsed TOML table with keys `name`, `recipes` and `rule`."""
        check_keys(table, ("name", "recipes", "rule"), "the policy")
        recipes = _inline_recipes(typed(table.get("recipes", {}), dict, "recipes"))
        rules = []
        for i, entry in enumerate(typed(table.get("rule", []), list, "rule (write [[rule]])"), 1):
            complete(entry, ("match", "recipe"), f"rule {i}")
            match, recipe = (typed(entry[k], str, f"rule {i}, {k}") for k in ("match", "recipe"))
            rules.append(Rule(match, _find(recipe, recipes, f"rule {i} ({match!r})")))
        if not rules:
            raise PolicyError(
                "the policy has no rule. Add [[rule]] entries, "
                'for example match = "*", recipe = "te_current".'
            )
        return cls(tuple(rules), typed(table.get("name", name), str, "name"), recipes)

    def to_toml(self) -> str:
        """The policy as TOML, recipes that are not shipped written out; `load` gives it back."""
        own = dict(self.recipes) | {
            recipe.name: recipe
            for recipe in (rule.recipe for rule in self.rules)
            if not is_shipped(recipe.name) or load_recipe(recipe.name) != recipe
        }
        _refuse_shipped_names(own)
        tables = {name: recipe_to_table(recipe) for name, recipe in own.items()}
        text = dumps({"name": self.name} | ({"recipes": tables} if tables else {}))
        for rule in self.rules:
            text += f"\n[[rule]]\n{dumps({'match': rule.match, 'recipe': rule.recipe.name})}"
        return text

    def resolve(self, blocks: BlockMap) -> Resolution:
        """The recipe of every GEMM and parameter of a model.

        Raises PolicyError for a rule that matches nothing or only what earlier rules decide, for
        GEMMs and parameters that no rule decides, for a fused GEMM whose parts disagree, for a
        `keep` that leaves no layer, and for roundings of embeddings or norms that are not modules.
        """
        rules, origins = self._expand(blocks.layers)
        matcher = _Matcher(rules)
        decided = {gemm.name: matcher.gemm(gemm) for gemm in blocks.gemms}
        owners = {block: matcher.first(block) for block in set(blocks.parameters.values())}
        used = {origins[i] for i in [*decided.values(), *owners.values()] if i is not None}
        self._check_used(used, blocks)
        _check_decided(decided, owners)
        gemms = []
        for gemm in blocks.gemms:
            index = decided[gemm.name]
            assert index is not None
            recipe = rules[index].recipe
            gemms.append(Decision(gemm, recipe, recipe.gemms[gemm.role], index))
        recipes = {block: rules[i].recipe for block, i in owners.items() if i is not None}
        parameters = {name: recipes[block] for name, block in blocks.parameters.items()}
        _check_modules(blocks, parameters)
        return Resolution(
            gemms=tuple(gemms),
            parameters=parameters,
            blocks=blocks.parameters,
            embeds={module: recipes[block].embed for module, block in blocks.embeddings.items()},
            norms={module: recipes[block].norm for module, block in blocks.norms.items()},
            rules=rules,
            unquantized=blocks.unquantized,
        )

    def without_idle(self, blocks: BlockMap) -> "Policy":
        """The same decisions for a model, without the rules that decide nothing of it."""
        rules, origins = self._expand(blocks.layers)
        matcher = _Matcher(rules)
        decided = [matcher.gemm(gemm) for gemm in blocks.gemms]
        decided += [matcher.first(block) for block in set(blocks.parameters.values())]
        used = {origins[i] for i in decided if i is not None}
        return replace(self, rules=tuple(r for i, r in enumerate(self.rules) if i in used))

    def _expand(self, layers: int) -> tuple[tuple[Rule, ...], list[int]]:
        """The rules with their keeps before them, and the index of the rule each comes from."""
        rules: list[Rule] = []
        for rule in self.rules:
            kept = sum(keep.first + keep.last for keep in rule.recipe.keep)
            if kept and kept >= layers:
                raise PolicyError(
                    f"recipe {rule.recipe.name!r} keeps {kept} layers in another recipe, and the "
                    f"model has {layers}: no layer would be left for it. Use a deeper model, or "
                    f"define a recipe with extends = {rule.recipe.name!r} and fewer layers in "
                    "keep, or keep = []."
                )
            for keep in rule.recipe.keep:
                recipe = _find(keep.recipe, self.recipes, f"keep of recipe {rule.recipe.name!r}")
                if recipe.keep:
                    raise PolicyError(
                        f"recipe {rule.recipe.name!r} keeps layers in {recipe.name!r}, which keeps "
                        "layers itself. Keep them in a recipe without keep."
                    )
                spared = (*range(keep.first), *range(layers - keep.last, layers))
                rules.append(Rule(rule.match, recipe, spared))
            rules.append(rule)
        sizes = [len(rule.recipe.keep) + 1 for rule in self.rules]
        return tuple(rules), [i for i, size in enumerate(sizes) for _ in range(size)]

    def _check_used(self, used: set[int], blocks: BlockMap) -> None:
        names = [name for gemm in blocks.gemms for name in (gemm.name, *gemm.parts)]
        names = list(dict.fromkeys([*names, *blocks.parameters.values()]))
        if not names:
            raise PolicyError(
                "the model has no parameter and no GEMM, so there is nothing a policy could round. "
                "Give a model with nn.Linear modules."
            )
        for i, rule in enumerate(self.rules):
            if i in used:
                continue
            pattern = re.compile(translate(rule.match))
            if any(pattern.match(name) for name in names):
                raise PolicyError(
                    f"rule {i + 1} ({rule}) decides nothing: earlier rules match all it matches. "
                    "The first match wins: put the narrower rule first, or delete it."
                )
            globs = dict.fromkeys(map(globbed, names))
            raise PolicyError(
                f"rule {i + 1} ({rule}) matches no GEMM and no block. Nearest names: "
                f"{nearest(rule.match, list(globs | dict.fromkeys(names)), globs)}. Fix the "
                "pattern or delete the rule."
            )


def refuse_partial(resolution: Resolution, allow_partial: bool) -> None:
    """PolicyError if a recipe in use has parts that are not simulated, unless they are allowed."""
    partial = [recipe for recipe in resolution.recipes if recipe.not_simulated]
    if partial and not allow_partial:
        parts = "".join(f"\n  {r.name}: {part}" for r in partial for part in r.not_simulated)
        raise PolicyError(
            f"{', '.join(repr(r.name) for r in partial)}: the simulation does not do all that "
            f"the recipe does. Missing:{parts}\nPass allow_partial=True (halfulp train: --set "
            "policy.allow_partial=true) to run without, or choose another recipe."
        )


class _Matcher:
    """First matches of an ordered list of rules, remembered per name."""

    def __init__(self, rules: Iterable[Rule]):
        self.rules = [(re.compile(translate(r.match)), frozenset(r.layers), r) for r in rules]
        self.seen: dict[tuple[str, ...], int | None] = {}

    def first(self, *names: str) -> int | None:
        """The first rule that matches one of the names of a thing."""
        if names not in self.seen:
            layer = layer_of(names[0])
            self.seen[names] = next(
                (
                    i
                    for i, (pattern, layers, _) in enumerate(self.rules)
                    if (not layers or layer in layers) and any(map(pattern.match, names))
                ),
                None,
            )
        return self.seen[names]

    def gemm(self, gemm: Gemm) -> int | None:
        """The rule of a GEMM; of a fused one by its own name, or else all its parts agree."""
        if len(gemm.parts) == 1:
            return self.first(gemm.name, gemm.block)
        own = self.first(gemm.name)
        parts = [self.first(part) for part in gemm.parts]
        if own is not None and all(part is None or own <= part for part in parts):
            return own
        decided = [part for part in parts if part is not None]
        if len(decided) < len(parts):
            return None
        if any(self.rules[i][2].recipe != self.rules[decided[0]][2].recipe for i in decided):
            sent = ", ".join(
                f"{part} to {self.rules[i][2].recipe.name}"
                for part, i in zip(gemm.parts, decided, strict=True)
            )
            raise PolicyError(
                f"GEMM {gemm.name} computes {' and '.join(gemm.parts)} in one product, and the "
                f"policy sends {sent}. Give the parts one recipe, or decide the GEMM by its name "
                f'in an earlier rule: match = "{globbed(gemm.name)}".'
            )
        return decided[0]


def _inline_recipes(tables: Mapping[str, Any]) -> dict[str, Recipe]:
    for name, table in tables.items():
        typed(table, dict, f"recipes.{name}")
    _refuse_shipped_names(tables)

    def find(name: str) -> Mapping[str, Any]:
        if name in tables:
            return tables[name]
        _find(name, tables, "extends")
        return shipped_table(name)

    return {name: build_recipe(name, table, find) for name, table in tables.items()}


def _refuse_shipped_names(names: Iterable[str]) -> None:
    for name in names:
        if is_shipped(name):
            raise PolicyError(
                f"the policy's own recipe {name!r} has the name of a shipped recipe. Call it "
                f'something else, for example "my_{name}".'
            )


def _find(name: str, own: Mapping[str, Any], where: str) -> Any:
    if name in own:
        return own[name]
    try:
        return load_recipe(name)
    except PolicyError as error:
        defined = f" The policy itself defines {', '.join(own)}." if own else ""
        raise PolicyError(f"{where}: {error}{defined}") from error


def _check_decided(gemms: Mapping[str, int | None], blocks: Mapping[str, int | None]) -> None:
    missing = [f"GEMM {name}" for name, rule in gemms.items() if rule is None]
    missing += sorted(f"parameters of {name}" for name, rule in blocks.items() if rule is None)
    if missing:
        shown = list(dict.fromkeys(map(globbed, missing)))
        more = f" and {len(shown) - 8} more" if len(shown) > 8 else ""
        raise PolicyError(
            f"no rule decides {', '.join(shown[:8])}{more}. Add rules for them, or a last rule "
            'with match = "*".'
        )


def _check_modules(blocks: BlockMap, parameters: Mapping[str, Recipe]) -> None:
    """Refuse to round embeddings and norms that are bare parameters: no forward would do it."""
    modules = {*blocks.embeddings, *blocks.norms, *blocks.unquantized}
    modules |= {gemm.module for gemm in blocks.gemms}
    for name, block in blocks.parameters.items():
        kind = {"emb": "embed", "norm": "norm"}.get(block_type(block))
        if kind is None or name in modules or name.rpartition(".")[0] in modules:
            continue
        quantizer = getattr(parameters[name], kind)
        if not quantizer.is_identity:
            raise PolicyError(
                f"parameter {name} of block {block} belongs to no embedding or norm module, and "
                f"recipe {parameters[name].name!r} rounds it to {quantizer} in the forward pass. "
                f"Leave it unrounded with hints={{{name!r}: '{block}:fp32'}}."
            )
