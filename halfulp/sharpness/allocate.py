"""Bits per tensor: the format of every weight of a model, for an average of bits or a budget.

Damages of tensors add up, so that the choice is a knapsack. The damage of a tensor in a format is
½ Σ h δ², with the diagonal h of the Gauss-Newton matrix at every weight; averages of h and rules
without curvature are there to be compared with (HAWQ-V2, arXiv:1911.03852, §3).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from halfulp.batch import Batch, as_list
from halfulp.errors import ConfigError
from halfulp.formats import format_bits
from halfulp.knapsack import allocate as knapsack
from halfulp.sharpness.curvature import Curvature, loss_on, measure_curvature
from halfulp.sharpness.rounding import Terms, terms
from halfulp.sharpness.setup import check_draws, prepared, refuse
from halfulp.sharpness.weights import Weights, in_place, weight_quantizer

CANDIDATES = ("bf16", "int8@row:current", "int4@1x32:current")
VECTOR_BITS = 16  # gains and biases are few and sharp: never fewer bits than these
_VECTOR_FORMAT = "bf16"
RULES = ("diagonal", "tensor", "type", "squared_error", "relative_error")


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The format of each parameter, and what all of them together do to the loss in nats.

    `predicted` is ½ Σ h δ² whatever rule chose; `measured` and `held_out` are changes of the loss,
    NaN where nothing was measured. `bits`: average per weight, scales of blocks included.
    """

    formats: Mapping[str, str]
    parameters: Mapping[str, int]
    bits: float
    rule: str
    predicted: float
    measured: float
    held_out: float

    def rows(self) -> tuple[tuple[str, int, str, float], ...]:
        """(parameter, elements, format, bits per element) in the model's order."""
        return tuple((n, self.parameters[n], w, format_bits(w)) for n, w in self.formats.items())


def allocate(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    bits: float | None = None,
    budget_nats: float | None = None,
    candidates: Sequence[str] = CANDIDATES,
    rule: str = "diagonal",
    held_out: Batch | Sequence[Batch] | None = None,
    draws: int = 16,
    seed: int = 0,
    hints: Mapping[str, str] | None = None,
    curvature: Curvature | None = None,
) -> Allocation:
    """The least damage at an average of `bits` per weight, or the fewest bits within `budget_nats`.

    * `candidates`: words of halfulp.formats. Vectors keep the widest candidate of VECTOR_BITS or
      more, bf16 if there is none.
    * `rule`: what counts as damage. "diagonal" ½ Σ h δ², "tensor" and "type" ½ h̄ Σ δ² with the mean
      h of the tensor or block type, "squared_error" Σ δ², "relative_error" Σ δ² / Σ w².
    * `curvature`: a Curvature of this model and these batches, else one is measured.

    The model is bit for bit the same afterwards. Raises ConfigError for numbers out of reach, and
    as halfulp.sharpness.rounding.forecast does.
    """
    model = getattr(model, "_orig_mod", model)  # of a model from torch.compile
    listed, others = as_list(batches), as_list(held_out)
    refuse(model, listed)
    check_draws(draws, seed)
    _check_request(bits, budget_nats, candidates, rule)
    vector = _vector_word(candidates)
    quantizers = {word: weight_quantizer(word) for word in (*candidates, vector)}
    weights = Weights.of(model, hints)
    with prepared(model):
        known = curvature or measure_curvature(model, listed, draws=draws, seed=seed, hints=hints)
        damages = {
            word: _damages(terms(known, weights, q), known, weights, rule)
            for word, q in quantizers.items()
        }
        formats = _choose(damages, weights, candidates, vector, bits, budget_nats)
        chosen = {name: quantizers[word] for name, word in formats.items()}
        rises = []
        for group in (listed, others):
            before = loss_on(model, group) if group else math.nan
            with in_place(weights, known.pieces, chosen):
                rises.append(loss_on(model, group) - before if group else math.nan)
    sizes = {name: p.numel() for name, p in weights.tensors.items()}
    return Allocation(
        formats=formats,
        parameters=sizes,
        bits=sum(sizes[n] * format_bits(w) for n, w in formats.items()) / sum(sizes.values()),
        rule=rule,
        predicted=terms(known, weights, chosen).second.sum().item(),
        measured=rises[0],
        held_out=rises[1],
    )


