"""The whole check: price every site once, judge formats, target and plan by measured runs."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, run
from halfulp.blocks import BlockMap, block_map
from halfulp.check import measure as runs
from halfulp.check.backward import gemm_errors
from halfulp.check.detect import detect, guard, half_precision
from halfulp.check.goal import goal_of
from halfulp.check.groups import gemm_groups
from halfulp.check.judge import (
    Asked,
    Progress,
    judge_plan,
    judge_uniform,
    routes_attention,
    token_ids,
    verdict_of,
)
from halfulp.check.kernels import check_kernels
from halfulp.check.plan import lowest_safe
from halfulp.check.prices import Prices, price
from halfulp.check.profile import profile_depth
from halfulp.check.reference import Reference, distance
from halfulp.check.report import CheckReport, Row
from halfulp.check.setup import kept_positions, prepare
from halfulp.check.survey import Survey, first_difference, fp32_copy, survey
from halfulp.check.tables import (
    confidence,
    costliest,
    details,
    findings_of,
    heat,
    keep_exact,
)
from halfulp.check.targets import PolicyTarget
from halfulp.check.updates import update_sheet
from halfulp.errors import CheckError, ConfigError
from halfulp.formats import format_quantizer
from halfulp.policy import Policy

DEFAULT_FORMATS = ("bf16", "fp16", "e4m3", "e5m2", "mxfp8", "nvfp4", "int8")


def check(
    model: nn.Module,
    batch: Batch,
    *,
    held_out: Batch | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    budget: float = 1e-3,
    target: str | Path | Policy | None = None,
    lr: float | None = None,
    hardware: str = "any",
    pins: Mapping[str, str] | None = None,
    probes: int = 2,
    rows: float = 1.0,
    seed: int = 0,
    attention: str = "eager",
    hints: Mapping[str, str] | None = None,
    profile: bool = True,
    kernels: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """What every rounding of `model` costs on `batch`, before anything runs in low precision.

    * `batch`: token ids [B, T] or the model's keyword arguments; no labels are needed. `held_out`:
      other text, on which the plan is judged once more.
    * `budget`: nats per token that the plan, and the `target`, may cost.
    * `target`: "bf16", "fp16", "autocast-bf16", "autocast-fp16", a recipe, a Policy or the path of
      a policy.toml: what the verdict is about. Without it, the verdict is about the plan.
    * `lr`: also price the backward GEMMs and one AdamW step at that learning rate.
    * `pins` and `hardware`: as in halfulp.check.plan.plan. `rows`: as in halfulp.check.price.
    * A model in half precision is judged against an fp32 copy of itself.

    The model is unchanged afterwards. Raises CheckError when the model cannot be judged,
    FormatError for unknown formats, ConfigError for values out of range and PolicyError for a
    policy that does not fit.
    """
    _check_options(model, formats, budget, probes, rows, seed, attention)
    model, notes = _made_ready(model)
    asked = Asked(
        model=model, batch=batch, held_out=held_out, formats=tuple(formats), budget=budget,
        hints=hints, attention=attention, say=progress or (lambda _: None),
    )  # fmt: skip
    start = time.perf_counter()
    while True:
        try:
            made = _judge(asked, target, hardware, pins or {}, probes, rows, seed)
            break
        except (torch.OutOfMemoryError, RuntimeError) as error:
            asked = _smaller(asked, error)
            notes.append(f"Memory ran out: only {asked.rows} sequences of the batch are judged.")
    training: dict[str, Any] = {}
    if profile or lr is not None:
        training = _around(asked, lr, profile)
    if kernels:
        asked.say("kernels")
        training["kernels"] = tuple(check_kernels(seed=seed))
    seconds = time.perf_counter() - start
    return CheckReport(
        **made | {"notes": (*notes, *made["notes"])},
        **training,
        model=type(model).__name__,
        reference=str(next(model.parameters()).dtype).removeprefix("torch."),
        seed=seed,
        probes=probes,
        budget=budget,
        seconds=seconds,
        forwards=seconds / _forward_seconds(asked),
    )


def _made_ready(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """The model to judge, and what the reader has to know about it."""
    notes: list[str] = []
    if (dtype := half_precision(model)) is not None:
        name = str(dtype).removeprefix("torch.")
        notes.append(
            f"The checkpoint is {name}: the reference is an fp32 copy of it, so that its weights "
            f"cost nothing in {name}."
        )
        model = fp32_copy(model)
    if model.training:
        notes.append("The model was in train mode; it is judged in eval mode, without dropout.")
    return model, notes


def _check_options(
    model: nn.Module, formats: Sequence[str], budget: float, probes: int, rows: float, seed: int,
    attention: str,
) -> None:  # fmt: skip
    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    number = isinstance(budget, int | float) and not isinstance(budget, bool)
    wrong = {
        "model is no torch module": not isinstance(model, nn.Module),
        f"formats = {formats!r} is no list of names": isinstance(formats, str) or not formats,
        f"budget = {budget!r} is no positive number of nats per token": not (
            number and math.isfinite(budget) and budget > 0
        ),
        f"probes = {probes!r} is no positive count": not (whole(probes) and probes > 0),
        f"rows = {rows!r} is no share of the rows": not 0 < rows <= 1,
        f"seed = {seed!r} is no number from 0 to 2^63 − 1": not (whole(seed) and 0 <= seed < 2**63),
        f"attention = {attention!r} is neither eager nor sdpa": attention not in ("eager", "sdpa"),
    }
    for what, holds in wrong.items():
        if holds:
            raise ConfigError(f"halfulp.check: {what}. Correct it.")
    for word in formats:
        format_quantizer(word)


def _judge(
    asked: Asked,
    target: str | Path | Policy | None,
    hardware: str,
    pins: Mapping[str, str],
    probes: int,
    rows: float,
    seed: int,
) -> dict[str, Any]:
    """Everything that follows from the prices: fields of CheckReport."""
    model, batch, hints = asked.model, asked.batch, asked.hints
    asked.say("survey")
    seen = survey(model, batch, hints=hints, attention=asked.attention)
    blocks = block_map(model, hints)
    goal = goal_of(asked, target, blocks)
    prices = price(
        model, batch, formats=tuple(dict.fromkeys([*asked.formats, *goal.words])),
        families=("operand",), sites=goal.rounded, probes=probes, rows=rows, seed=seed, hints=hints,
        attention=asked.attention,
    )  # fmt: skip
    ref = prices.reference
    _check_reproducible(asked, ref)
    stored = [s.name for s in prices.sites if s.family == "stored" and s.name in goal.bf16.names]
    operands = [s.name for s in prices.sites if s.family == "operand"]
    uniform = _in_each_format(asked, prices, stored, "stored")
    narrow = _in_each_format(asked, prices, operands, "operands")
    row = goal.judge(asked, prices)
    plan = _planned(asked, prices, blocks, hardware, pins)
    guards = guard(model, seen, targets=goal.programs, length=_length(batch))
    return {
        "tokens": ref.tokens,
        "loss_nats": _loss(ref, batch),
        "entropy_nats": ref.entropy,
        "median_margin": ref.median_margin,
        "target": goal.name,
        "verdict": verdict_of(asked, prices, row, plan["plan"]),
        "uniform": uniform,
        "operands": narrow,
        "asked": row,
        **_tables(asked, prices, seen, stored, _focus(asked, uniform, goal.name)),
        **plan,
        "notes": _notes(asked, goal.policy),
        "findings": (*guards, *findings_of(detect(prices), {*stored, *operands}, asked.formats)),
    }


def _in_each_format(
    asked: Asked, prices: Prices, names: Sequence[str], what: str
) -> tuple[Row, ...]:
    return tuple(judge_uniform(asked, prices, names, word, what) for word in asked.formats)


def _planned(
    asked: Asked, prices: Prices, blocks: BlockMap, hardware: str, pins: Mapping[str, str]
) -> dict[str, Any]:
    """The plan and what it could be otherwise: fields of CheckReport."""
    routed = routes_attention(asked.model, blocks)
    found = gemm_groups(prices, blocks)
    groups = tuple(g for g in found if routed or not g.role.startswith("attn_"))
    asked.say("plan")
    plan, row = judge_plan(asked, prices.reference, groups, blocks, hardware, pins)
    lowest = lowest_safe(groups, asked.budget, formats=asked.formats, pins=pins, hardware=hardware)
    return {"plan": row, "what_if": plan.what_if, "lowest_safe": lowest}


def _tables(
    asked: Asked, prices: Prices, seen: Survey, stored: Sequence[str], focus: str
) -> dict[str, Any]:
    """The prices, arranged for the reader: fields of CheckReport."""
    formats = asked.formats
    return {
        "focus": focus,
        "sites": costliest(prices, stored, focus, seen, formats=formats, budget=asked.budget),
        "heat": heat(prices, stored, formats),
        "confidence": confidence(prices, stored, formats),
        "keep": keep_exact(prices, stored, focus),
        "every_site": details(prices, formats, seen),
    }


def _smaller(asked: Asked, error: Exception) -> Asked:
    """With half of the sequences; re-raises what is no lack of memory or cannot be halved."""
    lack = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
    if not lack or asked.rows < 2:
        raise error
    half = asked.rows // 2
    batch = asked.batch
    if isinstance(batch, Mapping):
        rows = asked.rows
        batch = {
            k: v[:half] if isinstance(v, Tensor) and len(v) == rows else v for k, v in batch.items()
        }
        return replace(asked, batch=batch)
    return replace(asked, batch=batch[:half])


def _notes(asked: Asked, policy: PolicyTarget | None) -> tuple[str, ...]:
    said = []
    if asked.attention != "eager":
        said.append(
            "With fused attention, scores and probabilities live in registers and are no sites."
        )
    if not routes_attention(asked.model, block_map(asked.model, asked.hints)):
        said.append(
            f"{type(asked.model).__name__} has an attention of its own, which no policy can round: "
            "the plan leaves the products of attention in fp32."
        )
    if policy is not None and policy.accumulates:
        said.append(
            "The target sums in short accumulators, which have no price: its prediction is that of "
            "its operands alone, its measurement is of both."
        )
    return tuple(said)


def _check_reproducible(asked: Asked, ref: Reference) -> None:
    """CheckError when a second reference run differs from the first."""
    asked.say("reference")
    again = runs.reference(asked.model, asked.batch, attention=asked.attention)
    if torch.equal(again.logits, ref.logits):
        return
    found = distance(ref, again.logits)
    if found.kl < 1e-9:  # another order of summation in fp32
        return
    site = first_difference(asked.model, asked.batch, hints=asked.hints)
    raise CheckError(
        f"two reference runs differ by {found.kl:.2g} nats/token, first at {site or 'the logits'}. "
        "Rounding cannot be told from that noise: make the model deterministic in eval mode."
    )


def _focus(asked: Asked, uniform: Sequence[Row], target: str) -> str:
    """The format that the site list is about: the target's, or the first over the budget."""
    for word in asked.formats:
        if target and target.removeprefix("autocast-") == word:
            return word
    over = (r.name for r in uniform if not r.measured_kl <= asked.budget)
    return next(over, asked.formats[-1])


