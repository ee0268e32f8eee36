"""Measure the sharpness of every block of a model, leaving the model as it was."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, predict
from halfulp.errors import CheckError, ConfigError, NonFiniteError
from halfulp.pieces import Piece, pieces
from halfulp.sharpness.first_order import gradients, traces
from halfulp.sharpness.report import PAPER_TYPES, SharpnessReport

ESTIMATORS = ("gnb", "fisher", "hutchinson", "lanczos")
MOST_DRAWS = 1024  # where a wanted error decides how many
_BIASED = (
    "The empirical Fisher of a mini-batch is not invariant to its size: it adds B ‖E g‖². "
    "Compare blocks only; --estimator gnb has no such bias."
)

Progress = Callable[[str], None]


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
      labels), "hutchinson" (the exact Hessian, by Hessian-vector products) or "lanczos" (largest
      eigenvalue of the Hessian per block type).
    * `draws`: labels or probes. Draws take the batches in turns; the standard error covers the
      batches only where each draw has one of its own.
    * `rel_se`: draw on, up to MOST_DRAWS, until the blocks of the paper have this relative error.

    The model is measured in eval mode and in its own arithmetic (a quantized model as if it were
    not); it, its `.grad`s and the random state are the same afterwards. Raises CheckError for a
    model or batch that cannot be measured, ConfigError for an unknown estimator or numbers out of
    range, PolicyError for parameters in no block and NonFiniteError for losses or gradients that
    are not finite.
    """
    listed = [batches] if isinstance(batches, Tensor | Mapping) else list(batches)
    _check(model, listed, estimator, draws, rel_se)
    say = progress or (lambda _: None)
    parts = pieces(model, hints)
    with _prepared(model) as notes:
        loss, step_seconds = _one_step(model, listed[0])
        start = time.perf_counter()
        report = SharpnessReport(
            model=type(model).__name__, estimator=estimator, pieces=parts, traces=torch.empty(0),
            positions=0, loss_nats=loss, seed=seed, notes=tuple(notes),
        )  # fmt: skip
        report = _first_order(report, model, listed, draws, rel_se, say)
        seconds = time.perf_counter() - start
    return replace(report, cost_steps=seconds / step_seconds)


def _first_order(
    report: SharpnessReport, model: nn.Module, batches: list[Batch], draws: int,
    rel_se: float | None, say: Progress,
) -> SharpnessReport:  # fmt: skip
    generator = torch.Generator(_device(model)).manual_seed(report.seed)
    named = dict(model.named_parameters())
    parameters = [named[p.parameter] for p in report.pieces]
    sampled = report.estimator == "gnb"
    if not sampled:
        report = replace(report, notes=(*report.notes, _BIASED))
    values, positions = [], 0
    while True:
        wanted = draws if not values else min(len(values), MOST_DRAWS - len(values))
        for found, positions in gradients(
            model, batches, parameters, draws=wanted, generator=generator, sampled=sampled
        ):
            values.append(traces(found, positions, report.pieces))
            _check_finite(values[-1], report.pieces)
            say(f"draw {len(values)}")
        report = replace(report, traces=torch.stack(values), positions=positions)
        if rel_se is None or len(values) >= MOST_DRAWS or _precise(report, rel_se):
            return report


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
    """(loss in nats, seconds of a forward and backward pass)."""
    start = time.perf_counter()
    predictions = predict(model, batch)
    loss = nn.functional.cross_entropy(predictions.logits_NV.float(), predictions.targets_N)
    torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss.item(), time.perf_counter() - start


@contextmanager
def _prepared(model: nn.Module) -> Iterator[list[str]]:
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
        if (handle := getattr(model, "halfulp", None)) is not None:
            stack.enter_context(handle.off())
            notes.append("The model is quantized; it was measured in its own precision.")
        model.eval()
        try:
            yield notes
        finally:
            for module, mode in modes:
                module.training = mode


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check(
    model: nn.Module, batches: list[Batch], estimator: str, draws: int, rel_se: float | None
) -> None:
    if estimator not in ESTIMATORS:
        raise ConfigError(
            f"estimator = {estimator!r} does not exist. Give one of {', '.join(ESTIMATORS)}."
        )
    if draws < 2:
        raise ConfigError(f"draws = {draws} gives no standard error. Give 2 or more.")
    if rel_se is not None and not 0 < rel_se < 1:
        raise ConfigError(f"rel_se = {rel_se} is no relative error. Give a number in (0, 1).")
    if not batches:
        raise CheckError("there is no batch to measure on. Give token ids [B, T].")
    if torch.is_inference_mode_enabled():
        raise CheckError("sharpness needs gradients. Leave torch.inference_mode() for this call.")
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen:
        raise CheckError(
            f"{len(frozen)} parameters are frozen, the first is {frozen[0]}: a block without "
            "gradients has no measured sharpness. Unfreeze them with requires_grad_(True) for the "
            "measurement."
        )
