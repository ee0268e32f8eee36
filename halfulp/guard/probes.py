"""Signals that need a look inside a forward pass: outlier channels, attention and output logits.

The looks read and change nothing: the pass gives the same bits with them. Results stay on the
device until the end, where one copy brings them all to the host.
"""

import math
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.attention import has_attention_interface
from halfulp.block_names import block_type
from halfulp.blocks import BlockMap, Gemm
from halfulp.guard.readings import Reading
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.statistics import quantizer_statistics

Note = Callable[[str, str, str, Tensor], None]  # rule, block, place, value []


@contextmanager
def probes(model: nn.Module, blocks: BlockMap) -> Iterator[list[Reading]]:
    """Look at the forward passes inside; the list holds the readings once the context is left.

    `swiglu` and `swiglu_scaled` of every down-projection, `attention_logits` of the first sequence
    in models that use transformers' attention interface, `logz` of the first sequence where the
    model returns `.logits`, `ln_clamp` and `ln_bias` of norms whose gains are quantized with a
    scale. For steps that run without torch.compile.
    """
    readings: list[Reading] = []
    notes: list[tuple[str, str, str, Tensor]] = []

    def note(rule: str, block: str, place: str, value: Tensor) -> None:
        notes.append((rule, block, place, value.detach().float()))

    with ExitStack() as stack:
        for gemm in down_projections(model, blocks):
            hook = _channels(gemm, note)
            handle = model.get_submodule(gemm.module).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        for name, block in blocks.norms.items():
            hook = _gains(block, name, note)
            handle = model.get_submodule(name).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        stack.callback(model.register_forward_hook(_output(note)).remove)
        stack.enter_context(_attention(model, blocks, note))
        yield readings
    values = torch.stack([value for *_, value in notes]).tolist() if notes else []
    for (rule, block, place, _), value in zip(notes, values, strict=True):
        readings.append(Reading(rule, block, place, value))


def down_projections(model: nn.Module, blocks: BlockMap) -> list[Gemm]:
    """The GEMMs of ffn blocks that lead back to the width that the first of their module reads."""
    groups: dict[str, list[Gemm]] = {}
    for gemm in blocks.gemms:
        if gemm.role == "linear" and block_type(gemm.block) == "ffn":
            groups.setdefault(gemm.module.rpartition(".")[0], []).append(gemm)
    found = []
    for group in groups.values():
        widths = [_widths(model.get_submodule(gemm.module)) for gemm in group]
        back = [g for g, w in zip(group, widths, strict=True) if w == widths[0][::-1] != widths[0]]
        found += back or group[1:][-1:]
    return found


def _widths(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of a linear or Conv1D, which stores [in, out]."""
    rows, columns = module._parameters["weight"].shape  # pyright: ignore[reportOptionalMemberAccess]
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _channels(gemm: Gemm, note: Note) -> Callable:
    @torch.no_grad()
    def look(module: nn.Module, args: tuple) -> None:
        low, high = torch.aminmax(args[0].flatten(0, -2), dim=0)
        amaxes = torch.maximum(-low, high)
        site = getattr(module, "halfulp_site", None)
        shared = site is not None and _one_scale(site.quantizers["fprop_x"])
        rule = "swiglu_scaled" if shared else "swiglu"
        # Channels that are off in the whole batch say nothing about the others.
        alive = torch.where(amaxes > 0, amaxes, math.nan)
        note(rule, gemm.block, gemm.module, amaxes.amax() / alive.nanmedian())

    return look


def _one_scale(q: Quantizer) -> bool:
    """Whether a large channel takes the resolution of all others."""
    return q.scale != "none" and q.granularity in ("tensor", "row")


def _output(note: Note) -> Callable:
    @torch.no_grad()
    def look(module: nn.Module, args: tuple, output: Any) -> None:
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            mean = logits[0].float().logsumexp(-1).mean()
            note("logz", "head", "logits", mean.abs() - math.log(logits.shape[-1]))

    return look


@contextmanager
def _attention(model: nn.Module, blocks: BlockMap, note: Note) -> Iterator[None]:
    """The attention functions of the model's classes, with a look at query and key."""
    modules = {
        model.get_submodule(gemm.module): gemm for gemm in blocks.gemms if gemm.role == "attn_qk"
    }
    known = [module for module in modules if has_attention_interface(model, module)]
    interfaces = {id(i): i for module in known if (i := _home(module)["ALL_ATTENTION_FUNCTIONS"])}
    config: Any = getattr(model, "config", None)
    with ExitStack() as stack:
        for interface in interfaces.values():
            stack.enter_context(_seen(interface, config._attn_implementation, modules, note))
        yield


@contextmanager
def _seen(interface: Any, name: str, modules: dict[nn.Module, Gemm], note: Note) -> Iterator[None]:
    before = interface.get(name)

    def seen(module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        if (gemm := modules.get(module)) is not None:
            top = _largest_score(query, key, kwargs.get("scaling"), module)
            note("attention_logits", gemm.block, gemm.module, top)
        # transformers' eager attention is not in the interface, but in the model's own file.
        attend = _home(module)["eager_attention_forward"] if before is None else before
        return attend(module, query, key, *args, **kwargs)

    interface[name] = seen
    try:
        yield
    finally:
        del interface[name]
        if interface.get(name) is not before:
            interface[name] = before


def _home(module: nn.Module) -> dict[str, Any]:
    return vars(sys.modules[type(module).__module__])


@torch.no_grad()
def _largest_score(
    query_BHTD: Tensor, key_BGSD: Tensor, scaling: float | None, module: nn.Module
) -> Tensor:
    """The largest of q·k · scaling that the first sequence may attend to."""
    query, key = query_BHTD[0].float(), key_BGSD[0].float()
    scores = query.unflatten(0, (key.shape[0], -1)) @ key[:, None].mT
    if getattr(module, "is_causal", True) and scores.shape[-1] == scores.shape[-2]:
        later = torch.ones_like(scores[0, 0], dtype=torch.bool).triu_(1)
        scores = scores.masked_fill_(later, -math.inf)
    return scores.amax() * (query.shape[-1] ** -0.5 if scaling is None else scaling)


def _gains(block: str, name: str, note: Note) -> Callable:
    """What the quantizer of a norm does to its gains, here where FSDP has gathered them."""

    @torch.no_grad()
    def look(module: nn.Module, args: tuple) -> None:
        q, gain = getattr(module, "halfulp_quantizer", None), module._parameters.get("weight")
        if q is None or q.scale == "none" or q.stochastic or gain is None:
            return
        x = gain.detach().float().contiguous()
        y = apply_quantizer(x, q)
        n, beyond = quantizer_statistics(x, y, q)[:2]
        note("ln_clamp", block, name, beyond / n)
        note("ln_bias", block, name, (y - x).sum().abs() / x.abs().sum())

    return look
