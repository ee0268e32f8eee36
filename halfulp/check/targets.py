"""Targets: the program or policy that a user means to run, as sites that `check` can price.

A program of PyTorch's (`.to(bfloat16)`, autocast) rounds what its dtype trace says. A policy rounds
the operands of GEMMs, their outputs and the tables, as halfulp.quantize does; delayed scales are
judged at the value they settle at, that of the present amax.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from halfulp.blocks import BlockMap
from halfulp.check.measure import TARGETS
from halfulp.check.prices import Prices
from halfulp.errors import ConfigError, PolicyError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import Quantizer
from halfulp.policy import Policy, Resolution, Rule, load_recipe
from halfulp.recipe import Recipe

_TRANSFORMED = "operands under a Hadamard transform have no price."
_GEMM_OPS = ("linear", "addmm", "matmul", "bmm", "baddbmm")


@dataclass(frozen=True, kw_only=True)
class PolicyTarget:
    """A policy with settled scales, and what it rounds in the forward pass of one model.

    `operands`: (gemm, "x" | "w") → quantizer; `outputs`: module of a linear → quantizer; `tables`:
    name of a table's module → quantizer; `weights`: parameter → quantizer it is stored with.
    `accumulates`: some GEMM sums in a short accumulator,
    which no price stands for. `why`: the reason that the whole cannot be predicted, or "".
    """

    policy: Policy
    resolution: Resolution
    operands: Mapping[tuple[str, str], Quantizer]
    outputs: Mapping[str, Quantizer]
    tables: Mapping[str, Quantizer]
    weights: Mapping[str, Quantizer]
    accumulates: bool
    why: str

    @property
    def words(self) -> tuple[str, ...]:
        """The formats that have to be priced."""
        tables = (self.operands, self.outputs, self.tables, self.weights)
        return tuple(dict.fromkeys(str(q) for t in tables for q in t.values() if _priceable(q)))

    def plan(self, prices: Prices) -> dict[str, str]:
        """Site → format of everything that the policy rounds and `prices` has."""
        found: dict[str, str] = {}
        for site in prices.sites:
            if site.family == "operand":
                q = self.operands.get((site.gemm, site.operand))
            elif site.op == "parameter":
                name = site.name.removeprefix("weight:")
                q = self.weights.get(name) or self.tables.get(name.rpartition(".")[0])
            else:
                q = self.outputs.get(site.module) if site.op in _GEMM_OPS else None
            if q is not None and _priceable(q):
                found[site.name] = str(q)
        return found


def is_program(target: str) -> bool:
    """Whether `target` is a program of PyTorch's, not a recipe or a policy file."""
    return target in TARGETS


def load_target(model: nn.Module, target: str | Path | Policy, blocks: BlockMap) -> PolicyTarget:
    """The recipe or policy file `target`, for this model.

    Raises PolicyError for a policy that does not fit the model, ConfigError for an unknown name.
    """
    policy = settled(_find(target))
    resolution = policy.resolve(blocks)
    operands: dict[tuple[str, str], Quantizer] = {}
    outputs: dict[str, Quantizer] = {}
    for decision in resolution.gemms:
        gemm, spec = decision.gemm, decision.spec
        sides = {(gemm.name, "x"): spec.fprop_x, (gemm.name, "w"): spec.fprop_w}
        operands |= {key: q for key, q in sides.items() if not q.is_identity}
        if not spec.fprop_out.is_identity and not gemm.role.startswith("attn_"):
            outputs[gemm.module] = spec.fprop_out
    tables = {**resolution.embeds, **resolution.norms}
    return PolicyTarget(
        policy=policy,
        resolution=resolution,
        operands=operands,
        outputs=outputs,
        tables={name: q for name, q in tables.items() if not q.is_identity},
        weights={
            name: recipe.weight
            for name, recipe in resolution.parameters.items()
            if not recipe.weight.is_identity
        },
        accumulates=any(d.spec.fprop_accumulate != "fp32" for d in resolution.gemms),
        why="" if all(map(_priceable, operands.values())) else _TRANSFORMED,
    )


@contextmanager
def stored_weights(model: nn.Module, target: PolicyTarget) -> Iterator[None]:
    """Parameters hold what the policy stores of them inside, and their own values afterwards."""
    before = []
    try:
        for name, p in model.named_parameters():
            if (q := target.weights.get(name)) is not None:
                before.append((p, p.data))
                rounded = apply_quantizer(p.data.float(), replace(q, rounding="nearest"))
                p.data = rounded.to(p.dtype)
        yield
    finally:
        for p, data in before:
            p.data = data


def settled(policy: Policy) -> Policy:
    """The policy with every delayed scale replaced by one from the present amax."""
    rules = tuple(Rule(r.match, _settled(r.recipe), r.layers) for r in policy.rules)
    own = {name: _settled(recipe) for name, recipe in policy.recipes.items()}
    return Policy(rules, policy.name, own)


def _settled(recipe: Recipe) -> Recipe:
    def now(q: Quantizer) -> Quantizer:
        return replace(q, scale="current", history=0) if q.scale == "delayed" else q

    gemms = {
        role: replace(
            spec, **{n: now(q) for n, q in vars(spec).items() if isinstance(q, Quantizer)}
        )
        for role, spec in recipe.gemms.items()
    }
    same = all(gemms[role] == spec for role, spec in recipe.gemms.items())
    return recipe if same else replace(recipe, name=f"{recipe.name}_settled", gemms=gemms)


def _find(target: str | Path | Policy) -> Policy:
    if isinstance(target, Policy):
        return target
    text = str(target)
    if text.endswith(".toml"):
        return Policy.load(text)
    try:
        load_recipe(text)
    except PolicyError as error:
        raise ConfigError(
            f"target {text!r} is neither a program ({', '.join(TARGETS)}) nor a policy file nor a "
            f"recipe. {error}"
        ) from error
    return Policy.from_recipe(text)


def _priceable(q: Quantizer) -> bool:
    return not q.hadamard
