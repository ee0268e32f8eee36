"""The figures of a plan as rows of text, for the terminal and for the page."""

import math
from collections.abc import Sequence
from itertools import pairwise

from halfulp.plan.budget import Plan
from halfulp.plan.cost import attention_share
from halfulp.plan.facts import Facts, Order
from halfulp.plan.kausik import emergence, growth_of
from halfulp.plan.options import Comparison, Option
from halfulp.report.amounts import amount, digits, dollars
from halfulp.report.words import nats, share

PRECISION_COLUMNS = (
    "precision", "recipe", "step time, BF16 = 1", "parameters", "tokens", "GPU-hours", "cost",
    "loss", "added by format", "gain over BF16", "pays from", "may add", "verdict",
)  # fmt: skip
ORDER_COLUMNS = ("sequences", "distinct", "local exponent", "corpus that doubles them")
_LENGTH = 2048  # of a sequence, for the share of attention
_BOUNDLESS = 1e6  # a corpus factor above this is no bound in practice


def plan_rows(plan: Plan) -> list[tuple[str, str]]:
    """(what, value) of the chosen option."""
    o = plan.chosen
    rows = [
        ("budget", budget_text(plan)),
        ("precision", f"{o.precision} (recipe {o.recipe}): {plan.why}"),
        ("parameters", f"{amount(o.parameters)} ({o.parameters:.4g}): {_shape(plan)}"),
        ("tokens", _tokens(o)),
        ("compute", _compute(plan)),
        ("GPU time", _time(plan)),
        ("cost", cost_text(o)),
        ("loss", loss_text(o)),
        ("learning rate", f"{plan.lr:.2g} ({_spread(plan, 'lr')})"),
        ("batch", f"{amount(plan.batch_tokens)} tokens ({_spread(plan, 'batch_tokens')})"),
        ("memory", f"{plan.memory.verdict}: {plan.memory.sentence}"),
        ("twice the budget", _doubled(plan)),
    ]
    if plan.doubled_unique_nats is not None:
        rows.append(("twice the unique tokens", f"loss {_minus(plan.doubled_unique_nats)}"))
    if plan.served_tokens:
        rows.append(("serving", _serving(plan)))
    return rows


def budget_text(plan: Plan) -> str:
    """The budget as it was given."""
    kind, value = plan.budget
    text = {
        "gpu_hours": f"{digits(value)} GPU-hours",
        "money_usd": dollars(value),
        "flops": f"{value:.4g} FLOPs",
        "target_loss_nats": f"a loss of {value:.4g} nats/token",
    }[kind]
    return f"{text}, {plan.gpu.name}, MFU {plan.mfu:g}"


def _shape(plan: Plan) -> str:
    return f"for example {plan.shape.layers} layers of width {plan.shape.width}, embeddings on top"


def _tokens(o: Option) -> str:
    text = f"{amount(o.tokens)} ({o.tokens:.4g}), {digits(o.tokens_per_parameter)} per parameter"
    if o.epochs is None or o.unique_tokens is None:
        return text
    return f"{text}; {digits(o.epochs)} epochs of {amount(o.unique_tokens)} unique tokens"


def _compute(plan: Plan) -> str:
    shape = plan.shape
    attention = attention_share(shape.width, shape.parameters, shape.layers, _LENGTH)
    return (
        f"{plan.chosen.flops:.4g} FLOPs (6 N D); attention over {_LENGTH:,} tokens would add "
        f"{share(attention)}"
    )


def _time(plan: Plan) -> str:
    text = f"{digits(plan.chosen.gpu_hours)} GPU-hours"
    return text if plan.days is None else f"{text}: {digits(plan.days)} days on {plan.gpus} GPUs"


def cost_text(o: Option) -> str:
    """The cost with its range by price."""
    if o.cost_usd is None or o.cost_range_usd is None:
        return "– no price: give --price"
    low, high = o.cost_range_usd
    if math.isclose(low, high):
        return dollars(o.cost_usd)
    return f"{dollars(o.cost_usd)} ({dollars(low)} to {dollars(high)} by listed prices)"


def loss_text(o: Option) -> str:
    """The loss with its band."""
    text = f"{nats(o.loss_nats)} nats/token"
    if o.band_nats is None:
        return f"{text}, no band: a note says why"
    return f"{text}, 80 % band {nats(o.band_nats[0])} to {nats(o.band_nats[1])}"


def _spread(plan: Plan, name: str) -> str:
    write = (lambda x: f"{x:.2g}") if name == "lr" else amount
    return ", ".join(f"{rates.law} {write(getattr(rates, name))}" for rates in plan.rates)


