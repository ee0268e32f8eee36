"""A site of one quantized GEMM: its quantizers, random keys, scale histories and counters.

The autograd function below holds the three GEMMs of y = x wᵀ. An operand that two GEMMs quantize in
the same way, with a scale that does not depend on the direction, is quantized once.
"""

import math
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from halfulp.errors import ConfigError
from halfulp.numerics.apply import apply_quantizer, delayed_scale
from halfulp.numerics.gemm import (
    Accumulation,
    choose_carrier,
    encode,
    multiply,
    multiply_bf16,
    multiply_int8,
    parse_accumulation,
    require_fp32,
)
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key, fold_tensor
from halfulp.numerics.scaling import amax_bits
from halfulp.numerics.statistics import merge, quantizer_statistics
from halfulp.recipe import OPERANDS, GemmSpec

_OTHER = {"dgrad_w": "fprop_w", "wgrad_x": "fprop_x", "wgrad_g": "dgrad_g"}


class Clock:
    """Where a run is: the step and micro-batch that select the random bits, and what is on."""

    def __init__(self) -> None:
        self.step = self.micro = 0
        self.enabled, self.counting = True, False
        self.tensor = torch.zeros(2, dtype=torch.int32)  # the same, for traced graphs
        self.differentiated: tuple[int, int] | None = None  # time of the pass now differentiated
        self.recent = Recent()

    def set(self, step: int, micro: int) -> None:
        self.step, self.micro = step, micro
        self.tensor[0], self.tensor[1] = step, micro

    def time_backward(self, output: object) -> None:
        """Let the backward pass from `output` know the time of its forward pass."""
        time = self.step, self.micro

        def differentiate(_: Tensor) -> None:
            self.differentiated = time

        for x in tree_leaves(output):
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(differentiate)

    def refuse_other_time(self) -> None:
        """ConfigError if activation checkpointing repeats a forward pass of another time."""
        inside = torch._C._current_graph_task_id() != -1  # pyright: ignore
        if inside and self.differentiated not in (None, (self.step, self.micro)):
            raise ConfigError(
                f"activation checkpointing repeats the forward pass of step, micro-batch "
                f"{self.differentiated} after another one at {self.step, self.micro}: it would "
                "round otherwise than it did. Call backward() after every forward pass, or run "
                "the passes of one loss at one time: handle.set_step(step) before the first."
            )


class Recent:
    """The last input quantized, for the linears that share it: q, k and v, or gate and up."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Between two forward passes a buffer may be filled anew behind torch's back."""
        self.facts: tuple | None = None
        self.copy: Tensor | None = None

    def find(self, x: Tensor, q: Quantizer) -> Tensor | None:
        """The copy made of `x`, if it was the last one and nothing has written to it since."""
        if self.facts is None or x.is_inference() or self.facts[0]() is not _owner(x):
            return None
        same = self.facts[1:] == (q, x._version, x.data_ptr(), x.shape, x.stride())
        return self.copy if same else None

    def keep(self, x: Tensor, q: Quantizer, copy: Tensor) -> None:
        if x.is_inference():  # nothing counts who writes to those
            return
        where = x._version, x.data_ptr(), x.shape, x.stride()
        self.facts, self.copy = (weakref.ref(_owner(x)), q, *where), copy


def _owner(x: Tensor) -> Tensor:
    """The tensor that `x` is a view of: it lives as long as the values do."""
    return x if x._base is None else x._base


@dataclass
class History:
    """Amaxes of the last steps of one operand, and the scale in force."""

    amaxes: Tensor  # fp32 [H] on the CPU, newest first; 0 = not seen yet
    scale: Tensor  # fp32 [] on the CPU
    seen: Tensor | None = None  # amax of this step so far
    copy: Tensor | None = None  # of the scale, on the GPU that uses it

    def scale_on(self, device: torch.device) -> Tensor:
        """The scale in force, on `device`; copied there once, for a copy makes the host wait."""
        if device.type == "cpu":
            return self.scale
        if self.copy is None or self.copy.device != device:
            self.copy = self.scale.to(device)
        return self.copy

    def roll(self, q: Quantizer, amax: Tensor) -> None:
        """Take in the amax of a step; inf and NaN leave the scale as it is."""
        if amax < math.inf:
            self.restore(q, torch.cat([amax.view(1), self.amaxes[:-1]]))
        self.seen = None

    def restore(self, q: Quantizer, amaxes: Tensor) -> None:
        self.amaxes, self.seen, self.copy = amaxes.clone(), None, None
        self.scale = delayed_scale(self.amaxes, q)


