"""Measured runs of formats, targets and plans, beside what the prices predict of them."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from halfulp.attention import has_attention_interface
from halfulp.batch import Batch
from halfulp.blocks import BlockMap
from halfulp.check import measure as runs
from halfulp.check.detect import UNPRICED_LIMIT, beyond_linear
from halfulp.check.groups import Group
from halfulp.check.plan import Plan, plan
from halfulp.check.prices import Prices
from halfulp.check.reference import Reference, predicted_flips
from halfulp.check.report import PlanRow, Row, Verdict
from halfulp.check.targets import PolicyTarget, stored_weights
from halfulp.check.trace import Trace, trace
from halfulp.policy import Policy

TRIES = 3
_ALTERNATIVES = 16
Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Asked:
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
        ids = token_ids(self.batch)
        return 0 if ids is None else len(ids)


def judge_uniform(
    asked: Asked, prices: Prices, names: Collection[str], word: str, what: str
) -> Row:
    """The named sites in one format."""
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


def traced(asked: Asked, target: str, bf16: Trace) -> Trace:
    """The dtype trace of a program; that of bf16 is known."""
    if target == "bf16":
        return bf16
    return trace(asked.model, asked.batch, target, hints=asked.hints, attention=asked.attention)


def judge_program(asked: Asked, prices: Prices, ran: Trace) -> Row:
    """A program of PyTorch's, as it really runs."""
    asked.say(ran.target)
    measured = runs.measure_target(
        asked.model, asked.batch, ran.target, prices.reference, attention=asked.attention
    )
    priced = {s.name for s in prices.sites}
    assignment = {n: ran.format for n in ran.names if n in priced}
    return _row(prices, ran.target, assignment, measured)


def judge_policy(asked: Asked, prices: Prices, target: PolicyTarget, name: str) -> Row:
    """A policy, with the weights as it stores them."""
    asked.say(name)
    with stored_weights(asked.model, target):
        measured = runs.measure_policy(
            asked.model, asked.batch, target.policy, prices.reference, hints=asked.hints,
            allow_partial=True,
        )  # fmt: skip
    return _row(prices, name, target.plan(prices), measured, target.why)


def judge_plan(
    asked: Asked,
    ref: Reference,
    groups: Sequence[Group],
    blocks: BlockMap,
    hardware: str,
    pins: Mapping[str, str],
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


def _held_out(asked: Asked, policy: Policy) -> runs.Measured | None:
    if asked.held_out is None:
        return None
    asked.say("plan, held-out text")
    ref = runs.reference(asked.model, asked.held_out, attention=asked.attention)
    return runs.measure_policy(asked.model, asked.held_out, policy, ref, hints=asked.hints)


def verdict_of(asked: Asked, prices: Prices, row: Row | None, planned: PlanRow) -> Verdict:
    """About the target, or without one about the plan."""
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


def routes_attention(model: nn.Module, blocks: BlockMap) -> bool:
    """Whether halfulp.quantize can round the products of every attention of the model."""
    modules = {g.module for g in blocks.gemms if g.role.startswith("attn_")}
    return all(has_attention_interface(model, model.get_submodule(m)) for m in modules)


def token_ids(batch: Batch) -> Tensor | None:
    """The token ids [B, T] of a batch; None if it has none."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    usable = isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point()
    return ids if usable else None
