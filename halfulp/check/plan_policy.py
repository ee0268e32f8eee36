"""A plan as a policy file: custom recipes, one rule per exception, and `*` for the rest.

The prices of a plan are those of the forward operands, so the plan decides these. What the backward
pass does is said by `backward`:

* "bf16": dgrad and wgrad round their operands to bf16, or not at all where the forward format is
  wider (fp32, tf32). The forward error is the only one of low precision.
* "hybrid": as FP8 recipes do: where the forward operands are e4m3, gradients are e5m2 with the same
  scaling and the other operands as in the forward pass; MX blocks stay e4m3 throughout. Formats
  without such a practice (int8, FP4, fp16) get bf16.
* "same": all six operands in the forward format.
* "fp32": nothing is rounded in the backward pass.
"""

import re
import tomllib
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase

from halfulp.block_names import globbed
from halfulp.blocks import BlockMap
from halfulp.check.hardware import Hardware
from halfulp.errors import CheckError
from halfulp.formats import format_quantizer
from halfulp.numerics.quantizer import Quantizer, parse_quantizer
from halfulp.policy import Policy
from halfulp.toml import dumps

BACKWARD = ("bf16", "hybrid", "same", "fp32")
_EXACT = "fp32"


def policy_toml(
    formats: Mapping[str, str],
    blocks: BlockMap,
    *,
    roles: Mapping[str, str],
    hardware: Hardware,
    backward: str,
    out: str,
    rest: str,
    name: str,
) -> str:
    """The TOML of a policy that gives each GEMM the format of `formats` (group → word).

    * `roles`: of the groups; those of role "embed" and "norm" are blocks whose tables are rounded.
    * `out`: quantizer of every product's result ("bf16" as mixed-precision programs store it).
    * `rest`: the recipe of GEMMs and tables that `formats` does not name, and of stored weights and
      moments everywhere.

    Raises CheckError when a GEMM of the plan is not in `blocks` and when the hardware does not
    multiply the backward operands.
    """
    if backward not in BACKWARD:
        raise CheckError(f"backward = {backward!r} is unknown. Give {', '.join(BACKWARD)}.")
    tables = {n: w for n, w in formats.items() if roles[n] in ("embed", "norm") and w != _EXACT}
    gemms = {n: w for n, w in formats.items() if roles[n] not in ("embed", "norm")}
    if unknown := sorted(gemms.keys() - {g.name for g in blocks.gemms}):
        raise CheckError(
            f"the plan decides {unknown[0]}, which is no GEMM of this model. "
            "Give the block map of the model that was priced."
        )
    recipes: dict[str, dict] = {}
    rules = [
        (match, _recipe(word, backward, out, rest, hardware, recipes))
        for match, word in _rules(gemms, blocks, rest)
    ]
    for block, word in tables.items():
        key = f"plan_{roles[block]}_{_slug(word)}"
        recipes[key] = {"extends": rest, roles[block]: str(format_quantizer(word))}
        rules.append((block, key))
    text = dumps({"name": name} | ({"recipes": recipes} if recipes else {}))
    for match, recipe in [*rules, ("*", rest)]:
        text += f"\n[[rule]]\n{dumps({'match': match, 'recipe': recipe})}"
    _check(text, gemms, blocks)
    return text


def _recipe(
    word: str, backward: str, out: str, rest: str, hardware: Hardware, recipes: dict[str, dict]
) -> str:
    """The name of the recipe for both operands in `word`, defined in `recipes` if need be."""
    q = format_quantizer(word)
    if q.is_identity and out == _EXACT and rest == _EXACT:
        return _EXACT
    key = f"plan_{_slug(word)}"
    if key not in recipes:
        g, x = _backward(q, backward)
        if not hardware.multiplies(g, x):
            raise CheckError(
                f"backward = {backward!r} multiplies {g} with {x} in the backward pass, which "
                f"{hardware.name} does not. Choose backward = 'bf16'."
            )
        linear = {"fprop": str(q), "dgrad_g": str(g), "dgrad_w": str(x)}
        linear |= {"wgrad_g": str(g), "wgrad_x": str(x), "out": out, "accumulate": "fp32"}
        recipes[key] = {
            "extends": rest,
            "summary": f"Forward operands in {word}, backward as {backward!r}.",
            "source": "halfulp check: the plan for a budget.",
            "keep": [],
            "linear": linear,
        } | dict.fromkeys(("head", "router", "attn_qk", "attn_pv"), "linear")
    return key


def _backward(q: Quantizer, backward: str) -> tuple[Quantizer, Quantizer]:
    """Quantizers of the gradient and of the other operand of dgrad and wgrad."""
    bf16, exact = parse_quantizer("bf16"), parse_quantizer(_EXACT)
    if backward == "fp32":
        return exact, exact
    if backward == "same":
        return q, q
    if backward == "hybrid" and str(q.format) in ("e4m3", "e5m2"):
        if q.scale.startswith("e8m0") or str(q.format) == "e5m2":
            return q, q
        return parse_quantizer(str(q).replace("e4m3", "e5m2", 1)), q
    wide = q.format.mantissa_bits > bf16.format.mantissa_bits and q.format.exponent_bits == 8
    return (q, q) if wide else (bf16, bf16)


def _rules(gemms: Mapping[str, str], blocks: BlockMap, rest: str) -> list[tuple[str, str]]:
    """(match, format): exceptions before the glob of the GEMMs that are called alike."""
    likes: dict[str, list[str]] = {}
    for gemm in gemms:
        likes.setdefault(globbed(gemm), []).append(gemm)
    names = {n for g in blocks.gemms for n in (g.name, *g.parts)} | set(blocks.parameters.values())
    rules: list[tuple[str, str]] = []
    for glob, members in likes.items():
        usual = Counter(gemms[m] for m in members).most_common(1)[0][0]
        # A glob that reaches further than these GEMMs would decide what the plan does not.
        narrow = {n for n in names if fnmatchcase(n, glob)} == set(members)
        spoken = narrow and not (usual == _EXACT == rest)
        skipped = usual if spoken else _EXACT if rest == _EXACT else None
        rules += [(m, gemms[m]) for m in members if gemms[m] != skipped]
        rules += [(glob, usual)] if spoken else []
    return rules


def _slug(word: str) -> str:
    return re.sub(r"\W+", "_", word).strip("_")


def _check(text: str, gemms: Mapping[str, str], blocks: BlockMap) -> None:
    """Read the file back and see that every GEMM of the plan gets its format."""
    resolution = Policy.from_table(tomllib.loads(text)).resolve(blocks)
    for decision in resolution.gemms:
        word = gemms.get(decision.gemm.name)
        q = None if word is None else format_quantizer(word)
        if q is not None and {decision.spec.fprop_x, decision.spec.fprop_w} != {q}:
            raise CheckError(
                f"the policy gives {decision.gemm.name} {decision.spec.fprop_x} and the plan "
                f"says {q}. Report this as a bug of halfulp."
            )
