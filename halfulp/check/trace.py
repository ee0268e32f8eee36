"""Dtype trace: which sites a real low-precision program rounds, found by running it once.

Only what returns a low-precision dtype is stored in one; fp32 islands (norms, softmax, RoPE) and
autocast need no rules of their own (spec roundoff §5.1).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, run
from halfulp.blocks import Gemm
from halfulp.check.measure import TARGETS, program
from halfulp.check.places import PRODUCTS, Places
from halfulp.check.sites import SiteInfo, Walk, parameter_sites
from halfulp.policy import Policy
from halfulp.quantization import resolve

_LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """What `target` rounds, and to which format: names of stored and cast sites."""

    target: str
    format: str
    names: frozenset[str]
    dtypes: Mapping[str, torch.dtype]  # site → dtype of what it holds in the target


def trace(
    model: nn.Module,
    batch: Batch,
    target: str,
    *,
    hints: Mapping[str, str] | None = None,
    attention: str = "eager",
    buffers: bool = False,
    tokens: int = 8,
) -> Trace:
    """The trace of a program of halfulp.check.measure.TARGETS.

    The program runs on the first `tokens` tokens of the first sequence: dtypes do not depend on
    the length. `buffers` as in halfulp.check.measure.program. CheckError for an unknown target.
    """
    with program(model, target, attention=attention, buffers=buffers) as low, torch.no_grad():
        places = Places(low, hints)
        tracer = _Tracer()
        for stored in parameter_sites(low, places).values():
            tracer.output(stored.info, stored.tensor, (), False)
        with Walk(low, places, tracer):
            run(low, small(batch, tokens))
    word = {torch.bfloat16: "bf16", torch.float16: "fp16"}[TARGETS[target]]
    return Trace(target=target, format=word, names=frozenset(tracer.names), dtypes=tracer.dtypes)


def small(batch: Batch, tokens: int) -> Batch:
    """The first tokens of the first sequence of token ids [B, T]."""
    if isinstance(batch, Tensor):
        return batch[:1, :tokens] if batch.ndim == 2 else batch
    shape = batch["input_ids"].shape if "input_ids" in batch else None

    def cut(value: Any) -> Any:
        same = isinstance(value, Tensor) and value.ndim == 2 and value.shape == shape
        return value[:1, :tokens] if same else value

    same = shape is not None and all(
        not isinstance(v, Tensor) or v.shape == shape for v in batch.values()
    )
    return {name: cut(value) for name, value in batch.items()} if same else batch


def policy_sites(
    model: nn.Module,
    policy: Policy | str | Path,
    sites: Iterable[SiteInfo],
    *,
    hints: Mapping[str, str] | None = None,
    allow_partial: bool = False,
) -> dict[str, str]:
    """The plan (site → quantizer) that a policy's forward pass is; identities are left out.

    `sites`: stored and operand ones, as halfulp.check.prices.price lists them. A GEMM's operands
    are operand sites, its `fprop_out` the stored site it makes, tables and norms their parameters.
    Errors as in halfulp.quantize. halfulp.check.measure judges the real thing: measure_policy.
    """
    known = list(sites)
    resolution = resolve(model, policy, hints=hints, allow_partial=allow_partial)
    plan: dict[str, str] = {}
    for gemm, _, spec, _ in resolution.gemms:
        quantizers = {f"{gemm.name}/fprop.{o}": getattr(spec, f"fprop_{o}") for o in ("x", "w")}
        quantizers |= {s.name: spec.fprop_out for s in known if _made_by(s, gemm)}
        plan |= {name: str(q) for name, q in quantizers.items() if not q.is_identity}
    for modules in (resolution.embeds, resolution.norms):
        for module, q in modules.items():
            owned = [f"weight:{module}.{name}" for name in ("weight", "bias")]
            plan |= {name: str(q) for name in owned if not q.is_identity}
    names = {s.name for s in known}
    return {name: word for name, word in plan.items() if name in names}


def _made_by(site: SiteInfo, gemm: Gemm) -> bool:
    """Whether `site` is what the GEMM returns."""
    if site.family != "stored" or site.module != gemm.module:
        return False
    if gemm.role.startswith("attn_"):
        kind = {"attn_qk": "scores", "attn_pv": "attn_out"}[gemm.role]
        return site.kind == kind and site.op in PRODUCTS
    return site.op in ("linear", "addmm")


@dataclass
class _Tracer:
    """The visitor that notes dtypes."""

    names: set[str] = field(default_factory=set)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    entering: dict[str, torch.dtype] = field(default_factory=dict)  # operand site → dtype

    def operand(self, infos: tuple[SiteInfo, ...], x: Tensor, transposed: bool) -> Tensor:
        for info in infos:
            if info.family == "cast":
                self.entering[info.name] = x.dtype
        return x

    def output(
        self, info: SiteInfo, x: Tensor, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        self.dtypes[info.name] = x.dtype
        narrowed = info.family != "cast" or any(t.dtype.itemsize > x.dtype.itemsize for t in inputs)
        if x.dtype in _LOW and narrowed:
            self.names.add(info.name)
            for operand in "xwbqkv":
                name = f"{info.name}.{operand}"
                if self.entering.get(name) in (torch.float32, torch.float64):
                    self.names.add(name)
        return x

    def writes(self, x: Tensor) -> None:
        pass
