"""Sites: every tensor that a low-precision program rounds, found by walking one forward pass.

A `Walk` names each operation that makes floating-point values, `module:op#counter`, the same way
in every run of a model, and hands operands and outputs to a visitor: one that prices, one that
rounds, one that records dtypes. Three families of sites:

* stored: the output of an operation that computes, and every parameter and buffer.
* operand: one use of a tensor as an operand of a GEMM of the block map, what halfulp.quantize
  rounds.
* cast: an operand or a `.to()` that only some programs round (autocast, fp32 islands); whether a
  program does is known from its dtype trace (halfulp.check.trace).

Views, copies, selections, sign changes, products with powers of two and additive masks store
nothing new: they are no sites.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfulp.check.places import PRODUCTS, Places

MASKED = -1e8
"""Values at most this large belong to an additive mask: no format rounds or scales them."""


@dataclass(frozen=True, kw_only=True)
class SiteInfo:
    """One tensor that a low-precision program may round.

    `module` is the path of the innermost module that ran `op`, "" for the model itself. `block` is
    a block of the block map, "layers.N.attn" or "layers.N.residual". `gemm` and `operand` say of
    an operand site which GEMM of the block map it feeds and as what: "x" or "w" (qk: q and k; pv:
    p and v). `shape` is that of the tensor the format sees: operands have their K last.
    """

    name: str
    family: str  # stored | operand | cast
    module: str
    op: str  # "linear", "softmax", "mul", "parameter", …
    kind: str  # one of halfulp.check.places.KINDS
    block: str
    gemm: str = ""
    operand: str = ""
    shape: tuple[int, ...] = ()


class Visitor(Protocol):
    """What a walk calls; operand and output return the tensor that the program goes on with."""

    def operand(self, infos: tuple[SiteInfo, ...], x: Tensor, transposed: bool) -> Tensor:
        """`x` enters a GEMM; `transposed`: its K is the axis before the last."""
        ...

    def output(
        self, info: SiteInfo, x: Tensor, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        """`x` is what an operation made, or what a cast (family "cast") returned."""
        ...

    def writes(self, x: Tensor) -> None:
        """An operation is about to write into `x`."""
        ...


_ALIASES = {
    "truediv": "div", "itruediv": "div", "rtruediv": "div", "rdiv": "div", "idiv": "div",
    "true_divide": "div", "divide": "div", "imul": "mul", "rmul": "mul", "multiply": "mul",
    "iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "subtract": "sub",
    "ipow": "pow", "rpow": "pow", "rmatmul": "matmul", "imatmul": "matmul", "mm": "matmul",
}  # fmt: skip
_INPLACE = {"imul", "iadd", "isub", "itruediv", "idiv", "ipow", "imatmul"}
_CASTS = {"to", "type", "float", "half", "bfloat16", "double", "type_as"}
_EXACT = frozenset(
    word
    for line in (
        "view view_as reshape reshape_as transpose swapaxes swapdims permute movedim contiguous",
        "expand expand_as broadcast_to broadcast_tensors squeeze unsqueeze flatten unflatten",
        "ravel chunk split split_with_sizes tensor_split unbind getitem setitem get set narrow",
        "select t mT T H cat concat concatenate stack hstack vstack repeat repeat_interleave",
        "tile clone detach neg negative abs relu relu6 clamp clip clamp_min clamp_max hardtanh",
        "maximum minimum max min amax amin masked_fill masked_scatter masked_select where",
        "index_select index_put index_copy index_fill gather scatter take take_along_dim roll",
        "flip triu tril pad dropout embedding zeros ones full empty zeros_like ones_like",
        "full_like empty_like new_zeros new_ones new_full new_empty new_tensor zero fill copy",
        "arange linspace eye tensor as_tensor from_numpy scalar_tensor rand randn rand_like",
        "randn_like normal uniform bernoulli alpha_dropout feature_dropout topk sort as_strided",
        "unfold diagonal diag_embed round floor ceil trunc sign one_hot requires_grad cpu cuda",
        "data numpy item tolist nan_to_num atleast_1d atleast_2d retain_grad register_hook real",
        "alias set_grad_enabled meshgrid",
    )
    for word in line.split()
)
_GEMM_OPERANDS = {
    "linear": ("x", "w", "b"),
    "addmm": ("b", "x", "w"),
    "baddbmm": ("b", "x", "w"),
    "matmul": ("x", "w"),
    "bmm": ("x", "w"),
    "scaled_dot_product_attention": ("q", "k", "v"),
}
_KEYWORDS = {
    "x": ("input", "mat1", "batch1", "self"),
    "w": ("weight", "mat2", "batch2", "other"),
    "b": ("bias", "input"),
    "q": ("query",),
    "k": ("key",),
    "v": ("value",),
}
_FUSED = {"q": ("qk", "x"), "k": ("qk", "w"), "v": ("pv", "w")}


def op_name(func: Any) -> tuple[str, bool]:
    """(the operation's plain name, whether it writes into its first operand)."""
    name = getattr(func, "__name__", "") or type(func).__name__
    plain = name.strip("_")
    inplace = (name.endswith("_") and not name.endswith("__")) or plain in _INPLACE
    return _ALIASES.get(plain, plain), inplace


@dataclass
class Walk(TorchFunctionMode):
    """Names the operations of forward passes inside it and lets `visitor` at them.

    Use as a context around one forward pass. `lift_no_grad` keeps gradients on where the model
    turns them off, so that tables (RoPE) are priced too. After the pass `infos` lists the sites in
    the order of their names' first appearance, and `unpriced` the operations that make floats in a
    way a visitor cannot follow.
    """

    model: nn.Module
    places: Places
    visitor: Visitor
    lift_no_grad: bool = False
    infos: dict[str, SiteInfo] = field(default_factory=dict)
    unpriced: list[str] = field(default_factory=list)
    masked: list[str] = field(default_factory=list)  # additions of a mask: exact, no sites
    used: set[int] = field(default_factory=set)  # ids of the tensors that operations read

    def __post_init__(self) -> None:
        super().__init__()
        self._paths: list[str] = [""]
        self._counts: Counter[tuple[str, str]] = Counter()
        self._masks: dict[tuple, bool] = {}
        # Decided here, on the model as it is given: a visitor may round the gains.
        self._plain_gains = {id(p) for p in self.model.parameters() if _all_powers(p)}
        self._handles: list[Any] = []

    def __enter__(self):
        self._counts.clear()
        self._paths = [""]
        for path, module in self.model.named_modules():
            self._handles.append(module.register_forward_pre_hook(self._entering(path)))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))
        return super().__enter__()

    def __exit__(self, *exc):
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        return super().__exit__(*exc)

    def _entering(self, path: str):
        def enter(module: nn.Module, inputs: object) -> None:
            self._paths.append(path)

        return enter

    def _leave(self, module: nn.Module, inputs: object, output: object) -> None:
        self._paths.pop()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        op, inplace = op_name(func)
        if self.lift_no_grad and func is torch._C._set_grad_enabled and args == (False,):
            return None
        inputs = _tensors(args, kwargs)
        self.used.update(id(t) for t in inputs if t.is_leaf)
        if inputs and (inplace or op == "setitem" or "out" in kwargs):
            self.visitor.writes(kwargs.get("out", inputs[0]))
        if op in _EXACT:
            return self._carry(op, func(*args, **kwargs), args)
        if op in _CASTS:
            return self._cast(op, func(*args, **kwargs), args)
        path = self._paths[-1]
        if not inputs:
            return func(*args, **kwargs)
        gemm = None
        if op in _GEMM_OPERANDS or op in PRODUCTS:
            product = self._counts[path, "product"]
            self._counts[path, "product"] += op in PRODUCTS
            gemm = self.places.gemm(path, op, product)
        index = self._counts[path, op]
        self._counts[path, op] += 1
        name = f"{path}:{op}#{index}"
        if op in _GEMM_OPERANDS:
            args, kwargs = self._operands(op, name, gemm, args, kwargs)
        exact = self._stores_nothing(op, name, args, inputs)
        out = func(*args, **kwargs)
        tags = [tag for t in inputs if (tag := _tag(t))]
        kind = self.places.kind(path, op, tags, gemm)
        return self._outputs(op, name, kind, out, inputs, inplace, exact)

    def _outputs(self, op, name, kind, out, inputs, inplace, exact):
        if isinstance(out, Tensor):
            return self._output(op, name, kind, out, inputs, inplace, exact)
        if isinstance(out, tuple | list):
            parts = [
                self._output(op, f"{name}.{i}", kind, o, inputs, inplace, exact)
                if isinstance(o, Tensor)
                else o
                for i, o in enumerate(out)
            ]
            # Named tuples (torch.return_types) take one sequence, like tuple itself.
            return type(out)(parts)
        return out

    def _output(self, op, name, kind, out, inputs, inplace, exact):
        if not out.is_floating_point():
            if out.is_complex():
                self.unpriced.append(name)
            return out
        if out.layout is not torch.strided:
            self.unpriced.append(name)
        elif not exact:
            info = self._info(name, "stored", op, kind, shape=tuple(out.shape))
            out = self.visitor.output(info, out, inputs, inplace)
        _set_tag(out, kind)
        return out

    def _info(self, name: str, family: str, op: str, kind: str, **fields: Any) -> SiteInfo:
        if name not in self.infos:
            path = self._paths[-1]
            block = fields.pop("block", None) or self.places.block(path)
            self.infos[name] = SiteInfo(
                name=name, family=family, module=path, op=op, kind=kind, block=block, **fields
            )
        return self.infos[name]

    def _carry(self, op: str, out: Any, args: tuple) -> Any:
        """Give what a view or a copy returns the kind of what it was made from."""
        kind = next((tag for t in _tensors(args, {}) if (tag := _tag(t))), "")
        if not kind:
            return out
        if isinstance(out, Tensor):
            _set_tag(out, _tag(out) or kind)
        elif isinstance(out, tuple | list):
            kinds = ("q", "k", "v") if kind == "qkv" and len(out) == 3 else (kind,) * len(out)
            for part, name in zip(out, kinds, strict=True):
                if isinstance(part, Tensor):
                    _set_tag(part, name)
        return out

    def _cast(self, op: str, out: Any, args: tuple) -> Any:
        x = args[0]
        if not (isinstance(out, Tensor) and out.is_floating_point() and x.is_floating_point()):
            return out
        path = self._paths[-1]
        name = f"{path}:cast#{self._counts[path, 'cast']}"
        self._counts[path, "cast"] += 1
        kind = _tag(x) or "other"
        info = self._info(name, "cast", "cast", kind, shape=tuple(out.shape))
        out = self.visitor.output(info, out, (x,), False)
        _set_tag(out, kind)
        return out

    def _operands(self, op, name, gemm, args, kwargs):
        """Let the visitor replace the operands of a GEMM, wherever in the call they stand."""
        args, kwargs = list(args), dict(kwargs)
        names = {
            "x": ("input", "mat1", "batch1", "self"),
            "w": ("weight", "mat2", "batch2", "other"),
        }
        names |= {"b": ("bias", "input"), "q": ("query",), "k": ("key",), "v": ("value",)}
        for i, operand in enumerate(_GEMM_OPERANDS[op]):
            keys = [k for k in names[operand] if k in kwargs]
            x = args[i] if i < len(args) else kwargs[keys[0]] if keys else None
            if not isinstance(x, Tensor) or not x.is_floating_point():
                continue
            transposed = operand == "w" and op != "linear" and x.ndim > 1
            infos = self._operand_infos(op, name, gemm, operand, x, transposed)
            x = self.visitor.operand(infos, x, transposed)
            if i < len(args):
                args[i] = x
            else:
                kwargs[keys[0]] = x
        return tuple(args), kwargs

    def _operand_infos(self, op, name, gemm, operand, x, transposed) -> tuple[SiteInfo, ...]:
        shape = tuple(x.mT.shape if transposed else x.shape)
        kind = _tag(x) or ("weight" if operand in "wb" else "other")
        infos = [self._info(f"{name}.{operand}", "cast", op, kind, operand=operand, shape=shape)]
        if op == "scaled_dot_product_attention" and self._paths[-1] in self.places.attention:
            product, operand = _FUSED[operand]
            gemm = self.places.attention[self._paths[-1]][product == "pv"]
        if gemm is not None and operand in ("x", "w"):
            fields = {"gemm": gemm.name, "operand": operand, "shape": shape, "block": gemm.block}
            info = self._info(f"{gemm.name}/fprop.{operand}", "operand", op, kind, **fields)
            infos.append(info)
        return tuple(infos)

    def _stores_nothing(self, op: str, name: str, args: tuple, inputs: tuple[Tensor, ...]) -> bool:
        """Whether the operation is exact: powers of two as factors, or an additive mask."""
        if op in ("mul", "div"):
            numbers = args[1:] if op == "div" else args
            if any(isinstance(a, int | float) and _power_of_two(a) for a in numbers):
                return True
            return any(id(a) in self._plain_gains for a in numbers)
        if op == "add":
            tags = [_tag(t) for t in inputs]
            masks = [t for t, tag in zip(inputs, tags, strict=True) if tag != "scores"]
            if "scores" in tags and any(map(self._is_mask, masks)):
                self.masked.append(name)
                return True
        return False

    def _is_mask(self, t: Tensor) -> bool:
        key = (t.data_ptr(), tuple(t.shape), tuple(t.stride()), t._version)
        if key not in self._masks:
            self._masks[key] = bool(((t == 0) | (t <= MASKED)).all())
        return self._masks[key]


