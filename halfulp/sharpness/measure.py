"""Measure the sharpness of every block of a model, leaving the model as it was."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, as_list, predict
from halfulp.errors import ConfigError, NonFiniteError
from halfulp.pieces import Piece, pieces
from halfulp.sharpness.first_order import gradients, log_probabilities, mean_loss, traces
from halfulp.sharpness.hessian import Hessian, twice_differentiable
from halfulp.sharpness.hutchinson import probes
from halfulp.sharpness.lanczos import TOLERANCE, Eigenvalue, eigenvalues
from halfulp.sharpness.report import PAPER_TYPES, SharpnessReport
from halfulp.sharpness.setup import check_draws, prepared, refuse

ESTIMATORS = ("gnb", "fisher", "hutchinson", "lanczos")
MOST_DRAWS = 1024  # where a wanted error decides how many
_FEW = 8  # draws below which the reader is told how rough the standard errors are
_BIASED = (
    "The empirical Fisher of a mini-batch is not invariant to its size: it adds B ‖E g‖². "
    "Compare blocks only; --estimator gnb has no such bias."
)
_INDEFINITE = (
    "The Hessian is that of the loss on the true labels, which need not be positive: a trace below "
    "zero is no error. Standard errors are over the random probes and their batches."
)

Progress = Callable[[str], None]
# (n, draws done before) → n × (values [pieces], positions)
Draws = Callable[[int, int], Iterator[tuple[Tensor, int]]]


def sharpness(
    model: nn.Module,
    batches: Batch | Sequence[Batch],
    *,
    estimator: str = "gnb",
    draws: int = 16,
    rel_se: float | None = None,
    hints: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> SharpnessReport:
    """The sharpness of each block of `model` on `batches`: trace / parameters of its curvature.

    * `batches`: token ids [B, T], the model's keyword arguments, or a sequence of either.
    * `estimator`: "gnb" (Gauss-Newton, unbiased, one backward pass for all blocks), "fisher" (true
      labels), "hutchinson" (the exact Hessian, by random probes) or "lanczos" (the traces of
      "gnb", and beside them the largest eigenvalue of the exact Hessian of each block type, on the
      first batch).
    * `draws`: sampled labels or probes; the empirical Fisher, which is not random, has one per
      batch at most. Draws take the batches in turns; the standard error covers the batches only
      where each draw has one of its own.
    * `rel_se`: draw on, up to MOST_DRAWS, until the blocks of the paper have this relative error.

    The model is measured in eval mode and in its own arithmetic: a quantized model as if it were
    not, the exact Hessian as `twice_differentiable` says. It, its `.grad`s and the random state are
    the same afterwards. Raises CheckError for a model or batch that cannot be measured, ConfigError
    for an unknown estimator or numbers out of range, PolicyError for parameters in no block and
    NonFiniteError for losses or gradients that are not finite.
    """
    listed = as_list(batches)
    check_draws(draws, seed)
    _check_numbers(estimator, rel_se)
    refuse(model, listed)
    say = progress or (lambda _: None)
    eager = getattr(model, "_orig_mod", model)  # of a model from torch.compile
    parts = pieces(eager, hints)
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    with prepared(model) as notes:
        loss, step_seconds = _one_step(model, listed[0])
        start = time.perf_counter()
        report = SharpnessReport(
            model=type(eager).__name__, estimator=estimator, pieces=parts, traces=torch.empty(0),
            positions=0, loss_nats=loss, seed=seed, notes=tuple(notes),
        )  # fmt: skip
        if estimator == "hutchinson":
            with twice_differentiable(model) as more:
                source = _probed(eager, listed, parts, generator)
                report = _drawn(_noted(report, *more, _INDEFINITE), source, draws, rel_se, say)
        elif estimator == "fisher":
            source = _differentiated(model, listed, parts, generator, sampled=False)
            report = _drawn(_noted(report, _BIASED), source, draws, rel_se, say, len(listed))
        else:
            source = _differentiated(model, listed, parts, generator)
            report = _drawn(report, source, draws, rel_se, say)
        if estimator == "lanczos":
            report = _with_eigenvalues(report, model, listed[0], generator, say)
        seconds = time.perf_counter() - start
    if report.draws < len(listed):
        report = _noted(report, f"Draws used {report.draws} of the {len(listed)} batches.")
    if report.draws < _FEW:
        report = _noted(report, _rough(report.draws))
    return replace(report, cost_steps=seconds / step_seconds)


def _probed(
    model: nn.Module, batches: Sequence[Batch], parts: Sequence[Piece], generator: torch.Generator
) -> Draws:
    return lambda draws, done: probes(
        model, _from(batches, done), parts, draws=draws, generator=generator
    )


def _differentiated(
    model: nn.Module, batches: Sequence[Batch], parts: Sequence[Piece],
    generator: torch.Generator, *, sampled: bool = True,
) -> Draws:  # fmt: skip
    named = dict(getattr(model, "_orig_mod", model).named_parameters())
    parameters = [named[p.parameter] for p in parts]

    def draw(draws: int, done: int) -> Iterator[tuple[Tensor, int]]:
        turn = _from(batches, done)
        for found, positions in gradients(
            model, turn, parameters, draws=draws, generator=generator, sampled=sampled
        ):
            yield traces(found, positions, parts), positions

    return draw


def _from(batches: Sequence[Batch], done: int) -> Sequence[Batch]:
    """The batches, beginning with the one whose turn it is after `done` draws."""
    first = done % len(batches)
    return [*batches[first:], *batches[:first]]


def _drawn(
    report: SharpnessReport, source: Draws, draws: int, rel_se: float | None, say: Progress,
    most: int | None = None,
) -> SharpnessReport:  # fmt: skip
    """`draws` draws; with a wanted error, doubled until it is reached or there are `most`."""
    most = max(draws, MOST_DRAWS) if most is None else most
    values: list[Tensor] = []
    positions: list[int] = []
    wanted = min(draws, most)
    while wanted > 0:
        for value, size in source(wanted, len(values)):
            _check_finite(value, report.pieces)
            values.append(value)
            positions.append(size)
            say(f"draw {len(values)}")
        mean = round(sum(positions) / len(positions))
        report = replace(report, traces=torch.stack(values), positions=mean)
        if rel_se is None or _precise(report, rel_se):
            return report
        wanted = min(len(values), most - len(values))
    return _noted(report, f"{len(values)} draws did not reach the relative error {rel_se:g}.")


def _with_eigenvalues(
    report: SharpnessReport, model: nn.Module, batch: Batch, generator: torch.Generator,
    say: Progress,
) -> SharpnessReport:  # fmt: skip
    say("eigenvalues")
    with twice_differentiable(model) as notes:
        hessian = Hessian(getattr(model, "_orig_mod", model), batch, report.pieces)
        hessian.check(generator)
        found = eigenvalues(hessian, generator=generator)
    largest = (
        "Largest eigenvalues are those of the exact Hessian of the first batch, "
        f"{hessian.positions} positions; traces are the Gauss-Newton matrix's."
    )
    report = replace(report, eigenvalues={kind: e.value for kind, e in found.items()})
    return _noted(report, *notes, largest, *_unconverged(found))


def _unconverged(found: Mapping[str, Eigenvalue]) -> list[str]:
    rough = {kind: e for kind, e in found.items() if not e.converged}
    if not rough:
        return []
    each = ", ".join(f"{kind} (± {e.residual:.2g})" for kind, e in rough.items())
    return [
        f"Lanczos did not come within {TOLERANCE:.0%} in {max(e.steps for e in rough.values())} "
        f"steps, so these eigenvalues are lower bounds: {each}."
    ]


def _noted(report: SharpnessReport, *notes: str) -> SharpnessReport:
    return replace(report, notes=(*report.notes, *notes))


def _rough(draws: int) -> str:
    if draws == 1:
        return "With one draw there is no standard error."
    error = 1 / math.sqrt(2 * (draws - 1))
    return f"With {draws} draws the standard errors are themselves ± {error:.0%}."


def _precise(report: SharpnessReport, rel_se: float) -> bool:
    return all(r.rel_se <= rel_se for r in report.rows() if r.kind in PAPER_TYPES)


def _check_finite(values: Tensor, parts: Sequence[Piece]) -> None:
    bad = [p.name for p, ok in zip(parts, torch.isfinite(values).tolist(), strict=True) if not ok]
    if bad:
        raise NonFiniteError(
            f"the curvature of {len(bad)} tensors is not finite, the first is {bad[0]}: a gradient "
            "overflowed. Measure in fp32 (model.float()), or leave the batch out."
        )


def _one_step(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """(loss in nats, seconds of a forward and backward pass, the better of two)."""
    taken, loss = [], torch.empty(0)
    for _ in range(2):
        start = time.perf_counter()
        predictions = predict(model, batch)
        loss = mean_loss(log_probabilities(predictions.logits_NV), predictions.targets_N)
        torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        if loss.is_cuda:
            torch.cuda.synchronize(loss.device)
        taken.append(time.perf_counter() - start)
    return loss.item(), min(taken)


def _check_numbers(estimator: str, rel_se: float | None) -> None:
    if estimator not in ESTIMATORS:
        raise ConfigError(
            f"estimator = {estimator!r} does not exist. Give one of {', '.join(ESTIMATORS)}."
        )
    number = isinstance(rel_se, int | float)
    if rel_se is not None and not (number and 0 < rel_se < 1):
        raise ConfigError(f"rel_se = {rel_se!r} is no relative error. Give a number in (0, 1).")