@dataclass
class Site:
    """Everything one quantized GEMM needs at run time; made by halfulp.quantize."""

    name: str
    block: str
    spec: GemmSpec
    seed: int
    clock: Clock
    carrier: str = "fp32"
    enabled: bool = True  # this site alone; the clock's switch is that of all
    used: bool = False  # by an eager forward pass
    histories: dict[str, History] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)
    # Delayed ones, as the counters saw them.
    scales: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.quantizers: dict[str, Quantizer] = {o: getattr(self.spec, o) for o in OPERANDS}
        for operand, q in self.quantizers.items():
            if q.scale == "delayed":
                self.histories[operand] = History(torch.zeros(q.history), torch.ones(()))
        names = {"fprop": ("x", "w"), "dgrad": ("g", "w"), "wgrad": ("g", "x")}
        self.gemms = {gemm: self._plan(gemm, a, b) for gemm, (a, b) in names.items()}
        self.keys = {o: Key.of(self.seed, f"{self.name}/{o}") for o in OPERANDS}
        self.bases = torch.stack([key.tensor() for key in self.keys.values()])
        self.shared = {operand: self._shares(operand) for operand in _OTHER}
        self.stochastic = any(q.stochastic for q in self.quantizers.values())
        self._choose_paths()

    @property
    def active(self) -> bool:
        """Whether a forward pass is to be quantized."""
        return self.enabled and self.clock.enabled

    def _choose_paths(self) -> None:
        """What every call would find out again, between GEMMs that empty the caches."""
        encoded = [gemm for gemm, (carrier, *_) in self.gemms.items() if carrier == "int8"]
        self.untouched = {
            o for o, q in self.quantizers.items() if q.is_identity or o[:5] in encoded
        }
        x = self.quantizers["fprop_x"]
        self.x_lasts = x.scale != "delayed" and not x.stochastic
        self.plain = {
            gemm
            for gemm, (carrier, accumulation, out) in self.gemms.items()
            if carrier == "fp32" and not accumulation.chunk and out.is_identity
        }

    def _plan(self, gemm: str, a: str, b: str) -> tuple[str, Accumulation, Quantizer]:
        qa, qb = (self.quantizers[f"{gemm}_{side}"] for side in (a, b))
        out = getattr(self.spec, f"{gemm}_out")
        accumulation = parse_accumulation(getattr(self.spec, f"{gemm}_accumulate"))
        return choose_carrier(qa, qb, out, accumulation, self.carrier), accumulation, out

    def moment(self, training: bool, keys: Tensor | None) -> "Moment":
        """The clock's time. A traced graph keeps it in `keys`: an int would be a constant there."""
        if torch.compiler.is_compiling():
            return Moment(0, 0, training, False, traced=True, keys=keys)
        self.used = True
        clock = self.clock
        clock.refuse_other_time()
        return Moment(clock.step, clock.micro, training, clock.counting, traced=False)

    def _shares(self, operand: str) -> bool:
        """Whether the copy made for the other GEMM of this tensor serves `operand` too."""
        other, q = _OTHER[operand], self.quantizers[operand]
        encoded = "int8" in (self.gemms[operand[:5]][0], self.gemms[other[:5]][0])
        # Integers draw per GEMM in every carrier, so that all carriers draw the same.
        separate = encoded or (q.stochastic and q.format.is_int)
        return q.one_copy and not separate and q == self.quantizers[other]

    def key(self, operand: str, at: "Moment") -> Key | Tensor | None:
        if not self.quantizers[operand].stochastic:
            return None
        if at.keys is not None:
            return at.keys[OPERANDS.index(operand)]
        return self.keys[operand].fold(at.step).fold(at.micro)

    def traced_keys(self) -> Tensor | None:
        """The keys of all operands at the clock's time as int32 [6, 2], computed in the graph."""
        if not self.stochastic:
            return None
        step, micro = self.clock.tensor[0], self.clock.tensor[1]
        return fold_tensor(fold_tensor(self.bases, step), micro)

    def operand(self, operand: str, x: Tensor, at: "Moment") -> Tensor:
        """The operand as `product` wants it: quantized, or raw where the carrier encodes it."""
        if operand in self.untouched:
            return x
        q, key = self.quantizers[operand], self.key(operand, at)
        history = self.histories.get(operand)
        scale = None if history is None else history.scale_on(x.device)
        if at.traced:
            return apply_quantizer(x, q, key=key, scale=scale)
        lasting = operand == "fprop_x" and self.x_lasts
        y = self.clock.recent.find(x, q) if lasting else None
        if y is None:
            y = apply_quantizer(x, q, key=key, scale=scale)
            if lasting:
                self.clock.recent.keep(x, q, y)
        if at.counting or history is not None:
            self.observe(operand, x, y, at)
        return y

    def observe(self, operand: str, x: Tensor, y: Tensor, at: "Moment") -> None:
        """Record what delayed scaling and the counters need of this call."""
        history = self.histories.get(operand)
        if history is not None and at.training:
            amax = amax_bits(x).view(torch.float32)
            history.seen = amax if history.seen is None else torch.maximum(history.seen, amax)
        if at.counting:
            scale = None if history is None else history.scale_on(x.device)
            sums = quantizer_statistics(x, y, self.quantizers[operand], scale)
            old = self.sums.get(operand)
            self.sums[operand] = sums if old is None else merge(old, sums)
            if scale is not None:
                self.scales[operand] = scale

    def product(
        self, gemm: str, a: str, x: Tensor, b: str, w: Tensor, at: "Moment",
        bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """x wᵀ + bias in this GEMM's carrier, of tensors that `operand` made."""
        carrier, accumulation, _ = self.gemms[gemm]
        if carrier == "bf16":
            return multiply_bf16(x, w, bias)
        if gemm in self.plain:
            y = x @ w.mT
        elif carrier == "int8":
            left = self._encode(f"{gemm}_{a}", x, at)
            y = multiply_int8(left, self._encode(f"{gemm}_{b}", w, at))
        else:
            y = multiply(x, w, accumulation)
        return y if bias is None else y + bias

    def _encode(self, operand: str, x: Tensor, at: "Moment"):
        codes = encode(x, self.quantizers[operand], self.key(operand, at))
        if at.counting:
            self.observe(operand, x, codes.codes.float() * codes.step, at)
        return codes

    def round_out(self, gemm: str, y: Tensor) -> Tensor:
        if gemm in self.plain:
            return y
        carrier, _, out = self.gemms[gemm]
        return y if out.is_identity or carrier == "bf16" else apply_quantizer(y, out)


class Moment(NamedTuple):
    """The clock as it stood in the forward pass; the backward pass uses the same."""

    step: int
    micro: int
    training: bool
    counting: bool
    traced: bool
    keys: Tensor | None = None


class QuantizedMatmul(torch.autograd.Function):
    """y = x wᵀ + bias with quantized operands; the gradient passes straight through the rounding.

    x [..., M, K], w [..., N, K] with equal leading dimensions, bias [N] or None; y [..., M, N].
    Raises ConfigError where a second derivative is prepared, which rounding does not have.
    """

    @staticmethod
    def forward(ctx, x, w, bias, keys, site: Site, training: bool):
        at = site.moment(training, keys)
        xq, wq = site.operand("fprop_x", x, at), site.operand("fprop_w", w, at)
        y = site.product("fprop", "x", xq, "w", wq, at, bias)
        ctx.site, ctx.has_bias = site, bias is not None
        ctx.moment = at[:-1]
        kept = (xq if site.shared["wgrad_x"] else x, wq if site.shared["dgrad_w"] else w)
        ctx.save_for_backward(*kept, keys)
        return site.round_out("fprop", y)

    @staticmethod
    def backward(ctx, g):
        # torch's once_differentiable would leave out the rounded GEMMs where grad() is asked.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise ConfigError(
                "simulated GEMMs have no second derivative, and create_graph=True prepares for "
                "one. Run this forward and backward pass inside `with handle.off():`, handle "
                "being what halfulp.quantize returned."
            )
        (x, w, keys), site = ctx.saved_tensors, ctx.site
        at = Moment(*ctx.moment, keys)  # pyright: ignore[reportCallIssue]
        g = g.contiguous()
        dx = dw = dbias = gq = None
        if ctx.needs_input_grad[0]:
            gq, wq = site.operand("dgrad_g", g, at), w.mT
            if not site.shared["dgrad_w"]:
                wq = site.operand("dgrad_w", wq.contiguous(), at)
            dx = site.round_out("dgrad", site.product("dgrad", "g", gq, "w", wq, at))
        if ctx.needs_input_grad[1]:
            xq = x.mT
            if not site.shared["wgrad_x"]:
                xq = site.operand("wgrad_x", xq.contiguous(), at)
            if gq is None or not site.shared["wgrad_g"]:
                gq = site.operand("wgrad_g", g.mT.contiguous(), at).mT
            dw = site.round_out("wgrad", site.product("wgrad", "g", gq.mT, "x", xq, at))
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = g.flatten(0, -2).sum(0)
        return dx, dw, dbias, None, None, None


