"""Depth profile: how rounding errors of the residual stream grow from block to block.

The stream is compared with an fp64 run at two points of each block, after its attention and after
its feed-forward part, and described by what the theory of arXiv:2503.10251 explains growth with:
the size r(x) of the stream and the weight functionals ω. These explain; they judge nothing.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from halfulp.block_names import layer_of
from halfulp.blocks import BlockMap, block_map
from halfulp.check.measure import low_copy
from halfulp.errors import CheckError

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)


@dataclass(frozen=True, kw_only=True)
class StreamPoint:
    """One point of the stream. Quantiles over tokens, in the order of QUANTILES.

    `comp` is max_i |d_i|/|x_i| per token, `linf` ‖d‖∞/‖x‖∞, `absolute` ‖d‖∞; `rms` the median
    over tokens of the rms of x, `norm` that of ‖x‖₂, `least` the smallest ‖x‖₂.
    """

    name: str  # "layers.3.attn" or "layers.3.ffn"
    comp: tuple[float, ...]
    linf: tuple[float, ...]
    absolute: tuple[float, ...]
    rms: float
    norm: float
    least: float


@dataclass(frozen=True, kw_only=True)
class Omegas:
    """What a layer's weights can enlarge, in the max norm; NaN where its layout is unknown."""

    ov: float  # ‖W_O‖∞ max_h ‖W_V^h‖∞
    kq: float  # 2/√d_h · max_h ‖rowL1(W_K^h)‖₂ ‖rowL1(W_Q^h)‖₂
    ud: float  # ‖W_up‖∞ ‖W_down‖∞; gated: the larger of gate and up


@dataclass(frozen=True, kw_only=True)
class DepthProfile:
    """Errors of a low-precision run at the points of the stream, and the weights' functionals."""

    dtype: str
    points: tuple[StreamPoint, ...]
    omegas: tuple[Omegas, ...]

    @property
    def slope(self) -> float:
        """Growth per block of log(median ‖d‖∞/‖x‖∞), by least squares; NaN for one block."""
        ends = [p.linf[2] for p in self.points if not p.name.endswith(".attn")]
        return log_slope(ends)


def log_slope(values: Sequence[float]) -> float:
    """Least-squares slope of log(values) over 0, 1, 2, …; NaN where it is not defined."""
    if len(values) < 2 or min(values) <= 0:
        return math.nan
    y = torch.tensor(values, dtype=torch.float64).log()
    x = torch.arange(len(values), dtype=torch.float64)
    x = x - x.mean()
    return ((x * y).sum() / x.square().sum()).item()


def profile_depth(
    model: nn.Module,
    inputs: Tensor,
    *,
    low: torch.dtype | Callable[[nn.Module], nn.Module] = torch.bfloat16,
    hints: Mapping[str, str] | None = None,
) -> DepthProfile:
    """The profile of `model` on `inputs` (token ids [B, T], or what the model takes).

    `low`: the dtype of the run that is compared with fp64 (as halfulp.check.measure.low_copy makes
    it), or a function from a copy of the model to the model that runs. `hints` as in
    halfulp.blocks. The model stays as it was.

    Raises CheckError for a model without layers, PolicyError for one that has no block map.
    """
    blocks = block_map(model, hints)
    reference = stream(reference_copy(model), inputs, blocks, in_fp64=True)
    name = _dtype_name(low)
    typed = isinstance(low, torch.dtype)
    run = low_copy(model, low).eval() if typed else low(copy.deepcopy(model).eval())
    measured = stream(run, inputs, blocks)
    points = tuple(_point(k, x, measured[k].double()) for k, x in reference.items())
    return DepthProfile(dtype=name, points=points, omegas=omegas(model, blocks))


def reference_copy(model: nn.Module) -> nn.Module:
    """A copy in fp64 and eval mode; run it inside `fp64()`."""
    return copy.deepcopy(model).double().eval()


