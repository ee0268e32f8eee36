"""The ladder of recipes: on which rung each unit stands, what comes next, and the policy of it.

nvfp4 → mxfp8 → te_current → bf16_amp → fp32. A unit starts on the recipe that the run's policy
gives it, wherever that stands, and climbs to the first rung that is better.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from halfulp.blocks import BlockMap
from halfulp.errors import PolicyError
from halfulp.guard.units import units_of
from halfulp.numerics.quantizer import Quantizer
from halfulp.policy import Policy, Resolution, Rule, load_recipe
from halfulp.recipe import OPERANDS, Recipe

RUNGS = ("nvfp4_all", "mxfp8", "te_current", "bf16_amp", "fp32")
FALLBACK = "bf16_amp"
HIGH = 16  # bits from which a unit counts as one of high precision
LOCK = 500  # steps that a raised unit stays where it is; doubled each time it is raised again
STRIKES = 3  # after so many it stays for good
_HALF = "_forward_"  # between the recipes of the backward and of the forward pass
_FORWARD = ("fprop_x", "fprop_w", "fprop_out", "fprop_accumulate")


@dataclass
class Stand:
    """Where one unit stands above its own recipe: (recipe, forward pass only?) of every climb."""

    climbs: list[tuple[str, bool]] = field(default_factory=list)
    lock_until: int = 0
    strikes: int = 0
    probation_until: int = 0  # after a descent: raised again before it, it does not come back

    @property
    def permanent(self) -> bool:
        return self.strikes >= STRIKES

    @property
    def lock(self) -> int:
        """Steps of the next lock."""
        return LOCK * 2 ** max(0, self.strikes - 1)


class Ladder:
    """The policy of a run with some units raised.

    Raises PolicyError for rungs that do not exist, that keep layers in another recipe, or that are
    not each better than the one before.
    """

    def __init__(self, policy: Policy, blocks: BlockMap, rungs: Sequence[str] = RUNGS) -> None:
        self.base, self.blocks, self.units = policy, blocks, units_of(blocks)
        self.rungs = [load_recipe(name) for name in rungs]
        self.stands: dict[str, Stand] = {}
        self.fallback = ""  # the recipe of the whole model, once nothing else has helped
        _check_rungs(self.rungs)
        self._own = _own(policy.resolve(blocks))

    def policy(self) -> Policy:
        """The policy in force: a rule per raised block before the policy's own."""
        if self.fallback:
            return Policy.from_recipe(self.fallback)
        raised = [
            Rule(block, self._at(unit, block))
            for unit in self.units.names
            if self.stands.get(unit, Stand()).climbs
            for block in self.units.blocks[unit]
        ]
        if not raised:
            return self.base
        return replace(self.base, rules=(*raised, *self.base.rules)).without_idle(self.blocks)

    def next(self, unit: str, *, storage: bool = False, backward: bool = True) -> str:
        """Name of the rung above `unit`; "" at the top. Arguments as `climb`."""
        above = self._above(unit, storage)
        if above is None:
            return ""
        return f"{above.name}, forward pass first" if self._half(unit, backward) else above.name

    def climb(self, unit: str, step: int, *, storage: bool = False, backward: bool = True) -> str:
        """Raise `unit` one rung and lock it; the recipe it now has, "" when it was at the top.

        `storage`: the trouble is how weights and moments are stored, so the next rung must store
        them better. `backward` = False: only the forward pass is to blame, and is raised alone.
        """
        above, half = self._above(unit, storage), self._half(unit, backward)
        if above is None:
            return ""
        stand = self.stands.setdefault(unit, Stand())
        stand.strikes = STRIKES if step < stand.probation_until else stand.strikes + 1
        stand.climbs = [*stand.climbs, (above.name, half and not storage)]
        stand.lock_until = step + stand.lock
        return self.recipe_of(unit)

    def descend(self, unit: str) -> tuple[str, bool]:
        """Take back the last climb of `unit`; what it was."""
        stand = self.stands[unit]
        *stand.climbs, last = stand.climbs
        return last

    def recipe_of(self, unit: str) -> str:
        """Name of the recipe of a unit now: the weakest where its blocks differ."""
        if self.fallback:
            return self.fallback
        recipes = [self._at(unit, block) for block in self.units.blocks[unit]]
        return min(recipes, key=lambda recipe: quality(recipe, self._roles(unit))).name

    def would_gain(self, recipe: str) -> bool:
        """Whether some unit would be better off with `recipe` than with the run's own policy."""
        found, units = load_recipe(recipe), [u for u in self.units.names if self._roles(u)]
        return not self.fallback and any(
            quality(found, self._roles(unit)) > quality(self._own[block], self._roles(unit))
            for unit in units
            for block in self.units.blocks[unit]
        )

    @property
    def is_raised(self) -> bool:
        """Whether anything stands above the run's own policy."""
        return bool(self.fallback) or any(stand.climbs for stand in self.stands.values())

    def rebase(self, policy: Policy) -> None:
        """Another policy is the run's own: climbs that lead no higher than it are void."""
        before = {u: [self._at(u, b) for b in self.units.blocks[u]] for u in self.stands}
        self.base, self._own = policy, _own(policy.resolve(self.blocks))
        for unit, raised in before.items():
            roles = self._roles(unit)
            own = [self._own[block] for block in self.units.blocks[unit]]
            if not any(_is_higher(up, down, roles) for up, down in zip(raised, own, strict=True)):
                self.stands[unit].climbs = []

    def share_high(self) -> float:
        """Share of the units with a GEMM that have been raised to 16 bits or more.

        A unit that has climbed to another recipe of 8 bits still runs in low precision.
        """
        if self.fallback:
            return 1.0
        with_gemm = [unit for unit in self.units.names if self._roles(unit)]
        climbed = [u for u in with_gemm if self.stands.get(u, Stand()).climbs]
        return sum(self._bits(unit) >= HIGH for unit in climbed) / max(1, len(with_gemm))

    def _bits(self, unit: str) -> int:
        """Bits of the weakest operand in a unit's forward pass, as it stands."""
        specs = [
            self._at(unit, block).gemms[role]
            for block in self.units.blocks[unit]
            for role in self._roles(unit)
        ]
        return min(q.format.bits for spec in specs for q in (spec.fprop_x, spec.fprop_w))

    def map(self) -> dict[str, str]:
        """The precision map: the recipe of every block."""
        units = self.units
        if self.fallback:
            return dict.fromkeys(self.blocks.blocks, self.fallback)
        return {b: self._at(unit, b).name for unit in units.names for b in units.blocks[unit]}

    def above(self) -> list[str]:
        """The blocks whose recipe is not that of the run's own policy, in the order of the map."""
        own = {block: recipe.name for block, recipe in self._own.items()}
        return [block for block, recipe in self.map().items() if recipe != own.get(block, recipe)]

    def put(self, recipes: Mapping[str, str]) -> None:
        """Climb to a part of a `map`: the recipe of every block that is to stand above its own."""
        raised: dict[str, list[tuple[str, bool]]] = {}
        for block, name in recipes.items():
            lower, half, upper = name.rpartition(_HALF)
            own = self._own[block].name
            climbs = [(lower, False)] if half and lower != own else []
            raised[self.units.of[block]] = [*climbs, (upper, bool(half))]
        for unit, climbs in raised.items():
            self.stands[unit] = Stand(climbs)

    def state(self) -> dict[str, Any]:
        """Everything that it knows beyond the run's policy, as plain values."""
        stands = {
            unit: {**vars(stand), "climbs": [list(c) for c in stand.climbs]}
            for unit, stand in self.stands.items()
        }
        return {"stands": stands, "fallback": self.fallback}

    def load(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        self.fallback = state["fallback"]
        self.stands = {
            unit: Stand(**{**stand, "climbs": [(name, half) for name, half in stand["climbs"]]})
            for unit, stand in state["stands"].items()
        }

    def _at(self, unit: str, block: str) -> Recipe:
        """The recipe of a block of `unit` as the policy in force has it."""
        recipe = self._own[block]
        for name, half in self.stands.get(unit, Stand()).climbs:
            upper = load_recipe(name)
            recipe = forward_of(upper, recipe) if half else upper
        return recipe

    def _above(self, unit: str, storage: bool) -> Recipe | None:
        """The rung that `unit` would climb to."""
        if self.fallback:
            return None
        roles, stand = self._roles(unit), self.stands.get(unit, Stand())
        if stand.climbs and stand.climbs[-1][1] and not storage:
            return load_recipe(stand.climbs[-1][0])  # the other half of it
        weakest = min(
            (self._at(unit, block) for block in self.units.blocks[unit]),
            key=lambda recipe: quality(recipe, roles),
        )
        own, stored = quality(weakest, roles), storage_quality(weakest)
        better = [
            rung
            for rung in self.rungs
            if quality(rung, roles) >= own
            and quality(rung, ("linear",)) >= quality(weakest, ("linear",))
            and (storage_quality(rung) > stored if storage else quality(rung, roles) > own)
        ]
        # A scale that is too old or absent is cured by a current one of the same granularity.
        alike = [r for r in better if _shape(r, roles) == _shape(weakest, roles)]
        return next(iter(alike or better), None)

    def _half(self, unit: str, backward: bool) -> bool:
        stand = self.stands.get(unit, Stand())
        begun = bool(stand.climbs) and stand.climbs[-1][1]
        return not backward and not begun

    def _roles(self, unit: str) -> tuple[str, ...]:
        blocks = set(self.units.blocks[unit])
        roles = (gemm.role for gemm in self.blocks.gemms if blocks & {gemm.block, *gemm.parts})
        return tuple(dict.fromkeys(roles))


def quality(recipe: Recipe, roles: Sequence[str]) -> tuple[int, int]:
    """(bits, scale) of the weakest operand of some GEMMs.

    Without a GEMM, as for norms and embeddings, of the weakest of what is stored and read.
    """
    found = [getattr(recipe.gemms[role], operand) for role in roles for operand in OPERANDS]
    if not found:
        return min(storage_quality(recipe), _quality(recipe.norm), _quality(recipe.embed))
    return min(map(_quality, found))


def storage_quality(recipe: Recipe) -> tuple[int, int]:
    """(bits, scale) of the weakest of updated weights and moments."""
    stored = recipe.weight if recipe.master is None else recipe.master
    return min(map(_quality, (stored, recipe.moment_m, recipe.moment_v)))


def _is_higher(upper: Recipe, lower: Recipe, roles: Sequence[str]) -> bool:
    """Whether anything of `upper`, an operand of a GEMM or the storage, is better."""
    if storage_quality(upper) > storage_quality(lower):
        return True
    specs = ((upper.gemms[role], lower.gemms[role]) for role in roles)
    pairs = ((getattr(up, o), getattr(down, o)) for up, down in specs for o in OPERANDS)
    return any(_quality(up) > _quality(down) for up, down in pairs)


def forward_of(upper: Recipe, lower: Recipe) -> Recipe:
    """`lower` with the forward pass of its GEMMs as in `upper`."""
    gemms = {
        role: replace(spec, **{key: getattr(upper.gemms[role], key) for key in _FORWARD})
        for role, spec in lower.gemms.items()
    }
    name = f"{lower.name}{_HALF}{upper.name}"
    summary = f"{lower.name} with the forward pass of {upper.name}."
    return replace(lower, name=name, gemms=gemms, summary=summary, keep=())


def _quality(q: Quantizer) -> tuple[int, int]:
    if q.format.bits >= 16:
        return q.format.bits, 0
    if q.scale in ("none", "static"):
        return q.format.bits, 0
    if q.scale == "delayed":
        return q.format.bits, 1
    return q.format.bits, 2 if "x" in q.granularity else 3


def _shape(recipe: Recipe, roles: Sequence[str]) -> tuple[int, bool]:
    """Bits and whether blocks share a scale, of the weakest operand."""
    bits, scale = quality(recipe, roles)
    return bits, scale == 2


def _own(resolution: Resolution) -> dict[str, Recipe]:
    """Block → the recipe that the run's policy gives it: the weakest of its GEMMs'."""
    own: dict[str, Recipe] = {}
    for name, recipe in resolution.parameters.items():
        own.setdefault(resolution.blocks[name], recipe)
    for gemm, recipe, _, _ in resolution.gemms:
        for part in {gemm.block, *gemm.parts}:
            before = own.get(part, recipe)
            own[part] = min(before, recipe, key=lambda r: quality(r, (gemm.role,)))
    return own


def _check_rungs(rungs: Sequence[Recipe]) -> None:
    for recipe in rungs:
        if recipe.keep or recipe.not_simulated:
            raise PolicyError(
                f"recipe {recipe.name!r} cannot be a rung of the guard's ladder: it keeps layers "
                "in another recipe or is not fully simulated. Choose another recipe."
            )
    qualities = [quality(recipe, ("linear",)) for recipe in rungs]
    if not rungs or any(a >= b for a, b in pairwise(qualities)):
        names = ", ".join(recipe.name for recipe in rungs) or "none"
        raise PolicyError(
            f"the guard's ladder is {names}, and each rung must be better than the one before. "
            f"Order the recipes by bits and scaling, for example {', '.join(RUNGS)}."
        )
