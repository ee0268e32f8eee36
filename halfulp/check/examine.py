"""The whole check: price every site once, judge formats, target and plan by measured runs."""

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.blocks import BlockMap, block_map
from halfulp.check import measure as runs
from halfulp.check.backward import GemmError, gemm_errors
from halfulp.check.detect import (
    UNPRICED_LIMIT,
    beyond_linear,
    detect,
    guard,
    half_precision,
)
from halfulp.check.groups import gemm_groups
from halfulp.check.kernels import check_kernels
from halfulp.check.plan import Plan, lowest_safe, plan
from halfulp.check.prices import Prices, price
from halfulp.check.profile import DepthProfile, profile_depth
from halfulp.check.reference import Reference, distance, predicted_flips
from halfulp.check.report import CheckReport, PlanRow, Row, Verdict
from halfulp.check.setup import Batch, kept_positions, prepare, run
from halfulp.check.survey import first_difference, fp32_copy, survey
from halfulp.check.tables import (
    confidence,
    costliest,
    details,
    findings_of,
    heat,
    keep_exact,
)
from halfulp.check.targets import PolicyTarget, is_program, load_target, stored_weights
from halfulp.check.trace import Trace, trace
from halfulp.check.updates import UpdateSheet, update_sheet
from halfulp.errors import CheckError, ConfigError
from halfulp.policy import Policy
from halfulp.quantization import has_attention_interface