def _around(asked: Asked, lr: float | None, profile: bool) -> dict[str, Any]:
    """Depth profile, backward GEMMs and the optimizer's step: fields of CheckReport."""
    found: dict[str, Any] = {}
    ids = token_ids(asked.batch)
    if profile and ids is not None and asked.attention == "eager":
        asked.say("depth profile")
        with prepare(asked.model):
            found["profile"] = profile_depth(asked.model, ids, hints=asked.hints)
    return found if lr is None else found | _training(asked, lr)


def _training(asked: Asked, lr: float) -> dict[str, Any]:
    """What rounding does to the backward pass and to the step after it."""
    ids, model = token_ids(asked.batch), asked.model
    if ids is None:
        raise CheckError(
            "backward and update prices need token ids [B, T] as the batch (or input_ids in "
            "it), to make a next-token loss. Give them, or leave lr out."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise CheckError(
            "no parameter requires a gradient, so that there is no update to price. Call "
            "model.requires_grad_() or leave lr out."
        )
    keep = kept_positions(asked.batch, ids[..., None].expand(*ids.shape, 2))
    labels = ids[:, 1:] if keep is None else ids[:, 1:].masked_fill(~keep[:, 1:], -100)

    def loss() -> Tensor:
        logits = run(model, asked.batch)[:, :-1]
        return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

    formats, which = tuple(dict.fromkeys([*asked.formats, "e5m2/e4m3"])), ("dgrad", "wgrad")
    asked.say("backward GEMMs")
    with prepare(model):
        errors = gemm_errors(model, loss, formats=formats, which=which, hints=asked.hints)
        asked.say("optimizer step")
        updates = update_sheet(model, loss, lr=lr, hints=asked.hints)
    return {"backward": errors.rows, "updates": updates}


def _length(batch: Batch) -> int:
    ids = token_ids(batch)
    return 0 if ids is None else ids.shape[1]


def _loss(ref: Reference, batch: Batch) -> float:
    """Next-token loss of the reference, where the batch is token ids and every position counts."""
    ids = token_ids(batch)
    if ids is None or ref.tokens != ids.numel():
        return math.nan
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, -1] = False
    some = Reference(logits=ref.logits[kept.flatten()], margins=ref.margins, entropy=ref.entropy)
    return some.loss(ids[:, 1:].flatten())


def _forward_seconds(asked: Asked) -> float:
    with prepare(asked.model, attention=asked.attention), torch.no_grad():
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            run(asked.model, asked.batch)
            taken.append(time.perf_counter() - start)
    return min(taken)
