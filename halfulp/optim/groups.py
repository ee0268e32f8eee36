"""Parameter groups that carry each block's storage formats from a policy into the optimizer."""

from collections.abc import Mapping

from torch import nn

from halfulp.errors import ConfigError
from halfulp.policy import Resolution
from halfulp.recipe import Recipe


def param_groups(
    model: nn.Module,
    resolution: Resolution,
    weight_decay: float = 0.1,
    *,
    lr_types: Mapping[str, str] | None = None,
) -> list[dict]:
    """One group per block and decay, for `AdamW`: names, block and formats of its recipe.

    With `lr_types` (parameter → type that decides its learning rate) also per such type, which the
    group carries as `lr_type`.

    Matrices and tables decay; norms, biases and other vectors do not. Every trainable parameter is
    in exactly one group. Raises ConfigError when nothing is trainable.
    """
    blocks = resolution.blocks
    groups: dict[tuple[str, bool, str], dict] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        block, decays = blocks[name], p.ndim >= 2
        fresh = {"block": block, "params": [], "weight_decay": weight_decay if decays else 0.0}
        kind = lr_types[name] if lr_types else ""
        fresh |= {"lr_type": kind} if lr_types else {}
        formats = storage_formats(resolution.parameters[name])
        group = groups.setdefault((block, decays, kind), fresh | formats)
        group["params"].append((name, p))
    if not groups:
        raise ConfigError("no parameter is trainable. Set requires_grad on what should be trained.")
    return list(groups.values())


def storage_formats(recipe: Recipe) -> dict[str, str]:
    """The keywords of `AdamW` that store weights and moments as `recipe` says."""
    stored = recipe.weight if recipe.master is None else recipe.master
    return {
        "weight": str(stored),
        "update_rounding": recipe.update_rounding,
        "moment_m": str(recipe.moment_m),
        "moment_v": str(recipe.moment_v),
    }