def _doubled(plan: Plan) -> str:
    twice, gain = plan.doubled, plan.chosen.loss_nats - plan.doubled.loss_nats
    return (
        f"loss {nats(twice.loss_nats)} ({_minus(gain)}) with {amount(twice.parameters)} parameters "
        f"on {amount(twice.tokens)} tokens"
    )


def _minus(gain: float) -> str:
    return f"−{nats(gain)}" if gain >= 0 else f"+{nats(-gain)}"


def _serving(plan: Plan) -> str:
    o = plan.chosen
    return (
        f"{amount(plan.served_tokens)} tokens: {o.serving_flops:.3g} FLOPs, "
        f"{digits(o.serving_gpu_hours)} GPU-hours at the same rate"
    )


def precision_rows(plan: Plan) -> list[tuple[str, ...]]:
    """One row per precision, BF16 first."""
    compared = {c.precision: c for c in plan.comparisons}
    return [_precision_row(o, compared.get(o.precision)) for o in plan.options]


def _precision_row(o: Option, c: Comparison | None) -> tuple[str, ...]:
    if c is None:
        speed, tail = "1", ("", "", "", "reference")
    else:
        kind = "measured" if o.speed.measured else "published"
        speed = f"{o.speed.ratio:.3g} ({o.speed.low:.3g}–{o.speed.high:.3g} {kind})"
        pays = "–" if c.break_even_speed is None else f"{c.break_even_speed:.3f} ×"
        margin = f"{digits(c.penalty_margin)} ×"
        tail = (nats(c.gain_nats, signed=True), pays, margin, c.verdict)
    return (
        o.precision, o.recipe, speed, amount(o.parameters), amount(o.tokens), digits(o.gpu_hours),
        "–" if o.cost_usd is None else dollars(o.cost_usd), nats(o.loss_nats),
        nats(o.penalty_nats), *tail,
    )  # fmt: skip


def crossing_sentence(c: Comparison) -> str:
    """Where the sign of the gain changes, among seven decades of budgets around this one."""
    side = "a lower loss" if c.curve[0][1] > 0 else "a higher loss"
    where = "at every budget from 1/1,000 to 10,000 times this one"
    if c.crossings_gpu_hours:
        first, *rest = (f"{digits(h)} GPU-hours" for h in c.crossings_gpu_hours)
        where = f"up to {first}, the opposite beyond"
        where += "".join(f", and back beyond {h}" for h in rest)
    return f"{c.precision}: with this step time, {side} than bf16 {where}"


def corpus_sentences(plan: Plan, facts: Facts) -> list[str]:
    """What the corpus says about the plan: its size, Kausik's criterion with its n, the band."""
    said = [
        f"{amount(facts.symbols)} {facts.unit}s (tokenizer {facts.tokenizer}), "
        f"{share(facts.unique_symbols / facts.symbols)} of them in documents not seen before"
    ]
    said += [facts.note] if facts.note else []
    unique = {(o.unit, o.n): o for o in facts.orders}
    for kind in dict.fromkeys(unit for unit, _ in unique):
        counts = {n: o.unique for (u, n), o in unique.items() if u == kind}
        statements = emergence(counts, plan.chosen.parameters, unit=kind, tokenizer=facts.tokenizer)
        said += [e.sentence for e in _turning(statements)]
    band = growth_of(plan.law.plain.beta)
    said.append(f"by {plan.law.law.name}'s exponent, {doubling_text(band.doubling)}")
    return said


def _turning(statements: Sequence) -> list:
    """The statements between which the criterion turns, or the last where it never does."""
    for before, after in pairwise(statements):
        if before.open != after.open:
            return [before, after]
    return list(statements[-1:])


def doubling_text(doubling: tuple[float, float]) -> str:
    """How much more corpus doubles the unique sequences."""
    low, high = doubling
    what = "doubling the unique sequences takes"
    if high < _BOUNDLESS:
        return f"{what} {digits(low)} to {digits(high)} times the corpus"
    why = "no lower bound of γ, so no upper one" if math.isinf(high) else f"at most {high:.0e}"
    return f"{what} at least {digits(low)} times the corpus: {why}"


def order_rows(orders: Sequence[Order]) -> list[tuple[str, ...]]:
    """One row per order: distinct sequences, local exponent, corpus factor to double them."""
    return [
        (
            f"{o.n} {o.unit}s", amount(o.unique),
            "–" if o.exponent is None else f"{o.exponent:.3f}",
            "–" if o.doubling is None else f"{digits(o.doubling)} ×",
        )
        for o in orders
    ]  # fmt: skip