def quantized_matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, site: Site, training: bool
) -> Tensor:
    """`QuantizedMatmul` on any float dtype: computed in fp32, given back in x's dtype.

    Raises ConfigError where torch multiplies fp32 matrices in TF32 or bf16.
    """
    keys = None
    if torch.compiler.is_compiling():
        if site.histories:
            return _eager(x, w, bias, site, training)  # pyright: ignore[reportCallIssue]
        keys = site.traced_keys()
    return _matmul(x, w, bias, site, training, keys)


def _matmul(
    x: Tensor, w: Tensor, bias: Tensor | None, site: Site, training: bool,
    keys: Tensor | None = None,
) -> Tensor:  # fmt: skip
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _matmul(x, w, bias, site, training, keys)
    require_fp32(x.device)
    bias = None if bias is None else bias.float()
    y = QuantizedMatmul.apply(x.float(), w.float(), bias, keys, site, training)
    return y.to(x.dtype)


# Delayed scales are state that a traced graph cannot keep: these sites run between graphs.
_eager = torch.compiler.disable(_matmul)


def histories(sites: Mapping[str, Site]) -> dict[str, tuple[History, Quantizer]]:
    """Every delayed-scale history, by "site/operand"."""
    return {
        f"{name}/{operand}": (history, site.quantizers[operand])
        for name, site in sites.items()
        for operand, history in site.histories.items()
    }