DEFAULT_FORMATS = ("bf16", "fp16", "e4m3", "e5m2", "mxfp8", "nvfp4", "int8")
TRIES = 3
_ALTERNATIVES = 16
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class _Asked:
    """What the user asked for, made ready."""

    model: nn.Module
    batch: Batch
    held_out: Batch | None
    formats: tuple[str, ...]
    budget: float
    hints: Mapping[str, str] | None
    attention: str
    say: Progress

    @property
    def rows(self) -> int:
        ids = _ids(self.batch)
        return 0 if ids is None else len(ids)


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
    asked = _Asked(
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


def _judge(
    asked: _Asked,
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
    name = "" if target is None else str(getattr(target, "name", target))
    program = isinstance(target, str) and is_program(target)
    policy = None if target is None or program else load_target(model, target, blocks)
    asked.say("pricing")
    bf16 = trace(model, batch, "bf16", hints=hints, attention=asked.attention)
    ran = _traced(asked, str(target), bf16) if program else None
    rounded = bf16.names | (ran.names if ran else frozenset())
    if policy is not None:
        rounded |= {f"weight:{module}.{p}" for module in policy.tables for p in ("weight", "bias")}
        rounded |= {f"weight:{name}" for name in policy.weights}
    more = policy.words if policy else (ran.format,) if ran else ()
    words = tuple(dict.fromkeys([*asked.formats, *more]))
    prices = price(
        model, batch, formats=words, families=("operand",), sites=rounded, probes=probes,
        rows=rows, seed=seed, hints=hints, attention=asked.attention,
    )  # fmt: skip
    ref = prices.reference
    _check_reproducible(asked, ref)
    stored = [s.name for s in prices.sites if s.family == "stored" and s.name in bf16.names]
    operands = [s.name for s in prices.sites if s.family == "operand"]
    uniform = tuple(_uniform(asked, prices, stored, word, "stored") for word in asked.formats)
    narrow = tuple(_uniform(asked, prices, operands, word, "operands") for word in asked.formats)
    row = None
    if ran is not None:
        row = _program(asked, prices, ran)
    elif policy is not None:
        row = _policy(asked, prices, policy, name)
    groups = tuple(
        g
        for g in gemm_groups(prices, blocks)
        if not g.role.startswith("attn_") or _routes_attention(model, blocks)
    )
    asked.say("plan")
    planned = _plan(asked, ref, groups, blocks, hardware, pins)
    focus = _focus(asked, uniform, name)
    guards = guard(model, seen, targets=(str(target),) if program else (), length=_length(batch))
    return {
        "tokens": ref.tokens,
        "loss_nats": _loss(ref, batch),
        "entropy_nats": ref.entropy,
        "median_margin": ref.median_margin,
        "target": name,
        "verdict": _verdict(asked, prices, row, planned[1]),
        "uniform": uniform,
        "operands": narrow,
        "asked": row,
        "focus": focus,
        "sites": costliest(prices, stored, focus, seen, formats=asked.formats, budget=asked.budget),
        "heat": heat(prices, stored, asked.formats),
        "confidence": confidence(prices, stored, asked.formats),
        "lowest_safe": lowest_safe(
            groups, asked.budget, formats=asked.formats, pins=pins, hardware=hardware
        ),
        "plan": planned[1],
        "what_if": planned[0].what_if,
        "keep": keep_exact(prices, stored, focus),
        "every_site": details(prices, asked.formats, seen),
        "notes": _notes(asked, policy),
        "findings": (*guards, *findings_of(detect(prices), {*stored, *operands}, asked.formats)),
    }


def _smaller(asked: _Asked, error: Exception) -> _Asked:
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


def _routes_attention(model: nn.Module, blocks: BlockMap) -> bool:
    """Whether halfulp.quantize can round the products of every attention of the model."""
    modules = {g.module for g in blocks.gemms if g.role.startswith("attn_")}
    return all(has_attention_interface(model, model.get_submodule(m)) for m in modules)


def _notes(asked: _Asked, policy: PolicyTarget | None) -> tuple[str, ...]:
    said = []
    if asked.attention != "eager":
        said.append(
            "With fused attention, scores and probabilities live in registers and are no sites."
        )
    if not _routes_attention(asked.model, block_map(asked.model, asked.hints)):
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


def _check_reproducible(asked: _Asked, ref: Reference) -> None:
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


def _uniform(asked: _Asked, prices: Prices, names: Collection[str], word: str, what: str) -> Row:
    asked.say(f"{word}, {what}")
    assignment = runs.uniform(names, word)
    measured = runs.measure(
        asked.model, asked.batch, assignment, prices.reference, hints=asked.hints,
        attention=asked.attention,
    )  # fmt: skip
    return _row(prices, word, assignment, measured)


def _row(
    prices: Prices, name: str, assignment: Mapping[str, str], measured: runs.Measured, why: str = ""
) -> Row:
    doubt = beyond_linear(prices, assignment)
    why = why or ("" if doubt is None else doubt.text)
    cells = [(prices.index(n), prices.formats.index(w)) for n, w in assignment.items()]
    kl, variance = (
        math.fsum(x for x in (t[i, j].item() for i, j in cells) if x == x)
        for t in (prices.kl, prices.margin_variance)
    )
    flips = predicted_flips(prices.reference, variance, alternatives=_ALTERNATIVES)
    return Row(
        name=name,
        sites=len(assignment),
        predicted_kl=math.nan if why else kl,
        measured_kl=measured.kl,
        predicted_flips=math.nan if why else flips,
        measured_flips=measured.flips,
        range_events=len(measured.overflowed),
        why=why,
    )


def _traced(asked: _Asked, target: str, bf16: Trace) -> Trace:
    if target == "bf16":
        return bf16
    return trace(asked.model, asked.batch, target, hints=asked.hints, attention=asked.attention)


def _program(asked: _Asked, prices: Prices, ran: Trace) -> Row:
    asked.say(ran.target)
    measured = runs.measure_target(
        asked.model, asked.batch, ran.target, prices.reference, attention=asked.attention
    )
    priced = {s.name for s in prices.sites}
    assignment = {n: ran.format for n in ran.names if n in priced}
    return _row(prices, ran.target, assignment, measured)


def _policy(asked: _Asked, prices: Prices, target: PolicyTarget, name: str) -> Row:
    asked.say(name)
    with stored_weights(asked.model, target):
        measured = runs.measure_policy(
            asked.model, asked.batch, target.policy, prices.reference, hints=asked.hints,
            allow_partial=True,
        )  # fmt: skip
    return _row(prices, name, target.plan(prices), measured, target.why)


def _plan(
    asked: _Asked, ref: Reference, groups, blocks, hardware: str, pins: Mapping[str, str]
) -> tuple[Plan, PlanRow]:
    """The plan whose measured KL meets the budget; later tries plan for what the first overran."""
    aim, tries = asked.budget, []
    while True:
        tries.append(aim)
        made = plan(groups, aim, formats=asked.formats, pins=pins, hardware=hardware)
        policy = made.to_policy(blocks)
        found = runs.measure_policy(asked.model, asked.batch, policy, ref, hints=asked.hints)
        if found.kl <= asked.budget or len(tries) == TRIES or not math.isfinite(found.kl):
            break
        aim *= 0.98 * asked.budget / found.kl
    fresh = _held_out(asked, policy)
    return made, PlanRow(
        formats=made.formats,
        predicted_kl=made.predicted_kl,
        measured_kl=found.kl,
        measured_flips=found.flips,
        held_out_kl=fresh.kl if fresh else math.nan,
        held_out_flips=fresh.flips if fresh else math.nan,
        average_bits=made.average_bits,
        hardware=made.hardware,
        tries=tuple(tries),
        excluded=made.excluded,
        policy=made.to_toml(blocks),
    )


def _held_out(asked: _Asked, policy: Policy) -> runs.Measured | None:
    if asked.held_out is None:
        return None
    asked.say("plan, held-out text")
    ref = runs.reference(asked.model, asked.held_out, attention=asked.attention)
    return runs.measure_policy(asked.model, asked.held_out, policy, ref, hints=asked.hints)


def _verdict(asked: _Asked, prices: Prices, row: Row | None, planned: PlanRow) -> Verdict:
    share = prices.unpriced_share
    if share > UNPRICED_LIMIT:
        return Verdict(
            status="could not tell",
            sentence=f"{share:.0%} of the operations have no price ({prices.unpriced[0]}, …): the "
            "site list is incomplete, so neither prices nor plan can be trusted.",
        )
    kl = planned.measured_kl if row is None else row.measured_kl
    what = "the plan" if row is None else row.name
    flips = planned.measured_flips if row is None else row.measured_flips
    if not math.isfinite(kl):
        return Verdict(status="fail", sentence=f"{what} makes logits that are inf or NaN.")
    fits = kl <= asked.budget
    sentence = (
        f"{what} costs {kl:.2g} nats/token and changes {flips:.2%} of the next-token choices, "
        f"{'within' if fits else 'above'} the budget of {asked.budget:g}."
    )
    if row is None:
        sentence += f" It uses {planned.average_bits:.1f} bits per operand on average."
    return Verdict(status="pass" if fits else "fail", sentence=sentence)


def _focus(asked: _Asked, uniform: Sequence[Row], target: str) -> str:
    """The format that the site list is about: the target's, or the first over the budget."""
    for word in asked.formats:
        if target and target.removeprefix("autocast-") == word:
            return word
    over = (r.name for r in uniform if not r.measured_kl <= asked.budget)
    return next(over, asked.formats[-1])


def _around(asked: _Asked, lr: float | None, profile: bool) -> dict[str, Any]:
    """Depth profile, backward GEMMs and the optimizer's step."""
    found: dict[str, DepthProfile | UpdateSheet | tuple[GemmError, ...]] = {}
    ids = _ids(asked.batch)
    if profile and ids is not None and asked.attention == "eager":
        asked.say("depth profile")
        with prepare(asked.model):
            found["profile"] = profile_depth(asked.model, ids, hints=asked.hints)
    if lr is not None:
        if ids is None:
            raise CheckError(
                "backward and update prices need token ids [B, T] as the batch (or input_ids in "
                "it), to make a next-token loss. Give them, or leave lr out."
            )
        if not any(p.requires_grad for p in asked.model.parameters()):
            raise CheckError(
                "no parameter requires a gradient, so that there is no update to price. Call "
                "model.requires_grad_() or leave lr out."
            )
        keep = kept_positions(asked.batch, ids[..., None].expand(*ids.shape, 2))
        labels = ids[:, 1:] if keep is None else ids[:, 1:].masked_fill(~keep[:, 1:], -100)
        asked.say("backward GEMMs")
        with prepare(asked.model):

            def loss() -> Tensor:
                logits = run(asked.model, asked.batch)[:, :-1]
                return nn.functional.cross_entropy(logits.float().flatten(0, -2), labels.flatten())

            formats = tuple(dict.fromkeys([*asked.formats, "e5m2/e4m3"]))
            errors = gemm_errors(
                asked.model, loss, formats=formats, which=("dgrad", "wgrad"), hints=asked.hints
            )
            found["backward"] = errors.rows
            asked.say("optimizer step")
            found["updates"] = update_sheet(asked.model, loss, lr=lr, hints=asked.hints)
    return found


def _ids(batch: Batch) -> Tensor | None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    usable = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    return ids if usable else None


def _length(batch: Batch) -> int:
    ids = _ids(batch)
    return 0 if ids is None else ids.shape[1]


def _loss(ref: Reference, batch: Batch) -> float:
    """Next-token loss of the reference, where the batch is token ids and every position counts."""
    ids = _ids(batch)
    if ids is None or ref.tokens != ids.numel():
        return math.nan
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, -1] = False
    some = Reference(logits=ref.logits[kept.flatten()], margins=ref.margins, entropy=ref.entropy)
    return some.loss(ids[:, 1:].flatten())


def _forward_seconds(asked: _Asked) -> float:
    with prepare(asked.model, attention=asked.attention), torch.no_grad():
        taken = []
        for _ in range(3):
            start = time.perf_counter()
            run(asked.model, asked.batch)
            taken.append(time.perf_counter() - start)
    return min(taken)
