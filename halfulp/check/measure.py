"""Measured runs, the judge of every prediction: how far a rounded program is from the reference."""

import copy
import difflib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, run
from halfulp.check.places import Places
from halfulp.check.reference import Distance, Reference, distance, reference_of
from halfulp.check.setup import kept_positions, prepare
from halfulp.check.sites import MASKED, SiteInfo, Walk, parameter_sites
from halfulp.check.sums import Rounding
from halfulp.check.survey import non_finite_error
from halfulp.errors import CheckError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.random import Key
from halfulp.policy import Policy
from halfulp.quantization import quantize, unquantize

TARGETS = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "autocast-bf16": torch.bfloat16,
    "autocast-fp16": torch.float16,
}
"""Programs that PyTorch runs as they are: `model.to(dtype)`, and autocast."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Distance of one rounded run from the reference, and what it ran out of range.

    `overflowed`: site → share of its elements beyond the largest value of its format.
    """

    distance: Distance
    overflowed: Mapping[str, float]

    @property
    def kl(self) -> float:
        """nats/token."""
        return self.distance.kl

    @property
    def flips(self) -> float:
        """Share of next-token choices that changed."""
        return self.distance.flips


def reference(model: nn.Module, batch: Batch, *, attention: str = "eager") -> Reference:
    """The logits of `model` in its own precision; CheckError if they are not finite."""
    with prepare(model, attention=attention), torch.no_grad():
        logits = run(model, batch)
        finite = bool(torch.isfinite(logits).all())
    if not finite:
        raise non_finite_error(model, batch, attention=attention)
    return reference_of(logits, kept_positions(batch, logits))


def measure(
    model: nn.Module,
    batch: Batch,
    plan: Mapping[str, str],
    ref: Reference,
    *,
    hints: Mapping[str, str] | None = None,
    attention: str = "eager",
) -> Measured:
    """One run with the sites of `plan` rounded: site name → format in a user's words.

    Everything else stays in the model's precision. Raises CheckError for names that this model
    does not have.
    """
    with prepare(model, attention=attention), torch.no_grad():
        places = Places(model, hints)
        rounder = _Rounder({name: Rounding.of(word) for name, word in plan.items()})
        walk = Walk(model, places, rounder)
        with rounder.parameters(model, places), walk:
            logits = run(model, batch)
    rounder.check_used()
    found = distance(ref, logits, kept_positions(batch, logits))
    return Measured(distance=found, overflowed=rounder.overflowed)


def measure_target(
    model: nn.Module,
    batch: Batch,
    target: str,
    ref: Reference,
    *,
    attention: str = "eager",
    buffers: bool = False,
) -> Measured:
    """The real program of `TARGETS`, run on a copy of the model; `buffers` as in `program`."""
    with program(model, target, attention=attention, buffers=buffers) as low, torch.no_grad():
        logits = run(low, batch).float()
    return Measured(distance=distance(ref, logits, kept_positions(batch, logits)), overflowed={})


def measure_policy(
    model: nn.Module,
    batch: Batch,
    policy: Policy | str | Path,
    ref: Reference,
    *,
    hints: Mapping[str, str] | None = None,
    allow_partial: bool = False,
) -> Measured:
    """The model quantized with `policy` as halfulp.quantize does it, and unquantized afterwards."""
    with prepare(model, attention="eager"), torch.no_grad():
        quantize(model, policy, hints=hints, allow_partial=allow_partial)
        try:
            logits = run(model, batch)
        finally:
            unquantize(model)
    return Measured(distance=distance(ref, logits, kept_positions(batch, logits)), overflowed={})


@contextmanager
def program(
    model: nn.Module, target: str, *, attention: str = "eager", buffers: bool = False
) -> Iterator[nn.Module]:
    """A model that runs as `target` does inside the context.

    `.to(dtype)` targets give a copy whose parameters and persistent buffers are cast. The others
    (RoPE's frequencies) stay fp32, as `from_pretrained(dtype=...)` leaves them; `buffers` casts
    them too, as a plain `model.to(dtype)` does (halfulp.check.detect names what that breaks).
    """
    if target not in TARGETS:
        raise CheckError(
            f"target {target!r} is not a program of PyTorch's. Choose among {', '.join(TARGETS)}, "
            "or measure a policy."
        )
    dtype = TARGETS[target]
    autocast = target.startswith("autocast")
    with prepare(model, attention=attention):
        device = next(model.parameters()).device.type
        context = torch.autocast(device, dtype=dtype) if autocast else nullcontext()
        low = model if autocast else low_copy(model, dtype, buffers=buffers)
        with context:
            yield low