def _tag(x: Tensor) -> str:
    return x.__dict__.get("halfulp_kind", "")


def _set_tag(x: Any, kind: str) -> None:
    if type(x) is Tensor:  # never on a user's parameter
        x.__setattr__("halfulp_kind", kind)


def _power_of_two(value: float) -> bool:
    return value != 0 and math.isfinite(value) and abs(math.frexp(value)[0]) == 0.5


def _all_powers(x: Tensor) -> bool:
    """Whether every element is a power of two: untrained gains are all one."""
    return x.ndim <= 1 and bool((torch.frexp(x.detach().float())[0].abs() == 0.5).all())


def _tensors(args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, tuple | list):
            found += [v for v in value if isinstance(v, Tensor)]
    return tuple(found)


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer as a site; `transposed`: its output channels are the last axis."""

    info: SiteInfo
    tensor: Tensor
    transposed: bool


def parameter_sites(model: nn.Module, places: Places) -> dict[int, Stored]:
    """Every floating-point parameter and buffer as a stored site, by id; tied ones once."""
    found: dict[int, Stored] = {}
    for op, named in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, x in named:
            if not (x.is_floating_point() and x.numel()):
                continue
            module = name.rpartition(".")[0]
            owner = model.get_submodule(module)
            conv1d = module in places.linear and not isinstance(owner, nn.Linear) and x.ndim == 2
            block, kind = places.parameter(name)
            info = SiteInfo(
                name=f"{'weight' if op == 'parameter' else op}:{name}",
                family="stored",
                module=module,
                op=op,
                kind=kind if op == "parameter" else "other",
                block=block,
                shape=tuple(x.mT.shape if conv1d else x.shape),
            )
            found[id(x)] = Stored(info, x, conv1d)
    return found