def _damages(each: Terms, curvature: Curvature, weights: Weights, rule: str) -> Tensor:
    """The damage of each parameter by `rule`, fp64 [parameters], in the model's order."""
    pieces = curvature.pieces
    at = {name: i for i, name in enumerate(weights.tensors)}
    parameter = torch.tensor([at[p.parameter] for p in pieces])
    numel = torch.tensor([p.numel for p in pieces], dtype=torch.float64)
    trace, zero = curvature.traces.mean(0), torch.zeros(len(at), dtype=torch.float64)
    if rule == "diagonal":
        damage = each.second
    elif rule == "tensor":
        damage = trace / numel * each.square / 2
    elif rule == "type":
        kinds = {p.kind: n for n, p in enumerate(pieces)}
        kind = torch.tensor([kinds[p.kind] for p in pieces])
        total = torch.zeros_like(trace)
        mean = total.index_add(0, kind, trace) / total.index_add(0, kind, numel)
        damage = mean[kind] * each.square / 2
    elif rule == "squared_error":
        damage = each.square
    else:
        size = zero.index_add(0, parameter, each.size)[parameter]
        damage = each.square / size.where(size > 0, 1.0)
    return zero.index_add(0, parameter, damage)


def _choose(
    damages: Mapping[str, Tensor], weights: Weights, words: Sequence[str], vector: str,
    bits: float | None, budget_nats: float | None,
) -> dict[str, str]:  # fmt: skip
    """The format of each parameter; `damages` by word."""
    names = list(damages)
    vectors = np.array([p.ndim < 2 for p in weights.tensors.values()])
    sizes = np.array([p.numel() for p in weights.tensors.values()], dtype=np.float64)
    cost = sizes[:, None] * np.array([format_bits(w) for w in names])
    damage = np.stack([damages[w].numpy() for w in names], axis=1)
    allowed = np.where(
        vectors[:, None],
        np.array([w == vector for w in names]),
        np.array([w in words for w in names]),
    )
    limited, free = (cost, damage) if bits is not None else (damage, cost)
    limited = np.where(allowed, limited, math.inf)
    limit = bits * sizes.sum() if bits is not None else budget_nats
    assert limit is not None
    if (least := limited.min(1).sum()) > limit:
        found = f"{least / sizes.sum():.4g} bits" if bits is not None else f"{least:.3g} nats"
        raise ConfigError(
            f"{'bits' if bits is not None else 'budget_nats'} = {bits or budget_nats:g} cannot be "
            f"reached: these candidates need {found} or more. Ask for that, or add a "
            f"{'narrower' if bits is not None else 'wider'} candidate."
        )
    options = knapsack(free, limited, limit)
    return {name: names[int(o)] for name, o in zip(weights.tensors, options, strict=True)}


def _vector_word(candidates: Sequence[str]) -> str:
    widest = max(candidates, key=format_bits)
    return widest if format_bits(widest) >= VECTOR_BITS else _VECTOR_FORMAT


def _check_request(
    bits: float | None, budget_nats: float | None, candidates: Sequence[str], rule: str
) -> None:
    if (bits is None) == (budget_nats is None):
        raise ConfigError("allocate takes bits= or budget_nats=, one of them.")
    if bits is not None and not 0 < bits < math.inf:
        raise ConfigError(f"bits = {bits} is no average. Give a number above 0, such as 6.")
    if budget_nats is not None and not 0 < budget_nats < math.inf:
        raise ConfigError(f"budget_nats = {budget_nats} leaves no room. Give nats above 0.")
    if len(candidates) < 2:
        raise ConfigError("there is nothing to choose from. Give two candidates or more.")
    if rule not in RULES:
        raise ConfigError(f"rule = {rule!r} does not exist. Give one of {', '.join(RULES)}.")
    if budget_nats is not None and rule not in RULES[:3]:
        raise ConfigError(
            f"rule {rule!r} is not in nats, so that it has no budget. Ask for bits=, or use "
            f"{', '.join(RULES[:3])}."
        )
