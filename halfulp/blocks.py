"""Model → block map: which block of the transformer each parameter and each GEMM belongs to.

Names are recognized by the ordered tables of halfulp/block_names.py; whatever they do not know is
an error that shows the hint to give. Nothing is guessed from shapes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import accumulate

from torch import nn

from halfulp.block_names import BLOCK_TYPES, NORM_NAME, Hints, Kind, globbed, look_up
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
        return "\n".join(f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c}".rstrip() for a, b, c in lines)


def block_type(block: str) -> str:
    """The type of a block: "layers.3.vo" → "vo", "head" → "head", "layers.3.attn" → "attn"."""
    return block.rpartition(".")[2]


def layer_of(block: str) -> int | None:
    """The layer of a block or of a GEMM name; None outside the layers."""
    match = re.match(r"layers\.(\d+)\.", block)
    return int(match[1]) if match else None


def is_gemm_module(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that calls one GEMM: nn.Linear or transformers' Conv1D."""
    names = {(c.__module__, c.__name__) for c in type(module).__mro__}
    if ("transformers.pytorch_utils", "Conv1D") in names:
        return True
    # nn.MultiheadAttention hands the weight of this subclass to a function: it is never called.
    return isinstance(module, nn.Linear) and not isinstance(
        module, nn.modules.linear.NonDynamicallyQuantizableLinear
    )


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
    survey = _Survey(Hints(hints or {}))
    for site in _walk(model):
        survey.visit(site)
    survey.hints.check_used([*survey.names.values(), *(g.name for g in survey.gemms)])
    if survey.problems:
        raise _unplaced(model, survey.problems)
    return survey.finish()


# The walk over the model, and what it collects.


@dataclass(frozen=True)
class _Site:
    fqn: str
    module: nn.Module
    stack: str | None  # the outermost stack of layers around the module
    index: int  # which of its entries
    path: str  # the name within that entry; the whole name outside a stack
    experts: bool  # a sibling is called experts: a `gate` beside it is a router


def _walk(model: nn.Module) -> Iterator[_Site]:
    """Every module once, in the order of `named_modules()`."""
    seen: set[int] = set()
    pending = [_Site("", model, None, 0, "", False)]
    while pending:
        site = pending.pop()
        if id(site.module) in seen:
            continue
        seen.add(id(site.module))
        yield site
        children = list(site.module.named_children())
        stack = site.stack is None and _is_stack(site.module)
        experts = any(name.endswith("experts") for name, _ in children)
        for name, child in reversed(children):
            fqn = f"{site.fqn}.{name}" if site.fqn else name
            if stack:
                pending.append(_Site(fqn, child, site.fqn, int(name), "", experts))
            else:
                path = f"{site.path}.{name}" if site.path else name
                pending.append(_Site(fqn, child, site.stack, site.index, path, experts))


def _is_stack(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList):
        return len(module) > 0
    children = dict(module.named_children())
    return (
        isinstance(module, (nn.Sequential, nn.ModuleDict))
        and bool(children)
        and all(name.isdigit() for name in children)
        and all(any(True for _ in child.children()) for child in children.values())
    )


@dataclass
class _Placed:
    """A parameter, GEMM or attention whose kind is known and whose layer number is not."""

    name: str
    site: _Site
    kind: Kind
    owner: str = ""  # of a GEMM: the module that holds the projection