@contextmanager
def fp64() -> Iterator[None]:
    """Makes what a model casts to fp32 on its own (norms, softmax, rotary angles) fp64."""
    with _Fp64():
        yield


class _Fp64(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {k: _widened(v) for k, v in (kwargs or {}).items()}
        if getattr(func, "__name__", "") == "float" and isinstance(args[0], Tensor):
            return args[0].double()
        return func(*map(_widened, args), **kwargs)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


@torch.no_grad()
def stream(
    model: nn.Module, inputs: Tensor, blocks: BlockMap, *, in_fp64: bool = False
) -> dict[str, Tensor]:
    """Point → the residual stream [B, T, d] there, from one forward pass of `model`."""
    seen: dict[str, Tensor] = {}
    handles = []
    if inputs.is_floating_point():
        inputs = inputs.to(next(model.parameters()).dtype)
    for n, path in enumerate(layer_paths(blocks)):
        layer = model.get_submodule(path)
        if norm := _middle_norm(path, n, blocks):
            handles.append(
                model.get_submodule(norm).register_forward_pre_hook(
                    _keep_input(seen, f"layers.{n}.attn"), with_kwargs=True
                )
            )
        handles.append(layer.register_forward_hook(_keep_output(seen, f"layers.{n}.ffn")))
    try:
        if in_fp64:
            with fp64():
                model(inputs)
        else:
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return dict(sorted(seen.items(), key=_depth))


def layer_paths(blocks: BlockMap) -> list[str]:
    """The module path of each layer.

    Raises CheckError for a model without a stack of layers.
    """
    inside: dict[int, list[str]] = {}
    for path, block in [*((g.module, g.block) for g in blocks.gemms), *blocks.norms.items()]:
        if (n := layer_of(block)) is not None:
            inside.setdefault(n, []).append(path)
    paths = [_common(inside[n]) for n in sorted(inside)]
    if not paths or not all(re.search(r"\d", path) for path in paths):
        raise CheckError(
            "a depth profile needs a stack of layers (a ModuleList of blocks), and the block map "
            f"of this model has {'none' if not paths else paths[0] or 'one without a name'}."
        )
    return paths


def _common(paths: Sequence[str]) -> str:
    """The innermost numbered module around all `paths`."""
    shared = [
        same[0]
        for same in itertools.takewhile(
            lambda parts: len(set(parts)) == 1, zip(*(p.split(".") for p in paths), strict=False)
        )
    ]
    while shared and not shared[-1].isdigit():
        shared.pop()
    return ".".join(shared)


def _middle_norm(path: str, layer: int, blocks: BlockMap) -> str | None:
    """The norm that reads the stream between attention and feed-forward, if there is one.

    Two norms: the second. Four (before and after each part): the third.
    """
    depth = path.count(".") + 1
    own = [
        name
        for name, block in blocks.norms.items()
        if layer_of(block) == layer and name.startswith(path + ".") and name.count(".") == depth
    ]
    return own[len(own) // 2] if len(own) in (2, 4) else None


def _keep_input(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[name] = _tensor(args or tuple(kwargs.values()))

    return hook


def _keep_output(seen: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        seen[name] = _tensor(output)

    return hook


def _tensor(value: Any) -> Tensor:
    return (value[0] if isinstance(value, tuple) else value).detach().clone()


def _depth(item: tuple[str, Tensor]) -> tuple[int, bool]:
    return layer_of(item[0]) or 0, item[0].endswith(".ffn")


def _dtype_name(low: Any) -> str:
    return str(low).removeprefix("torch.") if isinstance(low, torch.dtype) else "given model"


def _point(name: str, x: Tensor, y: Tensor) -> StreamPoint:
    x, d = x.flatten(0, -2), (y - x).abs().flatten(0, -2)
    size, norm = x.abs(), x.norm(dim=-1)
    top = d.amax(-1)
    ratio = torch.where(d == 0, 0.0, d / size)
    return StreamPoint(
        name=name,
        comp=_quantiles(ratio.amax(-1)),
        linf=_quantiles(top / size.amax(-1)),
        absolute=_quantiles(top),
        rms=(norm / math.sqrt(x.shape[-1])).median().item(),
        norm=norm.median().item(),
        least=norm.min().item(),
    )


def _quantiles(values: Tensor) -> tuple[float, ...]:
    q = torch.tensor(QUANTILES, dtype=values.dtype, device=values.device)
    return tuple(values.quantile(q).tolist())


# The functionals of the weights.

_UNKNOWN = math.nan
_ROLES = {
    "q": r"(q_proj|query|wq|q)$",
    "k": r"(k_proj|key|wk|k)$",
    "v": r"(v_proj|value|wv|v)$",
    "qkv": r"(c_attn|qkv_proj|query_key_value|qkv|wqkv)$",
    "o": r"(attn|attention)\b.*(o_proj|c_proj|out_proj|dense|wo|o|proj)$",
    "gate": r"(gate_proj|w1|gate)$",
    "up": r"(up_proj|c_fc|fc1|fc_in|w3|up|dense_h_to_4h)$",
    "down": r"(down_proj|fc2|fc_out|w2|down|dense_4h_to_h)$|mlp.*c_proj$",
}


def omegas(model: nn.Module, blocks: BlockMap) -> tuple[Omegas, ...]:
    """The functionals of each layer, in fp64; heads as the model's config says (else one)."""
    heads, groups = _heads(model)
    return tuple(
        _layer_omegas(layer_matrices(model, blocks, n), heads, groups) for n in range(blocks.layers)
    )


def layer_matrices(model: nn.Module, blocks: BlockMap, layer: int) -> dict[str, Tensor]:
    """Role (q, k, v, o, gate, up, down) → weight [out, in] in fp64, of those that were found."""
    found: dict[str, Tensor] = {}
    for gemm in blocks.gemms:
        if layer_of(gemm.block) != layer or gemm.role != "linear":
            continue
        module: Any = model.get_submodule(gemm.module)
        weight = module.weight.detach().double()
        if type(module).__name__ == "Conv1D":
            weight = weight.T
        roles = [r for r, pattern in _ROLES.items() if re.search(pattern, gemm.module)]
        if roles:
            found.setdefault(roles[0], weight)
    if "qkv" in found:
        found |= _split(found.pop("qkv"), *_heads(model))
    return found


def _heads(model: nn.Module) -> tuple[int, int]:
    config: Any = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None) or 1
    return heads, getattr(config, "num_key_value_heads", None) or heads


def _split(fused: Tensor, heads: int, groups: int) -> dict[str, Tensor]:
    size = fused.shape[0] // (heads + 2 * groups)
    parts = fused.split([heads * size, groups * size, groups * size])
    return dict(zip(("q", "k", "v"), parts, strict=True))


def _layer_omegas(w: Mapping[str, Tensor], heads: int, groups: int) -> Omegas:
    ov = kq = ud = _UNKNOWN
    if {"v", "o"} <= w.keys():
        ov = _inf_norm(w["o"]) * _inf_norm(w["v"])
    if {"q", "k"} <= w.keys():
        q, k = (
            w[r].abs().sum(-1).view(n, -1).norm(dim=-1) for r, n in (("q", heads), ("k", groups))
        )
        pairs = q * k.repeat_interleave(heads // groups)
        kq = 2 / math.sqrt(w["q"].shape[0] // heads) * pairs.max().item()
    if {"up", "down"} <= w.keys():
        ud = max(_inf_norm(w[r]) for r in ("up", "gate") if r in w) * _inf_norm(w["down"])
    return Omegas(ov=ov, kq=kq, ud=ud)


def _inf_norm(w: Tensor) -> float:
    """Largest row sum of absolute values: the most that the max norm can grow."""
    return w.abs().sum(-1).max().item()
