"""The modules of a model one by one: which parameters and GEMMs they hold, and of what kind."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch import nn

from halfulp.block_names import BLOCK_TYPES, NORM_NAME, Hints, Kind, block_type, globbed, look_up
from halfulp.errors import PolicyError

# nn.MultiheadAttention hands the weight of this subclass to a function.
_NeverCalled = nn.modules.linear.NonDynamicallyQuantizableLinear
# Forward methods that compute x wᵀ + bias and nothing else.
_LINEAR_FORWARDS = {
    ("torch.nn.modules.linear", "Linear"),
    ("transformers.pytorch_utils", "Conv1D"),
    ("transformers.models.falcon.modeling_falcon", "FalconLinear"),
    ("halfulp.quantized_modules", "QuantizedLinear"),
}


def is_gemm_module(module: nn.Module) -> bool:
    """Whether `module` is a linear layer that calls one GEMM: nn.Linear or transformers' Conv1D.

    Not so a subclass or an instance with a forward method of its own, which may do anything.
    """
    if isinstance(module, _NeverCalled):
        return False
    owner = next(c for c in type(module).__mro__ if "forward" in vars(c))
    known = (owner.__module__, owner.__name__) in _LINEAR_FORWARDS
    return known and "forward" not in vars(module)


@dataclass(frozen=True)
class Site:
    """One module, and where it stands."""

    fqn: str
    module: nn.Module
    stack: str | None  # the outermost stack of layers around the module
    index: int  # which of its entries
    path: str  # the name within that entry; the whole name outside a stack
    experts: bool  # a sibling is called experts: a `gate` beside it is a router


def _walk(model: nn.Module) -> Iterator[Site]:
    """Every module once, in the order of `named_modules()`."""
    seen: set[int] = set()
    pending = [Site("", model, None, 0, "", False)]
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
                pending.append(Site(fqn, child, site.fqn, int(name), "", experts))
            else:
                path = f"{site.path}.{name}" if site.path else name
                pending.append(Site(fqn, child, site.stack, site.index, path, experts))


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
class Placed:
    """A parameter, GEMM or attention whose kind is known and whose layer number is not."""

    name: str
    site: Site
    kind: Kind
    owner: str = ""  # of a GEMM: the module that holds the projection


@dataclass
class Survey:
    """What has been found so far; names are those of parameters and modules in the model."""

    hints: Hints
    parameters: dict[str, Placed] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)  # id of a parameter → its first name
    gemms: list[Placed] = field(default_factory=list)
    embeddings: dict[str, int] = field(default_factory=dict)  # module → id of a parameter of it
    norms: dict[str, int] = field(default_factory=dict)
    unquantized: list[str] = field(default_factory=list)
    problems: list[tuple[str, str, str]] = field(default_factory=list)  # name, why, hint to give

    def visit(self, site: Site) -> None:
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

    def _visit_gemm(self, site: Site, own: Mapping[str, nn.Parameter]) -> None:
        kind = self.hints.find(site.fqn, f"{site.fqn}.weight") or _recognize(site, site.path)
        if kind is None:
            why = f"a {type(site.module).__name__} whose name says no block"
            self.problems.append((site.fqn, why, _unknown(site)))
            return
        if kind.quantized:
            end = len(site.fqn) - len(site.path) + kind.owner
            owner = site.fqn.rpartition(".")[0] if kind.owner < 0 else site.fqn[:end].rstrip(".")
            self.gemms.append(Placed(site.fqn, site, kind, owner))
        else:
            self.unquantized.append(site.fqn)
        self._place_all(site, own, kind)

    def _visit_typed(
        self, site: Site, own: Mapping[str, nn.Parameter], part: str, modules: dict[str, int]
    ) -> None:
        hint = self.hints.find(site.fqn, f"{site.fqn}.weight")
        if hint and not hint.quantized:
            self.unquantized.append(site.fqn)
        else:
            modules[site.fqn] = id(next(iter(own.values())))
        self._place_all(site, own, hint or Kind((part,)))

    def _is_norm(self, site: Site) -> bool:
        leaf = site.fqn.rpartition(".")[2]
        if "norm" in type(site.module).__name__.lower() or NORM_NAME.search(leaf):
            return True
        hint = self.hints.find(site.fqn)
        return hint is not None and hint.parts[0].rpartition(".")[2] == "norm"

    def _visit_raw(self, site: Site, own: Mapping[str, nn.Parameter]) -> None:
        """Parameters of a module that is no GEMM, embedding or norm: gates, experts, positions."""
        for name, parameter in own.items():
            fqn = f"{site.fqn}.{name}" if site.fqn else name
            path = f"{site.path}.{name}" if site.path else name
            hint = self.hints.find(fqn, site.fqn)
            kind = hint or _recognize(site, path.removesuffix(".weight").removesuffix(".bias"))
            if kind is None:
                why = f"a parameter of shape {tuple(parameter.shape)} whose name says no block"
                fp32 = ":fp32" if parameter.ndim > 1 else ""
                self.problems.append((fqn, why, _unknown(site) + fp32))
                continue
            unrounded = ("emb", "norm") if hint else ("emb",)
            if not kind.quantized:
                self.unquantized.append(fqn)
            elif parameter.ndim > 1 and block_type(kind.parts[0]) not in unrounded:
                why = _matrix(parameter, site.module)
                self.problems.append((fqn, why, f"{'+'.join(kind.parts)}:fp32"))
            self._place(fqn, parameter, site, kind)

    def _place_all(self, site: Site, own: Mapping[str, nn.Parameter], kind: Kind) -> None:
        for name, parameter in own.items():
            fqn = f"{site.fqn}.{name}" if site.fqn else name
            self._place(fqn, parameter, site, self.hints.find(fqn, site.fqn) or kind)

    def _place(self, fqn: str, parameter: nn.Parameter, site: Site, kind: Kind) -> None:
        first = self.names.setdefault(id(parameter), fqn)
        if first == fqn or kind.parts[0] == "emb":
            self.parameters[first] = Placed(first, site, kind)


def survey_of(model: nn.Module, hints: Hints) -> Survey:
    """All modules visited; PolicyError as in halfulp.blocks.block_map."""
    survey = Survey(hints)
    for site in _walk(model):
        survey.visit(site)
    hints.check_used([*survey.names.values(), *(g.name for g in survey.gemms)])
    if survey.problems:
        raise _unplaced(model, survey.problems)
    return survey


def _unknown(site: Site) -> str:
    """A block that a thing of unknown name may belong to where it stands, as an example."""
    return "head" if site.stack is None else "ffn"


def _matrix(parameter: nn.Parameter, module: nn.Module) -> str:
    where = "outside nn.Linear and Conv1D"
    if isinstance(module, nn.Linear) and not isinstance(module, _NeverCalled):
        where = f"in a {type(module).__name__}, which has a forward method of its own"
    return f"weights of shape {tuple(parameter.shape)} {where}, not a GEMM that can be quantized"


def _recognize(site: Site, path: str) -> Kind | None:
    """What the tables say: the outer one first outside a stack and for an entry that is a leaf."""
    if site.stack is not None and path:
        if site.experts and path.rpartition(".")[2] == "gate":
            return Kind(("router",))
        return look_up(path, outer=False)
    return look_up(path or site.fqn, outer=True) or look_up(path, outer=False)


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
