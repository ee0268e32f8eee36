"""A model made ready to be looked at, run on a batch, and given back as it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.batch import Batch
from halfulp.errors import CheckError


@contextmanager
def prepare(model: nn.Module, *, attention: str = "eager") -> Iterator[nn.Module]:
    """The model in eval mode, with `attention` and without a cache; all restored on exit.

    "eager" exposes scores and probabilities as sites; with "sdpa" they live in registers and are
    none. Raises CheckError for compiled, scripted, quantized and half-precision models.
    """
    _refuse(model)
    modes = [(module, module.training) for module in model.modules()]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before: list[tuple[Any, str, Any]] = []
    for config in configs.values():
        for name, value in (("_attn_implementation", attention), ("use_cache", False)):
            if hasattr(config, name):
                before.append((config, name, getattr(config, name)))
                setattr(config, name, value)
    model.eval()
    try:
        yield model
    finally:
        for config, name, value in before:
            setattr(config, name, value)
        for module, mode in modes:
            module.training = mode


def _refuse(model: nn.Module) -> None:
    what = type(model).__name__
    if torch.is_inference_mode_enabled():
        raise CheckError("prices need gradients. Leave torch.inference_mode() for this call.")
    if next(model.parameters(), None) is None:
        raise CheckError(f"{what} has no parameter, so there is nothing to price. Give a model.")
    if any(p.is_meta for p in model.parameters()):
        raise CheckError(f"{what} is on the meta device: load its weights first.")
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        raise CheckError(
            f"{what} is compiled or scripted: its operations cannot be seen. Give the eager module "
            "(model._orig_mod of a model from torch.compile)."
        )
    if getattr(model, "halfulp", None) is not None:
        raise CheckError(
            f"{what} is quantized already. Call halfulp.unquantize(model) first, or measure it "
            "with halfulp.check.measure."
        )
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.is_floating_point() and p.dtype not in (torch.float32, torch.float64):
            raise CheckError(
                f"{name} of {what} is {p.dtype}: a low-precision model is no reference. "
                "Give an fp32 copy: copy.deepcopy(model).float()."
            )


def kept_positions(batch: Batch, logits: Tensor) -> Tensor | None:
    """Positions that count, bool [...]: those an attention mask keeps; None where all do."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if isinstance(mask, Tensor) and mask.shape == logits.shape[:-1] and not bool(mask.all()):
        return mask.bool()
    return None
