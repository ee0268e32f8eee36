"""What rounding the weights of each block to each format does to the loss: forecast, and measured.

For an error δ of a block the loss rises by g·δ + ½ δᵀHδ. The forecast takes the diagonal h of the
Gauss-Newton matrix for H (one measurement serves every format) and the whole matrix for vectors,
whose errors move together; under stochastic rounding g and the cross terms vanish in expectation
and ½ Σ h E e² is left.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, as_list
from halfulp.errors import ConfigError
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key
from halfulp.pieces import PIECE_TYPES, Piece
from halfulp.sharpness.coherent import quadratic_form
from halfulp.sharpness.curvature import Curvature, loss_on, measure_curvature
from halfulp.sharpness.rounding_report import WHOLE, Forecast, RoundingRow
from halfulp.sharpness.setup import check_draws, prepared, refuse
from halfulp.sharpness.weights import Weights, in_place, weight_quantizer

FORMATS = ("bf16", "e4m3", "mxfp8", "int8@row:current", "nvfp4", "int4@1x32:current")
BUDGET_NATS = 5e-3

_ROUTED = (
    "The model has routers: rounding may send tokens to other experts, which no forecast sees. "
    "Trust the measurements."
)

Progress = Callable[[str], None]


def forecast(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    held_out: Batch | Sequence[Batch] | None = None,
    formats: Sequence[str] = FORMATS,
    draws: int = 16,
    seeds: int = 3,
    seed: int = 0,
    budget_nats: float = BUDGET_NATS,
    hints: Mapping[str, str] | None = None,
    measure: bool = True,
    progress: Progress | None = None,
) -> Forecast:
    """The change of the loss on rounding each block type of `model` to each of `formats`.

    * `formats`: words of halfulp.formats. Scales run along the reduction dimension; a slice of a
      fused projection is rounded with the scales of the whole.
    * `draws`: labels for the diagonal. `seeds`: stochastic roundings that are measured.
    * `held_out`: other batches on which nearest rounding is measured as well.
    * `budget_nats`: what each block type alone may cost (`Forecast.lowest`).
    * `measure`: off, only the forecast: draws + 1 passes, and two per format for vectors. On, each
      block type and format costs 1 + seeds forward passes more.

    Everything is done in eval mode and in the model's own arithmetic; the model is bit for bit the
    same afterwards. Raises FormatError, CheckError, ConfigError, PolicyError and NonFiniteError
    for formats, models, numbers, parameters and losses that cannot be used.
    """
    model = getattr(model, "_orig_mod", model)  # of a model from torch.compile
    listed, others = as_list(batches), as_list(held_out)
    quantizers = {word: weight_quantizer(word) for word in formats}
    refuse(model, listed)
    check_draws(draws, seed)
    _check_numbers(quantizers, budget_nats, seeds, measure, held_out is not None)
    weights = Weights.of(model, hints)
    say = progress or (lambda _: None)
    with prepared(model) as notes:
        found = measure_curvature(model, listed, draws=draws, seed=seed, hints=hints, say=say)
        losses = (loss_on(model, listed), loss_on(model, others) if others else math.nan)
        task = _Task(model, weights, listed, others, losses, seeds if measure else 0, seed)
        groups = _by_type(found.pieces)
        rows = [
            row
            for word, q in quantizers.items()
            for row in _rows(task, found, groups, word, q, say)
        ]
    blocks = [r for block in groups for r in rows if r.block == block]
    return Forecast(
        blocks=tuple(blocks), whole=tuple(r for r in rows if r.block == WHOLE),
        formats=tuple(quantizers), budget_nats=budget_nats, loss_nats=losses[0],
        held_out_nats=losses[1], positions=found.positions, draws=draws, seeds=task.seeds,
        seed=seed, notes=(*notes, *([_ROUTED] if "router" in groups else [])),
    )  # fmt: skip


@dataclass(frozen=True)
class Terms:
    """The terms of a forecast, one per piece, fp64 [pieces]."""

    first: Tensor  # g·δ
    second: Tensor  # ½ Σ hδ²
    drift: Tensor  # Σ g E e under stochastic rounding: 0 unless values lie beyond the largest
    variance: Tensor  # ½ Σ h E e²
    square: Tensor  # Σ δ²
    size: Tensor  # Σ w²


def terms(found: Curvature, weights: Weights, words: Mapping[str, Quantizer] | Quantizer) -> Terms:
    """The terms of every piece under a quantizer, or one per parameter."""
    table = torch.zeros(6, len(found.pieces), dtype=torch.float64)
    names: dict[str, list[int]] = {}
    for i, piece in enumerate(found.pieces):
        names.setdefault(piece.parameter, []).append(i)
    for name, members in names.items():
        q = words if isinstance(words, Quantizer) else words[name]
        g, h, w = found.gradient[name], found.diagonal[name], weights.tensors[name].detach()
        e, (mean, square) = weights.error(name, q), weights.moments(name, q)
        parts = (g * e, h * e.square() / 2, g * mean, h * square / 2, e.square(), w.square())
        for i in members:
            of = found.pieces[i].of
            table[:, i] = torch.stack([of(p).sum(dtype=torch.float64) for p in parts]).cpu()
    return Terms(*table)


@dataclass(frozen=True)
class _Task:
    """What the measurements of all rows share."""

    model: nn.Module
    weights: Weights
    batches: Sequence[Batch]
    held_out: Sequence[Batch]
    losses: tuple[float, float]
    seeds: int  # 0: nothing is measured
    seed: int


def _rows(
    task: _Task, found: Curvature, groups: Mapping[str, list[int]], word: str, q: Quantizer,
    say: Progress,
) -> list[RoundingRow]:  # fmt: skip
    """The rows of every block type and of the whole in one format."""
    each, rows = terms(found, task.weights, q), []
    for block, members in groups.items():
        say(f"{block} in {word}")
        pieces = [found.pieces[i] for i in members]
        second = _second_order(task, each, found, members, q)
        row = RoundingRow(
            block=block, parameters=sum(p.numel for p in pieces), format=word,
            first_order=each.first[members].sum().item(),
            first_order_se=math.sqrt(2 * second / found.positions), second_order=second,
            predicted_stochastic=(each.drift + each.variance)[members].sum().item(),
            rel_se=found.rel_se(members),
        )  # fmt: skip
        rows.append(_measured(task, found, row, pieces, q, each.drift[members].sum().item()))
    say(f"all blocks in {word}")
    second = math.fsum(r.second_order for r in rows)
    whole = RoundingRow(
        block=WHOLE, parameters=sum(r.parameters for r in rows), format=word,
        first_order=math.fsum(r.first_order for r in rows),
        first_order_se=math.sqrt(2 * second / found.positions), second_order=second,
        predicted_stochastic=math.fsum(r.predicted_stochastic for r in rows),
        rel_se=found.rel_se(range(len(found.pieces))),
    )  # fmt: skip
    return [*rows, _measured(task, found, whole, found.pieces, q, each.drift.sum().item())]


def _second_order(
    task: _Task, each: Terms, found: Curvature, members: Sequence[int], q: Quantizer
) -> float:
    """½ Σ hδ² of the matrices and ½ δᵀGδ of the vectors among the members."""
    weights = task.weights
    names = [found.pieces[i].parameter for i in members]
    vectors = dict.fromkeys(n for n in names if weights.tensors[n].ndim < 2)
    matrices = [i for i, n in zip(members, names, strict=True) if n not in vectors]
    direction = {n: weights.error(n, q) for n in vectors}
    coherent = quadratic_form(task.model, task.batches, weights, direction)
    return each.second[matrices].sum().item() + coherent


def _measured(
    task: _Task, found: Curvature, row: RoundingRow, pieces: Sequence[Piece], q: Quantizer,
    drift: float,
) -> RoundingRow:  # fmt: skip
    if not task.seeds:
        return row
    other = math.nan
    with in_place(task.weights, pieces, q):
        nearest = loss_on(task.model, task.batches) - task.losses[0]
        if task.held_out:
            other = loss_on(task.model, task.held_out) - task.losses[1]
    rises = []
    for n in range(task.seeds):
        with in_place(task.weights, pieces, q, key=Key.of(task.seed, row.format).fold(n)) as before:
            # g·e has the mean `drift` and most of the variance: a control variate.
            first = _along(found, task.weights, pieces, before)
            rises.append(loss_on(task.model, task.batches) - task.losses[0] - first + drift)
    stochastic = torch.tensor(rises, dtype=torch.float64)
    return replace(
        row,
        measured=nearest,
        held_out=other,
        measured_stochastic=stochastic.mean().item(),
        stochastic_se=stochastic.std().item() / task.seeds**0.5,
    )


def _along(
    found: Curvature, weights: Weights, pieces: Sequence[Piece], before: Mapping[str, Tensor]
) -> float:
    """g·(w − before) over the pieces."""
    total = 0.0
    for piece in pieces:
        name = piece.parameter
        moved = weights.tensors[name].detach().double() - before[name]
        total += piece.of(found.gradient[name] * moved).sum().item()
    return total


def _by_type(pieces: Sequence[Piece]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        groups.setdefault(piece.kind, []).append(i)
    return {kind: groups[kind] for kind in PIECE_TYPES if kind in groups}


def _check_numbers(
    quantizers: Mapping[str, Quantizer], budget_nats: float, seeds: int, measure: bool, other: bool
) -> None:
    if not quantizers:
        raise ConfigError("there is no format to forecast. Give one or more, such as e4m3.")
    if not 0 < budget_nats < math.inf:
        raise ConfigError(
            f"budget_nats = {budget_nats} leaves no room for any format. Give nats above 0, such "
            f"as {BUDGET_NATS:g}."
        )
    if seeds < 2:
        raise ConfigError(f"seeds = {seeds} gives no interval. Give 2 or more.")
    if other and not measure:
        raise ConfigError(
            "held_out is only measured on, and measure=False measures nothing. Leave one out."
        )
