"""A learning rate per block type: parameter groups for any torch optimizer, and their schedule.

Wang et al., arXiv:2502.19002, §5, with what the official code adds to the formula: the warm-up is
stretched by the ratio as well, and every block ends at the same rate.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from halfulp.errors import ConfigError
from halfulp.pieces import pieces
from halfulp.recipe_reader import nearest
from halfulp.sharpness.ratios import Ratios, RatiosLike, lr_types, resolve

KINDS = ("cosine", "wsd", "constant")
FLOORS = ("shared", "scaled")


def blockwise_param_groups(
    model: nn.Module,
    lr: float,
    ratios: RatiosLike = "paper",
    *,
    weight_decay: float = 0.1,
    decay_norm: bool = False,
    hints: Mapping[str, str] | None = None,
    anchor: str = "norm",
) -> list[dict[str, Any]]:
    """Parameter groups of `model`, one per block type and decay, at `lr` times the type's ratio.

    Each group has `params`, `lr`, `weight_decay`, `name` (unique), `block` (the type), `lr_ratio`
    and `param_names`; any torch optimizer takes them. Every trainable parameter is in exactly one
    group, tied ones once, frozen ones in none.

    * `ratios`: as `halfulp.sharpness.ratios.resolve` says: "paper", "emb=10,qk=8,ffn=6,vo=4", a
      mapping, or a SharpnessReport.
    * Matrices and tables decay. `decay_norm`: norms, biases and other vectors do as well, as in
      the official code. Decay is decoupled: with a ratio of 10, a step shrinks by 10 `lr` times
      `weight_decay`.

    Raises ConfigError as `resolve` does, for a learning rate that is not positive and for a model
    without trainable parameters; PolicyError for parameters whose block no table knows.
    """
    if not 0 < lr < math.inf or not 0 <= weight_decay < math.inf:
        raise ConfigError(
            f"lr = {lr:g} and weight_decay = {weight_decay:g} cannot be used. Give a learning rate "
            "above 0 and a weight decay of 0 or more."
        )
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{type(model).__name__} is no model. Give a torch.nn.Module.")
    model = unwrapped(model)
    kinds, chosen = ratios_of(model, ratios, hints=hints, anchor=anchor)
    groups: dict[tuple[str, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        kind, decays = kinds[name], decay_norm or parameter.ndim >= 2
        fresh = {
            "params": [],
            "lr": lr * chosen[kind],
            "weight_decay": weight_decay if decays else 0.0,
            "name": kind if decays else f"{kind}, no decay",
            "block": kind,
            "lr_ratio": chosen[kind],
            "param_names": [],
        }
        group = groups.setdefault((kind, decays), fresh)
        group["params"].append(parameter)
        group["param_names"].append(name)
    return list(groups.values())


def ratios_of(
    model: nn.Module,
    ratios: RatiosLike,
    *,
    hints: Mapping[str, str] | None = None,
    anchor: str = "norm",
) -> tuple[dict[str, str], Ratios]:
    """(parameter → type that decides its rate, the ratios of the types that are trained)."""
    kinds = lr_types(pieces(model, hints))
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trained = [kind for name, kind in kinds.items() if flags[name]]
    frozen = [kind for name, kind in kinds.items() if not flags[name]]
    if not trained:
        raise ConfigError("no parameter is trainable. Set requires_grad on what should be trained.")
    return kinds, resolve(ratios, trained, frozen, anchor=anchor)


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel and torch.compile; its parameters are the same."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


class BlockwiseSchedule(LRScheduler):
    """The learning rates of `blockwise_param_groups` over `total` steps, as the official code.

    With `peak` = base × ratio and `warmup` steps, `warmup` × ratio where `stretch_warmup` (all
    blocks rise with one slope):

    * "cosine": linear from 0 to `peak`, then a half cosine to the floor at step `total`.
    * "wsd": to `peak`; from the first `anneal` share of the run on, linearly to the base rate
      (ratios end at 1) until the second; from there linearly to the floor.
    * "constant": to `peak`, and stays.

    The floor is `min_lr` × base for every block ("shared"), or × its own peak ("scaled": ratios
    stay to the end, under "wsd" as well).
    Call `step()` after the optimizer's. Raises ConfigError for an optimizer whose groups have no
    `lr_ratio`, and for warm-ups that do not fit into the run.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        total: int,
        warmup: int,
        *,
        kind: str = "cosine",
        min_lr: float = 0.05,
        stretch_warmup: bool = True,
        floor: str = "shared",
        anneal: tuple[float, float] = (1 / 3, 2 / 3),
        last_epoch: int = -1,
    ) -> None:
        _check_options(total, warmup, kind, min_lr, floor, anneal)
        check_groups(optimizer)
        self.ratios = [float(group["lr_ratio"]) for group in optimizer.param_groups]
        self.base_lr = _base_lr(optimizer, self.ratios)
        self.total, self.kind, self.min_lr, self.floor = total, kind, min_lr, floor
        self.warmups = [warmup * (r if stretch_warmup else 1.0) for r in self.ratios]
        self.turns = tuple(int(total * share) for share in anneal)
        _check_warmups(self, optimizer)
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The rate of each group at the present step."""
        pairs = zip(self.ratios, self.warmups, strict=True)
        return [self._lr(self.last_epoch, ratio, warmup) for ratio, warmup in pairs]

    def _lr(self, step: int, ratio: float, warmup: float) -> float:
        base, peak = self.base_lr, self.base_lr * ratio
        floor = self.min_lr * (base if self.floor == "shared" else peak)
        if step < warmup:
            return peak * step / warmup
        if self.kind == "cosine":
            share = min(1.0, (step - warmup) / (self.total - warmup))
            return floor + 0.5 * (1 + math.cos(math.pi * share)) * (peak - floor)
        if self.kind == "constant" or step <= self.turns[0]:
            return peak
        first, second = self.turns
        end = base if self.floor == "shared" else peak  # of the middle part
        if step <= second:
            return peak + (end - peak) * (step - first) / (second - first)
        share = min(1.0, (step - second) / (self.total - second))
        return end + (floor - end) * share


def check_groups(optimizer: torch.optim.Optimizer) -> None:
    """ConfigError for an optimizer that dropped the groups of `blockwise_param_groups`."""
    for i, group in enumerate(optimizer.param_groups):
        missing = [key for key in ("lr", "lr_ratio") if key not in group]
        if missing or not group["params"]:
            what = f"no {missing[0]!r}" if missing else "no parameters"
            raise ConfigError(
                f"group {i} of {type(optimizer).__name__} has {what}: the optimizer did not keep "
                "the groups of blockwise_param_groups, so every block would learn at one rate. "
                "Pass it the list of groups itself, not model.parameters(); an optimizer that "
                "takes no groups cannot have blockwise learning rates."
            )


def _base_lr(optimizer: torch.optim.Optimizer, ratios: list[float]) -> float:
    peaks = [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups]
    bases = [peak / ratio for peak, ratio in zip(peaks, ratios, strict=True)]
    if max(bases) > min(bases) * (1 + 1e-6):  # some optimizers keep rates as fp32 tensors
        low, high = (bases.index(b) for b in (min(bases), max(bases)))
        names = [optimizer.param_groups[i].get("name", f"group {i}") for i in (low, high)]
        raise ConfigError(
            f"lr / lr_ratio is {min(bases):g} for {names[0]} and {max(bases):g} for {names[1]}; "
            "all groups share one base rate. Change the ratios, not the rates: "
            "blockwise_param_groups(model, lr, ratios=…)."
        )
    return bases[0]


def _check_options(
    total: int, warmup: int, kind: str, min_lr: float, floor: str, anneal: tuple[float, float]
) -> None:
    for name, value, known in (("kind", kind, KINDS), ("floor", floor, FLOORS)):
        if value not in known:
            raise ConfigError(
                f"{name} = {value!r} does not exist. Nearest: {nearest(value, known)}."
            )
    if total < 1 or not 0 <= warmup < total:
        raise ConfigError(
            f"total = {total} and warmup = {warmup} cannot be used. Give at least one step and a "
            "warm-up of 0 or more that is shorter than the run."
        )
    if not 0 <= min_lr <= 1 or not 0 < anneal[0] < anneal[1] < 1:
        raise ConfigError(
            f"min_lr = {min_lr:g} and anneal = {anneal} cannot be used. Give a share of the base "
            "rate in [0, 1], and two ascending shares of the run between 0 and 1."
        )


def _check_warmups(schedule: BlockwiseSchedule, optimizer: torch.optim.Optimizer) -> None:
    longest = max(schedule.warmups)
    end = {"cosine": schedule.total, "wsd": schedule.turns[0] + 1, "constant": math.inf}
    if longest >= end[schedule.kind]:
        i = schedule.warmups.index(longest)
        name = optimizer.param_groups[i].get("name", f"group {i}")
        raise ConfigError(
            f"the warm-up of {name} takes {longest:g} steps (warmup × {schedule.ratios[i]:g}), and "
            f"the {schedule.kind} schedule has {end[schedule.kind]:g} for it. Give a shorter "
            "warmup, or stretch_warmup=False."
        )
