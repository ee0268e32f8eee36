"""A model and batches that sharpness can be measured on, and the model given back as it was."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from halfulp.batch import Batch
from halfulp.errors import CheckError, ConfigError, NonFiniteError


def refuse(model: nn.Module, batches: Sequence[Batch]) -> None:
    """CheckError where no gradients can be had: no batch, no parameters, frozen or inference.

    NonFiniteError for weights that hold inf or NaN.
    """
    if not isinstance(model, nn.Module):
        raise CheckError(f"{type(model).__name__} is no model. Give a torch.nn.Module.")
    if not batches:
        raise CheckError("there is no batch to measure on. Give token ids [B, T].")
    if torch.is_inference_mode_enabled():
        raise CheckError("sharpness needs gradients. Leave torch.inference_mode() for this call.")
    named = dict(model.named_parameters())
    if not named:
        raise CheckError(f"{type(model).__name__} has no parameter, so nothing to measure.")
    if meta := [name for name, p in named.items() if p.is_meta]:
        raise CheckError(f"{meta[0]} is on the meta device. Load the model's weights first.")
    frozen = [name for name, p in named.items() if not p.requires_grad]
    if frozen:
        raise CheckError(
            f"{len(frozen)} parameters are frozen, the first is {frozen[0]}: a block without "
            "gradients has no measured sharpness. Unfreeze them with requires_grad_(True) for the "
            "measurement."
        )
    check_finite(named)


def check_finite(weights: Mapping[str, Tensor]) -> None:
    """NonFiniteError for the first weight that holds inf or NaN."""
    for name, w in weights.items():
        if not bool(torch.isfinite(w).all()):
            raise NonFiniteError(
                f"{name} holds inf or NaN: nothing can be measured with such weights. Load a "
                "checkpoint from before the run diverged."
            )


def check_draws(draws: int, seed: int) -> None:
    """ConfigError for numbers that no measurement can begin with."""
    if not isinstance(draws, int) or draws < 2:
        raise ConfigError(f"draws = {draws!r} gives no standard error. Give a whole number from 2.")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ConfigError(f"seed = {seed!r} cannot be used. Give a whole number of 64 bits.")


@contextmanager
def prepared(model: nn.Module) -> Iterator[list[str]]:
    """Eval mode and the model's own arithmetic inside; yields what the reader must know of that."""
    notes = []
    modes = [(module, module.training) for module in model.modules()]
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        notes.append("The model has dropout; it was measured in eval mode, without.")
    dtypes = {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}
    if dtypes:
        name = str(dtypes.pop()).removeprefix("torch.")
        notes.append(f"Parameters are {name}, and so are their gradients.")
    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        if (handle := getattr(model, "halfulp", None)) is not None:
            stack.enter_context(handle.off())
            notes.append("The model is quantized; it was measured without the quantizers.")
        model.eval()
        try:
            yield notes
        finally:
            for module, mode in modes:
                module.training = mode


def is_compiled(model: nn.Module) -> bool:
    """Whether `model` or a module of it is compiled, by torch.compile(module) or in place."""
    modules = list(model.modules())
    in_place = any(getattr(m, "_compiled_call_impl", None) is not None for m in modules)
    return in_place or any("_orig_mod" in m._modules for m in modules)
