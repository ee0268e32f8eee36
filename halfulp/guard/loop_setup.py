"""What `halfulp.Guard` is made of, and what it says when it cannot be made or has to stop."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.blocks import block_map
from halfulp.errors import ConfigError, PolicyError
from halfulp.guard.budget import Budget
from halfulp.guard.incident import Incident
from halfulp.guard.ladder import Ladder
from halfulp.guard.own_state import is_loader
from halfulp.policy import Policy, Resolution
from halfulp.quantization import Quantized, as_policy, quantize


def ladder_of(
    bare: nn.Module, policy: Policy | str | Path | None, hints: Mapping[str, str] | None
) -> tuple[Ladder, Quantized | None]:
    """The ladder over the policy of a model, which is quantized if there is something to do."""
    blocks, handle = block_map(bare, hints), bare.__dict__.get("halfulp")
    if handle is None:
        if policy is None:
            return Ladder(Policy.from_recipe("fp32"), blocks), None
        own = as_policy(policy)
        return Ladder(own, blocks), quantize(bare, own, hints=hints)
    own = as_policy(policy) if policy is not None else _policy_in_force(handle.resolution)
    if own.resolve(blocks).gemms != handle.resolution.gemms:
        raise PolicyError(
            "the model is quantized already, by another policy than the guard was given. Give the "
            "guard the same policy or none, or call halfulp.unquantize(model) first."
        )
    return Ladder(own, blocks), handle


def _policy_in_force(resolution: Resolution) -> Policy:
    """A policy that decides as `resolution`, whose rules have their keeps spelled out."""
    rules = (replace(r, recipe=replace(r.recipe, keep=())) for r in resolution.rules)
    return Policy(tuple(rules))


def digest_of(policy: Policy) -> str:
    """sha256 of the policy's text."""
    return hashlib.sha256(policy.to_toml().encode()).hexdigest()


def restorable(o: Any) -> Any:
    """`o`, if it can be put back in a rollback; ConfigError if not."""
    if hasattr(o, "state_dict") and hasattr(o, "load_state_dict"):
        return o
    name = type(o).__name__
    if is_loader(o):
        raise ConfigError(
            f"{name} in `also` has no state_dict and load_state_dict, so it cannot rewind. Use a "
            "loader that can (torchdata's StatefulDataLoader), or leave it out: the data then goes "
            "on after a rollback."
        )
    raise ConfigError(
        f"{name} in `also` has no state_dict and load_state_dict, so it cannot be put back. Give "
        "it both, or leave it out."
    )


def check_arguments(budget: Budget, steps: int, every: int, kept: int) -> None:
    """ConfigError for budgets and counts that leave the guard nothing to do."""
    least = {"steps": steps, "snapshot_every": every, "snapshots": kept}
    least |= {"budget.rollbacks": budget.rollbacks}
    for name, value in least.items():
        if value < 1:
            raise ConfigError(f"{name} = {value} leaves the guard nothing to do. Give 1 or more.")
    shares = {"wasted": budget.wasted, "raised": budget.raised, "attribution": budget.attribution}
    for name, value in shares.items():
        if not 0 < value <= 1:
            raise ConfigError(
                f"budget.{name} = {value:g} is no share that the guard could use. Give a number "
                "above 0 and at most 1; without a guard, do not make one."
            )


def check_loss(loss: object) -> None:
    """ConfigError for what is not the loss of one step."""
    one = loss.numel() == 1 if isinstance(loss, Tensor) else isinstance(loss, int | float)
    if not one:
        found = f"{list(loss.shape)} values" if isinstance(loss, Tensor) else type(loss).__name__
        raise ConfigError(
            f"guard.step takes one number, the loss of the step, and was given {found}. Give the "
            "mean over its tokens and micro-batches, or nothing where the outputs have a loss."
        )


def stopped(incident: Incident) -> str:
    """Why the loop was stopped, and how to go on."""
    trigger, verdict = incident.trigger, incident.verdict
    units = f" in {', '.join(verdict.units[:4])}" if verdict.units else ""
    over = incident.exceeded
    cure = "Go on from a good checkpoint with a lower learning rate or a wider recipe."
    if over is not None and over.enough is not None:
        cure = f"To go on: halfulp.Guard(…, budget=halfulp.Budget({over.budget}={over.enough:g}))."
    return (
        f"the guard stopped the loop at step {trigger.step}: {incident.done[-1]}. It saw "
        f"{trigger}; its verdict is {verdict.kind}{units}. Nothing of that step was updated; model "
        f"and optimizer are as they were before it. {cure} guard.incidents tells what happened."
    )


def check_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    """ConfigError for an optimizer that trains nothing of the guarded model."""
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ConfigError(
            "the optimizer holds no parameter of the guarded model. Give the optimizer of this "
            "model, made after the model was sharded or moved."
        )
