"""AdamW with weights and moments stored in any format, and the update rounded as asked.

    m ← m + (g − m)(1 − β₁)          v ← v β₂ + g² (1 − β₂)
    w ← Q_w( w (1 − lr λ) − m / (√v / √(1 − β₂ᵗ) + ε) · lr / (1 − β₁ᵗ) ),   m ← Q_m(m),  v ← Q_v(v)

(Loshchilov & Hutter 2019; the update uses the moments before they are rounded for storage.) With
weight="bf16" and update_rounding="stochastic" this is the recipe of arXiv:2502.20566.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from halfulp.errors import ConfigError
from halfulp.numerics import kernel
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.cuda import adamw, use_cuda
from halfulp.numerics.quantizer import Quantizer, check_stored, parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to, use_c
from halfulp.optim.counters import update_counters

_FORMATS = ("weight", "moment_m", "moment_v")


class AdamW(torch.optim.Optimizer):
    """AdamW over `params`: tensors, (name, tensor) pairs, or groups.

    * `weight`: quantizer of the stored weight, e.g. "bf16"; parameters are put on its grid when the
      optimizer is made. fp32 parameters carry the values; bf16 parameters need "bf16".
    * `update_rounding`: nearest, stochastic or truncate. Random bits depend on (seed, parameter
      name, step, element index in the unsharded parameter) only.
    * `moment_m`, `moment_v`: quantizers of the stored moments.

    Groups may override every keyword and carry `block`, which names them in `counters()`.
    Raises ConfigError for values out of range and FormatError for unknown formats.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        *,
        weight: str = "fp32",
        update_rounding: str = "nearest",
        moment_m: str = "fp32",
        moment_v: str = "fp32",
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "weight": weight,
            "update_rounding": update_rounding,
            "moment_m": moment_m,
            "moment_v": moment_v,
            "block": "",
        }
        self.seed = seed
        self._counting = False
        self._rows: list[dict] = []
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; the group's parameters are put on the grid of its weight format."""
        super().add_param_group(param_group)
        group, i = self.param_groups[-1], len(self.param_groups) - 1
        _check_group(group)
        # Names key the random bits; parameters without one are told apart by their place.
        group.setdefault("names", [f"group{i}.{j}" for j in range(len(group["params"]))])
        self._put_on_grid(group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but moments stay fp32 where torch would cast them to the parameter's bf16.

        The saved groups' rates and formats come into force. Raises ConfigError when they are not
        of this class or cannot store these parameters.
        """
        for saved, group in zip(state_dict["param_groups"], self.param_groups, strict=False):
            if missing := [key for key in self.defaults if key not in saved]:
                raise ConfigError(
                    f"the saved optimizer has no {', '.join(missing)} in its groups: it is not "
                    "halfulp's AdamW. Load a state that halfulp's AdamW saved, or start without."
                )
            _check_group(saved)
            _check_dtypes(group, parse_quantizer(saved["weight"]))
            _check_shards({**group, **{key: saved[key] for key in self.defaults}})
        super().load_state_dict(state_dict)
        parameters = (p for group in self.param_groups for p in group["params"])
        indices = (i for group in state_dict["param_groups"] for i in group["params"])
        for p, i in zip(parameters, indices, strict=True):
            saved = state_dict["state"].get(i, {})
            for name in ("m", "v"):
                if name in saved:
                    self.state[p][name] = saved[name].to(p.device, torch.float32, copy=True)

    def count(self, on: bool) -> None:
        """Whether the next steps record counters (such a step is slower, with the same bits)."""
        self._counting = on

    def counters(self) -> list[dict]:
        """Counters since the last call, one row per parameter; see halfulp.optim.counters."""
        rows, self._rows = self._rows, []
        return rows

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for name, p in _named(group):
                if p.grad is not None:
                    self._update(group, name, p)
        return loss

    def _update(self, group: dict, name: str, p: Tensor) -> None:
        state = self.state[p]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["m"], state["v"] = (_zeros_like(p) for _ in "mv")
        state["step"] += 1
        step = int(state["step"])
        weight, index = _local(p), _offset(p)
        grad, m, v = (_local(t) for t in (p.grad, state["m"], state["v"]))
        if grad.layout is not torch.strided:
            raise ConfigError(
                f"the gradient of parameter {name} is sparse; AdamW moves every weight at every "
                "step. Make its embedding with sparse=False."
            )
        key = Key.of(self.seed, f"{name}/update").fold(step)
        scalars = _scalars(group, step)
        q = parse_quantizer(group["weight"])
        fused = _fused(q, weight, grad, m, v) and index % 2**32 + weight.numel() <= 2**32
        if fused and not self._counting:
            _step_fused(weight, grad, m, v, q, group["update_rounding"], key, index, scalars)
        else:
            self._step_torch(group, name, weight, grad, m, v, key, index, scalars)
        for moment, which in ((m, "moment_m"), (v, "moment_v")):
            stored = parse_quantizer(group[which])
            if not stored.is_identity:
                moment_key = Key.of(self.seed, f"{name}/{which}").fold(step)
                flat = torch.atleast_1d(moment)
                apply_quantizer(flat, stored, key=moment_key, out=flat)
        if self._counting:
            vanished = ((v == 0) & (grad != 0)).sum().item()
            self._rows[-1]["v_underflow"] = vanished / max(v.numel(), 1)

    def _step_torch(
        self, group: dict, name: str, w: Tensor, grad: Tensor, m: Tensor, v: Tensor,
        key: Key, index: int, scalars: dict[str, float],
    ) -> None:  # fmt: skip
        q, rounding = parse_quantizer(group["weight"]), group["update_rounding"]
        g, old = grad.float(), w.float()
        m.copy_(m + (g - m) * scalars["one_minus_beta1"])
        v.copy_(v * scalars["beta2"] + (g * g) * scalars["one_minus_beta2"])
        root = v.double().sqrt().float()  # torch's fp32 sqrt on CPU (MKL) is not correctly rounded
        update = m / (root * scalars["correction"] + scalars["eps"]) * scalars["lr"]
        exact = old * scalars["decay"] - update
        new = _store(exact, q, rounding, key, index)
        if self._counting:
            row = {"block": group["block"], "parameter": name, "weight_format": str(q)}
            row |= update_counters(old, exact, new, q, rounding, scalars["decay"])
            self._rows.append(row)
        w.copy_(new)

    @torch.no_grad()
    def _put_on_grid(self, group: dict) -> None:
        q = parse_quantizer(group["weight"])
        _check_dtypes(group, q)
        _check_shards(group)
        for p in group["params"]:
            if p.dtype is torch.float32 and not q.is_identity:
                local = _local(p)
                local.copy_(_store(local.contiguous(), q, "nearest", None, 0))


def _check_dtypes(group: dict, weight: Quantizer) -> None:
    """ConfigError for parameters that cannot carry weights stored as `weight`."""
    for name, p in _named(group):
        if p.dtype not in (torch.float32, torch.bfloat16):
            raise ConfigError(
                f"parameter {name} is {p.dtype}; AdamW updates fp32 and bf16 parameters. "
                "Convert the model with model.float() and say weight= for the storage format."
            )
        if p.dtype is torch.bfloat16 and weight.format.name != "bf16":
            raise ConfigError(
                f"parameter {name} is bf16 and the optimizer stores weights as {weight}. Pass "
                'weight="bf16", or convert the model with model.float().'
            )


def _check_shards(group: dict) -> None:
    """ConfigError for parts of parameters where the format or the draw needs the whole."""
    stored = {name: parse_quantizer(group[name]) for name in _FORMATS}
    whole = [str(q) for q in stored.values() if q.granularity != "element" or q.stochastic]
    for name, p in _named(group):
        splits = [getattr(placement, "dim", None) for placement in getattr(p, "placements", ())]
        draws = group["update_rounding"] == "stochastic" and any(splits)
        if draws or (whole and any(dim is not None for dim in splits)):
            found = f"stores {whole[0]}" if whole else "rounds updates stochastically"
            raise ConfigError(
                f"parameter {name} is sharded along {splits} and the optimizer {found}, which "
                "needs the whole parameter. Shard along dimension 0 and store formats without "
                "scale, with moments rounded to nearest."
            )


def update_of(optimizer: AdamW, group: dict, p: Tensor) -> Tensor:
    """What the last step subtracted from `p`, without weight decay and rounding."""
    state = optimizer.state[p]
    scalars = _scalars(group, int(state["step"]))
    root = state["v"].sqrt() * scalars["correction"] + scalars["eps"]
    return state["m"] / root * scalars["lr"]


def _store(x: Tensor, q: Quantizer, rounding: str, key: Key | None, index: int) -> Tensor:
    """`x` (fp32) as the weight's format holds it."""
    if q.is_identity:
        return x
    if q.scale == "none":
        return round_to(x, q.format, rounding=rounding, key=key, index=index, saturate=q.saturate)
    row = torch.atleast_1d(x)
    return apply_quantizer(row, replace(q, rounding=rounding), key=key).view(x.shape)


def _fused(q: Quantizer, *tensors: Tensor) -> bool:
    """Whether a one-pass kernel serves these tensors and this weight format."""
    overflows = not q.saturate and q.format.overflow != "saturate"
    simple = q.is_identity or (q.scale == "none" and q.format.exponent_bits == 8 and overflows)
    weight, grad, *moments = tensors
    dtypes = (torch.float32, torch.bfloat16)
    return (
        simple
        and (use_c(*tensors) or use_cuda(*tensors))
        and weight.dtype in dtypes
        and grad.dtype in dtypes
        and all(t.dtype is torch.float32 for t in moments)
        and weight.numel() < 1 << 31
    )


def _step_fused(
    w: Tensor, grad: Tensor, m: Tensor, v: Tensor, q: Quantizer, rounding: str,
    key: Key, index: int, scalars: dict[str, float],
) -> None:  # fmt: skip
    high, low = divmod(index, 1 << 32)
    key = key.fold(high) if high else key
    torch.autograd.graph.increment_version(w)  # the kernels write behind autograd's back
    if w.is_cuda:
        fmt = None if q.is_identity else q.format
        adamw(w, grad, m, v, fmt, rounding, key, low, tuple(scalars.values()))
        return
    status = kernel.status()
    assert status.library is not None
    plan = None if q.is_identity else kernel.plan(q.format, rounding, q.saturate)
    numbers = kernel.floats(tuple(scalars.values()))
    status.library.halfulp_adamw(
        status.parallel, w.data_ptr(), grad.data_ptr(), m.data_ptr(), v.data_ptr(), w.numel(), plan,
        numbers, key.k0, key.k1, low, w.dtype is torch.bfloat16, grad.dtype is torch.bfloat16,
    )  # fmt: skip


def _scalars(group: dict, step: int) -> dict[str, float]:
    """In the order of struct Scalars of adamw.c."""
    beta1, beta2 = group["betas"]
    return {
        "decay": 1 - group["lr"] * group["weight_decay"],
        "one_minus_beta1": 1 - beta1,
        "beta2": beta2,
        "one_minus_beta2": 1 - beta2,
        "correction": 1 / math.sqrt(1 - beta2**step),
        "eps": group["eps"],
        "lr": group["lr"] / (1 - beta1**step),
    }


def _named(group: dict) -> list[tuple[str, Tensor]]:
    names = group.get("param_names") or group["names"]
    return list(zip(names, group["params"], strict=True))


def _zeros_like(p: Tensor) -> Tensor:
    return torch.zeros_like(p, dtype=torch.float32, memory_format=torch.contiguous_format)


def _local(t: Tensor | None) -> Tensor:
    """The shard of a DTensor that this rank holds; other tensors as they are."""
    assert t is not None
    plain = type(t) in (Tensor, torch.nn.Parameter)  # hasattr is slow where it fails
    return t if plain else (t.to_local() if hasattr(t, "to_local") else t.detach())  # pyright: ignore


def _offset(p: Tensor) -> int:
    """Index of the shard's first element in the whole parameter (shards split dimension 0)."""
    if not hasattr(p, "to_local"):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offsets = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)  # pyright: ignore
    return int(offsets[0]) * (p.numel() // max(p.shape[0], 1)) if offsets else 0


def _number(value: object) -> float:
    """The value of a number or of a tensor of one; NaN, which is in no range, of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        return math.nan
    return float(value)


def _check_group(group: dict) -> None:
    least = {"lr": 0.0, "eps": 5e-324, "weight_decay": 0.0}
    betas = group["betas"]
    checks = {name: _number(group[name]) >= bound for name, bound in least.items()}
    checks |= {
        "betas": isinstance(betas, tuple | list)
        and len(betas) == 2
        and all(0 <= _number(b) < 1 for b in betas),
        "update_rounding": group["update_rounding"] in ("nearest", "stochastic", "truncate"),
    }
    for name, ok in checks.items():
        if not ok:
            raise ConfigError(f"AdamW: {name}={group[name]!r} is out of range. Correct its value.")
    for option in ("amsgrad", "maximize"):
        if group.get(option):
            raise ConfigError(f"AdamW has no {option}. Leave it out, or use torch.optim.AdamW.")
    for name in _FORMATS:
        refused = ("stochastic", "truncate") if name == "weight" else ()
        q = parse_quantizer(group[name])
        check_stored(q, name, refused=refused, cure=f"Give update_rounding={q.rounding!r}.")
