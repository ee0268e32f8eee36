"""Model → block map: which block of the transformer each parameter and each GEMM belongs to.

Names are recognized by the ordered tables of halfulp/block_names.py; whatever they do not know is
an error that shows the hint to give. Nothing is guessed from shapes.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import nn

from halfulp.block_names import BLOCK_TYPES, Hints, block_type, globbed, layer_of
from halfulp.block_survey import Placed, Survey, is_gemm_module, survey_of
from halfulp.errors import PolicyError

_OUTER_TYPES = ("emb", "head")  # one block in the model, wherever the module sits
_ROLES = {"head": "head", "router": "router"}  # block type → GEMM role; all others are linear


@dataclass(frozen=True)
class Gemm:
    """One matrix product of the model that a recipe can round."""

    name: str  # "layers.3.ffn.down_proj", "head.lm_head", "layers.3.attn.qk"; unique in the model
    block: str  # "layers.3.ffn", "head", "layers.3.attn"
    role: str  # linear | head | router | attn_qk | attn_pv
    module: str  # the module in the model; for attn_qk and attn_pv the attention module
    parts: tuple[str, ...]  # the blocks it computes: (qk, vo) for a fused projection, else (block,)


@dataclass(frozen=True)
class BlockMap:
    """The blocks of one model.

    `parameters` maps every parameter, as `model.named_parameters()` names it (tied ones once), to
    its block. `embeddings` and `norms` map modules with a table or affine parameters to the block
    of these. `unquantized` lists what a hint marked ":fp32": placed, its products left alone.
    """

    gemms: tuple[Gemm, ...]
    parameters: Mapping[str, str]
    embeddings: Mapping[str, str]
    norms: Mapping[str, str]
    layers: int
    unquantized: tuple[str, ...] = ()

    @property
    def blocks(self) -> tuple[str, ...]:
        """The names of all blocks: those of the parameters, then those of attention GEMMs."""
        names = [*self.parameters.values(), *(gemm.block for gemm in self.gemms)]
        return tuple(dict.fromkeys(names))

    def rows(self) -> list[tuple[str, int, str]]:
        """(block, number of parameters, GEMM names within the block), one row per block."""
        counts = Counter(self.parameters.values())
        gemms: dict[str, list[str]] = {}
        for gemm in self.gemms:
            fused = "".join(f" (+{block_type(part)})" for part in gemm.parts[1:])
            gemms.setdefault(gemm.block, []).append(gemm.name[len(gemm.block) + 1 :] + fused)
        return [(name, counts[name], ", ".join(gemms.get(name, ()))) for name in self.blocks]

    def __str__(self) -> str:
        grouped: dict[tuple[str, int, str], list[int]] = {}
        for name, count, gemms in self.rows():
            layer = layer_of(name)
            key = name if layer is None else f"layers.{{}}.{block_type(name)}"
            grouped.setdefault((key, count, gemms), []).append(-1 if layer is None else layer)
        lines = [("block", "parameters", "GEMMs")]
        lines += [(k.format(_ranges(n)), str(c * len(n)), g) for (k, c, g), n in grouped.items()]
        widths = [max(len(line[column]) for line in lines) for column in (0, 1)]
        text = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in lines]
        if self.unquantized:
            names = ", ".join(dict.fromkeys(map(globbed, self.unquantized)))
            text.append(f"unquantized: {names}")
        return "\n".join(text)


def block_map(model: nn.Module, hints: Mapping[str, str] | None = None) -> BlockMap:
    """The block of every parameter and every GEMM of `model`; reads names and shapes only.

    * A layer is an entry of a ModuleList (or of a Sequential or ModuleDict of numbered blocks);
      several such stacks are numbered one after the other. A model without any is layer 0.
    * A bias follows its matrix. A tied head's weight belongs to `emb`, its GEMM to `head`.
    * `hints` maps a glob over module or parameter names to a block type ("ffn"), a block
      ("layers.3.ffn"), or the types that a fused matrix computes ("qk+vo"). The suffix ":fp32"
      ("ffn:fp32") places weights whose products are not an nn.Linear's or a Conv1D's, and cannot
      be quantized. The first matching hint wins, before the tables.

    Raises PolicyError naming every parameter and GEMM module that cannot be placed with the hint
    to give, and hints that match nothing or do not parse.
    """
    return _map_of(survey_of(model, Hints(hints or {})))


def _map_of(survey: Survey) -> BlockMap:
    """Number the layers, name the blocks and the GEMMs, add the attention GEMMs."""
    offsets, layers = _number_stacks([*survey.parameters.values(), *survey.gemms])
    blocks: dict[str, tuple[str, ...]] = {}
    for placed in [*survey.parameters.values(), *survey.gemms]:
        blocks[placed.name] = _blocks(placed, offsets)
    named = [b for names in blocks.values() for b in names]
    gemms = _with_attention(survey.gemms, blocks)
    return BlockMap(
        gemms=_unique_names(gemms),
        parameters={name: blocks[name][0] for name in survey.parameters},
        embeddings={m: blocks[survey.names[i]][0] for m, i in survey.embeddings.items()},
        norms={m: blocks[survey.names[i]][0] for m, i in survey.norms.items()},
        layers=max([layers, *(1 + n for b in named if (n := layer_of(b)) is not None)]),
        unquantized=tuple(survey.unquantized),
    )


def _number_stacks(found: Sequence[Placed]) -> tuple[dict[str | None, int], int]:
    """The number of the first layer of each stack, and of all layers together."""
    sizes: dict[str | None, int] = {}
    for placed in found:
        if placed.site.stack is not None and placed.kind.parts[0] not in _OUTER_TYPES:
            stack = placed.site.stack
            sizes[stack] = max(sizes.get(stack, 0), placed.site.index + 1)
    starts = accumulate(sizes.values(), initial=0)
    return dict(zip(sizes, starts, strict=False)), sum(sizes.values())


def _blocks(placed: Placed, offsets: Mapping[str | None, int]) -> tuple[str, ...]:
    names = []
    for part in placed.kind.parts:
        if part not in BLOCK_TYPES or part in _OUTER_TYPES:
            names.append(part)
        elif placed.site.stack is not None:
            layer = offsets[placed.site.stack] + placed.site.index
            names.append(f"layers.{layer}.{part}")
        elif part == "norm":
            names.append(part)
        elif not offsets:
            names.append(f"layers.0.{part}")
        else:
            name = placed.site.fqn if is_gemm_module(placed.site.module) else placed.name
            raise PolicyError(
                f"{name} is {part} by its name or a hint, but lies outside the stacks of layers "
                f"({', '.join(filter(None, offsets))}): its layer is unknown. Say which block it "
                f"is: hints={{{name!r}: 'layers.0.{part}'}}."
            )
    return tuple(names)


def _with_attention(
    gemms: list[Placed], blocks: Mapping[str, tuple[str, ...]]
) -> list[tuple[Gemm, str]]:
    """(GEMM, path its name is taken from): the linears, and after its projections QK and PV."""
    last: dict[str, int] = {g.owner: i for i, g in enumerate(gemms)}
    queries = {g.owner for g in gemms if g.kind.query}
    values = {g.owner for g in gemms if any(block_type(b) == "vo" for b in blocks[g.name])}
    result = []
    for i, gemm in enumerate(gemms):
        parts = blocks[gemm.name]
        role = _ROLES.get(block_type(parts[0]), "linear")
        result.append((Gemm("", parts[0], role, gemm.name, parts), gemm.name))
        if last[gemm.owner] == i and gemm.owner in queries & values:
            layer = next(n for b in parts if (n := layer_of(b)) is not None)
            block = f"layers.{layer}.attn"
            for product in ("qk", "pv"):
                attention = Gemm("", block, f"attn_{product}", gemm.owner, (block,))
                result.append((attention, f"{gemm.owner}.{product}"))
    return result


def _unique_names(gemms: list[tuple[Gemm, str]]) -> tuple[Gemm, ...]:
    """Name each GEMM by its block and as few trailing components as tell it from the others."""
    depths = [_deepen(path, 0) for _, path in gemms]
    while True:
        names = [
            ".".join([gemm.block, *path.split(".")[-depth:]])
            for (gemm, path), depth in zip(gemms, depths, strict=True)
        ]
        counts = Counter(names)
        if max(counts.values(), default=1) == 1:
            break
        depths = [
            _deepen(path, depth) if counts[name] > 1 else depth
            for (_, path), depth, name in zip(gemms, depths, names, strict=True)
        ]
    return tuple(
        Gemm(name, gemm.block, gemm.role, gemm.module, gemm.parts)
        for name, (gemm, _) in zip(names, gemms, strict=True)
    )


def _deepen(path: str, depth: int) -> int:
    """One more component, and on while it is a mere number: "experts.3.w1", not "3.w1"."""
    components = path.split(".")
    depth = min(depth + 1, len(components))
    while depth < len(components) and components[-depth].isdigit():
        depth += 1
    return depth


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