@dataclass
class _Survey:
    hints: Hints
    parameters: dict[str, _Placed] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # id of a parameter → its first name
    gemms: list[_Placed] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)  # module → id of a parameter of it
    norms: dict[str, int] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # name, why, hint to give

    def visit(self, site: _Site) -> None:
        """Place one module and the parameters it owns itself."""
        own = {n: p for n, p in site.module._parameters.items() if p is not None}
        if is_gemm_module(site.module):
            self._visit_gemm(site, own)
        elif isinstance(site.module, nn.Embedding):
            self._visit_typed(site, own, "emb", self.embeddings)
        elif own and self._is_norm(site):
            self._visit_typed(site, own, "norm", self.norms)
        else:
            self._visit_raw(site, own)

    def _visit_gemm(self, site: _Site, own: Mapping[str, nn.Parameter]) -> None:
        kind = self.hints.find(site.fqn, f"{site.fqn}.weight") or _recognize(site, site.path)
        if kind is None:
            why = f"a {type(site.module).__name__} whose name says no block"
            self.problems.append((site.fqn, why, "ffn"))
            return
        if kind.quantized:
            end = len(site.fqn) - len(site.path) + kind.owner
            owner = site.fqn.rpartition(".")[0] if kind.owner < 0 else site.fqn[:end].rstrip(".")
            self.gemms.append(_Placed(site.fqn, site, kind, owner))
        else:
            self.unquantized.append(site.fqn)
        self._place_all(site, own, kind)

    def _visit_typed(
        self, site: _Site, own: Mapping[str, nn.Parameter], part: str, modules: dict[str, int]
    ) -> None:
        hint = self.hints.find(site.fqn, f"{site.fqn}.weight")
        if hint and not hint.quantized:
            self.unquantized.append(site.fqn)
        else:
            modules[site.fqn] = id(next(iter(own.values())))
        self._place_all(site, own, hint or Kind((part,)))

    def _is_norm(self, site: _Site) -> bool:
        leaf = site.fqn.rpartition(".")[2]
        if "norm" in type(site.module).__name__.lower() or NORM_NAME.search(leaf):
            return True
        hint = self.hints.find(site.fqn)
        return hint is not None and hint.parts[0].rpartition(".")[2] == "norm"

    def _visit_raw(self, site: _Site, own: Mapping[str, nn.Parameter]) -> None:
        """Parameters of a module that is no GEMM, embedding or norm: gates, experts, positions."""
        for name, parameter in own.items():
            fqn = f"{site.fqn}.{name}" if site.fqn else name
            path = f"{site.path}.{name}" if site.path else name
            if kind := self.hints.find(fqn, site.fqn):
                matrix = parameter.ndim > 1 and block_type(kind.parts[0]) not in ("emb", "norm")
                if matrix and kind.quantized:
                    self.problems.append((fqn, _matrix(parameter), f"{'+'.join(kind.parts)}:fp32"))
                elif not kind.quantized:
                    self.unquantized.append(fqn)
            else:
                kind = _recognize(site, path.removesuffix(".weight").removesuffix(".bias"))
                if kind is None:
                    why = f"a parameter of shape {tuple(parameter.shape)} whose name says no block"
                    self.problems.append((fqn, why, "ffn:fp32" if parameter.ndim > 1 else "ffn"))
                elif parameter.ndim > 1 and kind.parts[0] != "emb":
                    self.problems.append((fqn, _matrix(parameter), f"{'+'.join(kind.parts)}:fp32"))
            if kind is not None:
                self._place(fqn, parameter, site, kind)

    def _place_all(self, site: _Site, own: Mapping[str, nn.Parameter], kind: Kind) -> None:
        for name, parameter in own.items():
            fqn = f"{site.fqn}.{name}" if site.fqn else name
            self._place(fqn, parameter, site, self.hints.find(fqn, site.fqn) or kind)

    def _place(self, fqn: str, parameter: nn.Parameter, site: _Site, kind: Kind) -> None:
        first = self.names.setdefault(id(parameter), fqn)
        if first == fqn or kind.parts[0] == "emb":
            self.parameters[first] = _Placed(first, site, kind)

    def finish(self) -> BlockMap:
        """Number the layers, name the blocks and the GEMMs, add the attention GEMMs."""
        offsets, layers = self._number_stacks()
        blocks: dict[str, tuple[str, ...]] = {}
        for placed in [*self.parameters.values(), *self.gemms]:
            blocks[placed.name] = _blocks(placed, offsets)
        named = [b for names in blocks.values() for b in names]
        gemms = _with_attention(self.gemms, blocks)
        return BlockMap(
            gemms=_unique_names(gemms),
            parameters={name: blocks[name][0] for name in self.parameters},
            embeddings={m: blocks[self.names[i]][0] for m, i in self.embeddings.items()},
            norms={m: blocks[self.names[i]][0] for m, i in self.norms.items()},
            layers=max([layers, *(1 + n for b in named if (n := layer_of(b)) is not None)]),
            unquantized=tuple(self.unquantized),
        )

    def _number_stacks(self) -> tuple[dict[str | None, int], int]:
        sizes: dict[str | None, int] = {}
        for placed in [*self.parameters.values(), *self.gemms]:
            if placed.site.stack is not None and placed.kind.parts[0] not in _OUTER_TYPES:
                stack = placed.site.stack
                sizes[stack] = max(sizes.get(stack, 0), placed.site.index + 1)
        starts = accumulate(sizes.values(), initial=0)
        return dict(zip(sizes, starts, strict=False)), sum(sizes.values())


def _matrix(parameter: nn.Parameter) -> str:
    return (
        f"weights of shape {tuple(parameter.shape)} outside nn.Linear and Conv1D, "
        "not a GEMM that can be quantized"
    )


def _recognize(site: _Site, path: str) -> Kind | None:
    """What the tables say: the outer one first outside a stack and for an entry that is a leaf."""
    if site.stack is not None and path:
        if site.experts and path.rpartition(".")[2] == "gate":
            return Kind(("router",))
        return look_up(path, outer=False)
    return look_up(path or site.fqn, outer=True) or look_up(path, outer=False)


def _blocks(placed: _Placed, offsets: Mapping[str | None, int]) -> tuple[str, ...]:
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
            raise PolicyError(
                f"{placed.name} is {part} by its name, but lies outside the stacks of layers "
                f"({', '.join(filter(None, offsets))}): its layer is unknown. Say which block it "
                f"is: hints={{{placed.name!r}: 'layers.0.{part}'}}."
            )
    return tuple(names)


def _with_attention(
    gemms: list[_Placed], blocks: Mapping[str, tuple[str, ...]]
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


def _unplaced(model: nn.Module, problems: list[tuple[str, str, str]]) -> PolicyError:
    grouped: dict[str, tuple[int, str, str]] = {}
    for name, why, hint in problems:
        count = grouped.get(globbed(name), (0, "", ""))[0]
        grouped[globbed(name)] = (count + 1, why, hint)
    found = "".join(f"\n  {glob} ({n}): {why}" for glob, (n, why, _) in grouped.items())
    hints = ", ".join(f"{glob!r}: {hint!r}" for glob, (_, _, hint) in grouped.items())
    return PolicyError(
        f"cannot place {len(problems)} of the parameters and GEMM modules of "
        f"{type(model).__name__}:{found}\nSay what each of them is, for example "
        f"hints={{{hints}}}. Block types: {', '.join(BLOCK_TYPES)}; ':fp32' places weights whose "
        "products stay unquantized."
    )


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    spans: list[list[int]] = []
    for n in numbers:
        if spans and spans[-1][1] == n - 1:
            spans[-1][1] = n
        else:
            spans.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
