"""Recipes: what is rounded where, as data; as a table to show and as a table to write."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from halfulp.numerics.quantizer import Quantizer, parse_quantizer

ROLES = ("linear", "head", "router", "attn_qk", "attn_pv")
PRODUCTS = ("fprop", "dgrad", "wgrad")
OPERANDS = ("fprop_x", "fprop_w", "dgrad_g", "dgrad_w", "wgrad_g", "wgrad_x")
OUTPUTS = ("fprop_out", "dgrad_out", "wgrad_out")
ACCUMULATES = ("fprop_accumulate", "dgrad_accumulate", "wgrad_accumulate")
SPEC_KEYS = (*OPERANDS, *OUTPUTS, *ACCUMULATES)
QUANTIZERS = ("embed", "norm", "weight", "moment_m", "moment_v", "gradient")


@dataclass(frozen=True, kw_only=True)
class GemmSpec:
    """The rounding of the three GEMMs of one linear, or of one product inside attention.

    fprop y = x wᵀ, dgrad dx = g w, wgrad dw = gᵀ x; for QK: x = q, w = k, y = scores; for PV:
    x = p, w = v. Blocks, rows and transforms of an operand run along its K in that GEMM. `out` is
    the rounding of the result; `accumulate` is "fp32", "fast" (running sum in the reduced
    precision of Hopper's FP8 tensor cores), "split" (partial sums added in fp32) or "promote(N)"
    (added in fp32 every N terms).
    """

    fprop_x: Quantizer
    fprop_w: Quantizer
    dgrad_g: Quantizer
    dgrad_w: Quantizer
    wgrad_g: Quantizer
    wgrad_x: Quantizer
    fprop_out: Quantizer
    dgrad_out: Quantizer
    wgrad_out: Quantizer
    fprop_accumulate: str
    dgrad_accumulate: str
    wgrad_accumulate: str

    @property
    def is_identity(self) -> bool:
        """Whether all three GEMMs are those of fp32."""
        quantizers = (getattr(self, key) for key in (*OPERANDS, *OUTPUTS))
        plain = all(getattr(self, key) == "fp32" for key in ACCUMULATES)
        return plain and all(q.is_identity for q in quantizers)


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Dynamic loss scaling: × `growth` after `interval` good steps, × `backoff` on overflow."""

    init: float
    growth: float
    interval: int
    backoff: float


@dataclass(frozen=True, kw_only=True)
class Keep:
    """The first and last layers that use another recipe."""

    first: int
    last: int
    recipe: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Formats of every operand, of the stored weights and of the optimizer of one block.

    `gemms` decides every role of `ROLES`. `embed` and `norm` round the embedding table and the
    norms' affine parameters as the forward pass uses them. `weight` is the stored weight; the
    optimizer updates `master` where there is one, else `weight`, with `update_rounding`.
    `not_simulated` lists, as sentences, what the source does and this simulation does not.
    """

    name: str
    summary: str
    source: str
    high: str  # fp32 | bf16 | fp16: the format of what the recipe keeps high
    gemms: Mapping[str, GemmSpec]
    embed: Quantizer
    norm: Quantizer
    weight: Quantizer
    update_rounding: str  # nearest | stochastic
    master: Quantizer | None
    moment_m: Quantizer
    moment_v: Quantizer
    expand_moments: bool
    gradient: Quantizer
    loss_scale: LossScale | None
    keep: tuple[Keep, ...]
    not_simulated: tuple[str, ...]

    def is_high(self, role: str) -> bool:
        """Whether every operand of `role` is unscaled `high`."""
        spec = self.gemms[role]
        high = parse_quantizer(self.high)
        return all(getattr(spec, operand) == high for operand in OPERANDS)


def recipe_to_table(recipe: Recipe) -> dict[str, Any]:
    """The complete TOML table of `recipe`, without `extends`; `build_recipe` reads it back."""
    table: dict[str, Any] = {key: getattr(recipe, key) for key in ("summary", "source", "high")}
    table |= {key: str(getattr(recipe, key)) for key in QUANTIZERS}
    table |= {
        "update_rounding": recipe.update_rounding,
        "master": "none" if recipe.master is None else str(recipe.master),
        "expand_moments": recipe.expand_moments,
        "keep": [vars(keep) for keep in recipe.keep],
        "not_simulated": list(recipe.not_simulated),
        "loss_scale": "none" if recipe.loss_scale is None else dict(vars(recipe.loss_scale)),
    }
    for role in ROLES:
        table[role] = {key: str(getattr(recipe.gemms[role], key)) for key in SPEC_KEYS}
    return table


class RecipeRow(NamedTuple):
    """One line of a recipe's table; empty cells do not apply."""

    where: str  # a role, "storage", "kept high" or "not simulated"
    gemm: str  # fprop | dgrad | wgrad, or the tensor that is stored
    operand: str  # x | w | g
    quantizer: str  # or the sentence of a "not simulated" row
    accumulate: str
    out: str


def recipe_table(recipe: Recipe) -> list[tuple]:
    """`recipe` as rows: operands of each role, storage, what is kept high, what is missing."""
    rows: list[tuple] = []
    high: list[tuple] = []
    for role in ROLES:
        if role != "linear" and recipe.is_high(role):
            high.append(RecipeRow("kept high", role, "", recipe.high, "", ""))
        else:
            rows += _role_rows(role, recipe.gemms[role])
    for key in ("weight", "master", "gradient", "moment_m", "moment_v", "embed", "norm"):
        value = str(getattr(recipe, key) or "none")
        if key == "weight":
            value += f", update rounded to {recipe.update_rounding}"
        if key.startswith("moment") and recipe.expand_moments:
            value += ", range expansion"
        if value == recipe.high and key in ("embed", "norm"):
            high.append(RecipeRow("kept high", key, "", recipe.high, "", ""))
        else:
            rows.append(RecipeRow("storage", key, "", value, "", ""))
    if scale := recipe.loss_scale:
        text = f"{scale.init:g}, ×{scale.growth:g} every {scale.interval} good steps"
        text += f", ×{scale.backoff:g} on overflow"
        rows.append(RecipeRow("storage", "loss scale", "", text, "", ""))
    for keep in recipe.keep:
        layers = f"first {keep.first} and last {keep.last} layers"
        high.append(RecipeRow("kept high", layers, "", keep.recipe, "", ""))
    missing = [RecipeRow("not simulated", "", "", part, "", "") for part in recipe.not_simulated]
    return [*rows, *high, *missing]


def _role_rows(role: str, spec: GemmSpec) -> list[RecipeRow]:
    return [
        RecipeRow(
            role,
            (product := operand[:5]),
            operand[6:],
            str(getattr(spec, operand)),
            getattr(spec, f"{product}_accumulate"),
            str(getattr(spec, f"{product}_out")),
        )
        for operand in OPERANDS
    ]