def low_copy(model: nn.Module, dtype: torch.dtype, *, buffers: bool = False) -> nn.Module:
    """A copy whose parameters and persistent buffers are of `dtype`; with `buffers` all buffers."""
    low = copy.deepcopy(model)
    for module in low.modules():
        for p in module._parameters.values():
            if p is not None and p.is_floating_point() and p.dtype != dtype:
                p.data = p.data.to(dtype)
        fixed = set() if buffers else module._non_persistent_buffers_set
        for name, b in module._buffers.items():
            if b is not None and b.is_floating_point() and name not in fixed:
                module._buffers[name] = b.to(dtype)
    return low


def round_tensor(x: Tensor, r: Rounding, *, name: str = "", transposed: bool = False) -> Tensor:
    """Q(x) in x's dtype; `transposed`: K is the axis before the last. Mask entries stay.

    Stochastic formats draw their bits from `name`.
    """
    turn = transposed and r.reach in ("row", "whole")
    x32 = (x.mT if turn else x).float().contiguous()
    masked = bool(x32.amin() <= MASKED) if x32.numel() else False
    inside = x32.masked_fill(x32 <= MASKED, 0.0) if masked else x32
    key = Key.of(0, name) if r.quantizer.stochastic else None
    y = apply_quantizer(inside, r.quantizer, key=key)
    if masked:
        y = torch.where(x32 <= MASKED, x32, y)
    return (y.mT if turn else y).to(x.dtype)


@dataclass
class _Rounder:
    """The visitor that rounds the sites of a plan."""

    plan: Mapping[str, Rounding]
    overflowed: dict[str, float] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)

    def operand(self, infos: tuple[SiteInfo, ...], x: Tensor, transposed: bool) -> Tensor:
        for info in infos:
            x = self._round(info.name, x, transposed)
        return x

    def output(
        self, info: SiteInfo, x: Tensor, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        y = self._round(info.name, x, False)
        return x.copy_(y) if inplace and y is not x else y

    def writes(self, x: Tensor) -> None:
        pass

    def _round(self, name: str, x: Tensor, transposed: bool) -> Tensor:
        self.names.add(name)
        if (r := self.plan.get(name)) is None:
            return x
        self.used.add(name)
        if not r.quantizer.saturate or r.quantizer.scale in ("none", "static"):
            self._watch_range(name, x, r)
        return round_tensor(x, r, name=name, transposed=transposed)

    def _watch_range(self, name: str, x: Tensor, r: Rounding) -> None:
        largest = r.quantizer.format.largest
        if r.quantizer.format.exponent_bits == 8 or not x.numel():
            return
        low, high = x.aminmax()
        if high > largest or MASKED < low < -largest:
            beyond = (x.abs() > largest) & (x > MASKED)
            self.overflowed[name] = beyond.double().mean().item()

    @contextmanager
    def parameters(self, model: nn.Module, places: Places) -> Iterator[None]:
        """The planned parameters and buffers hold rounded values inside."""
        before: list[tuple[Tensor, Tensor]] = []
        try:
            for stored in parameter_sites(model, places).values():
                rounded = self._round(stored.info.name, stored.tensor.detach(), stored.transposed)
                if stored.info.name in self.plan:
                    before.append((stored.tensor, stored.tensor.data))
                    stored.tensor.data = rounded
            yield
        finally:
            for tensor, data in before:
                tensor.data = data

    def check_used(self) -> None:
        if unknown := self.plan.keys() - self.used:
            name = sorted(unknown)[0]
            near = difflib.get_close_matches(name, self.names, 3, 0.3)
            raise CheckError(
                f"the plan rounds {len(unknown)} sites that this model does not have, the first is "
                f"{name!r}. Nearest: {', '.join(near)}. Take the names from halfulp.check.price."
            )


def uniform(names: Collection[str], word: str) -> dict[str, str]:
    """The plan that rounds all `names` to one format."""
    return dict.fromkeys(names, word)
