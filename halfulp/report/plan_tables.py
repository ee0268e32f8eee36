"""The figures of a plan as rows of text, for the terminal and for the page."""

import math
from collections.abc import Sequence
from itertools import pairwise

from halfulp.plan.budget import Plan
from halfulp.plan.cost import attention_share
from halfulp.plan.facts import Facts, Order
from halfulp.plan.kausik import emergence, growth_of
from halfulp.plan.options import Comparison, Option
from halfulp.plan.said import in_language
from halfulp.report.amounts import amount, digits, dollars
from halfulp.report.plan_words import gpus_text, unit_of, words
from halfulp.report.words import nats, share

_LENGTH = 2048  # of a sequence, for the share of attention
_BOUNDLESS = 1e6  # a corpus factor above this is no bound in practice


def columns(key: str, language: str = "en") -> list[str]:
    """The heads of a table: "precision_columns", "order_columns", "what"."""
    return words(key, language).split("|")


def plan_rows(plan: Plan, language: str = "en") -> list[tuple[str, str]]:
    """(what, value) of the chosen option."""
    o = plan.chosen
    values = {
        "budget": budget_text(plan, language),
        "precision": words("precision_value", language, precision=o.precision, recipe=o.recipe,
                           why=plan.why),
        "parameters": words("parameters_value", language, n=amount(o.parameters, language),
                            number=o.parameters, layers=plan.shape.layers, width=plan.shape.width),
        "tokens": _tokens(o, language),
        "compute": _compute(plan, language),
        "time": _time(plan, language),
        "row_cost": cost_text(o, language),
        "row_loss": loss_text(o, language),
        "lr": f"{plan.lr:.2g} ({_spread(plan, 'lr', language)})",
        "batch": words("batch_value", language, amount=amount(plan.batch_tokens, language),
                       spread=_spread(plan, "batch_tokens", language)),
        "row_memory": _memory(plan, language),
        "row_doubled": _doubled(plan, language),
    }  # fmt: skip
    if plan.doubled_unique_nats is not None:
        gain = _minus(plan.doubled_unique_nats)
        values["row_unique"] = words("unique_value", language, gain=gain)
    if plan.served_tokens:
        values["serving"] = _serving(plan, language)
    return [(words(key, language), value) for key, value in values.items()]


def budget_text(plan: Plan, language: str = "en") -> str:
    """The budget as it was given."""
    kind, value = plan.budget
    text = {
        "gpu_hours": words("hours", language, amount=digits(value)),
        "money_usd": dollars(value),
        "flops": f"{value:.4g} FLOPs",
        "target_loss_nats": words("target", language, loss=value),
    }[kind]
    return f"{text}, {plan.gpu.name}, MFU {plan.mfu:g}"


def _tokens(o: Option, language: str) -> str:
    text = words("tokens_value", language, d=amount(o.tokens, language), number=o.tokens,
                 ratio=digits(o.tokens_per_parameter))  # fmt: skip
    if o.epochs is None or o.unique_tokens is None:
        return text
    unique = amount(o.unique_tokens, language)
    return words("epochs_value", language, tokens=text, epochs=digits(o.epochs), unique=unique)


def _compute(plan: Plan, language: str) -> str:
    shape = plan.shape
    attention = attention_share(shape.width, shape.parameters, shape.layers, _LENGTH)
    return words("compute_value", language, flops=plan.chosen.flops, length=_LENGTH,
                 share=share(attention))  # fmt: skip


def _time(plan: Plan, language: str) -> str:
    text = words("hours", language, amount=digits(plan.chosen.gpu_hours))
    if plan.gpus is None or plan.days is None:
        return text
    gpus = gpus_text(plan.gpus, language)
    return words("time_days", language, hours=text, days=digits(plan.days), gpus=gpus)


def cost_text(o: Option, language: str = "en") -> str:
    """The cost with its range by price."""
    if o.cost_usd is None:
        return words("no_price", language)
    ends = price_range(o, language)
    return f"{dollars(o.cost_usd)} ({ends})" if ends else dollars(o.cost_usd)


def price_range(o: Option, language: str = "en") -> str:
    """The ends of the cost by listed prices; "" where there is one price or none."""
    if o.cost_range_usd is None or math.isclose(*o.cost_range_usd):
        return ""
    low, high = map(dollars, o.cost_range_usd)
    return words("price_range", language, low=low, high=high)


def loss_text(o: Option, language: str = "en") -> str:
    """The loss with its band."""
    if o.band_nats is None:
        return words("loss_no_band", language, loss=nats(o.loss_nats))
    low, high = map(nats, o.band_nats)
    return words("loss_value", language, loss=nats(o.loss_nats), low=low, high=high)


def _spread(plan: Plan, name: str, language: str) -> str:
    write = (lambda x: f"{x:.2g}") if name == "lr" else (lambda x: amount(x, language))
    return ", ".join(f"{rates.law} {write(getattr(rates, name))}" for rates in plan.rates)


def _memory(plan: Plan, language: str) -> str:
    verdict = words(plan.memory.verdict, language)
    return f"{verdict}: {in_language(plan.memory.sentence, language)}"


def _doubled(plan: Plan, language: str) -> str:
    twice, gain = plan.doubled, plan.chosen.loss_nats - plan.doubled.loss_nats
    return words(
        "doubled_value", language, loss=nats(twice.loss_nats), gain=_minus(gain),
        n=amount(twice.parameters, language), d=amount(twice.tokens, language),
    )  # fmt: skip


def _minus(gain: float) -> str:
    return f"−{nats(gain)}" if gain >= 0 else f"+{nats(-gain)}"


def _serving(plan: Plan, language: str) -> str:
    o = plan.chosen
    return words("serving_value", language, amount=amount(plan.served_tokens, language),
                 flops=o.serving_flops, hours=digits(o.serving_gpu_hours))  # fmt: skip


def precision_rows(plan: Plan, language: str = "en") -> list[tuple[str, ...]]:
    """One row per precision, BF16 first."""
    compared = {c.precision: c for c in plan.comparisons}
    return [_precision_row(o, compared.get(o.precision), language) for o in plan.options]


def _precision_row(o: Option, c: Comparison | None, language: str) -> tuple[str, ...]:
    if c is None:
        speed, tail = "1", ("", "", "", words("reference", language))
    else:
        kind = words("measured" if o.speed.measured else "published", language)
        speed = f"{o.speed.ratio:.3g} ({o.speed.low:.3g}–{o.speed.high:.3g} {kind})"
        pays = "–" if c.break_even_speed is None else f"{c.break_even_speed:.3f} ×"
        margin = f"{digits(c.penalty_margin)} ×"
        tail = nats(c.gain_nats, signed=True), pays, margin, words(c.verdict, language)
    return (
        o.precision, o.recipe, speed, amount(o.parameters, language), amount(o.tokens, language),
        digits(o.gpu_hours), "–" if o.cost_usd is None else dollars(o.cost_usd),
        nats(o.loss_nats), nats(o.penalty_nats), *tail,
    )  # fmt: skip


def crossing_sentence(c: Comparison, language: str = "en") -> str:
    """Where the sign of the gain changes, among seven decades of budgets around this one."""
    side = words("lower" if c.curve[0][1] > 0 else "higher", language)
    where = words("everywhere", language)
    if c.crossings_gpu_hours:
        first, *rest = map(digits, c.crossings_gpu_hours)
        where = words("up_to", language, first=first)
        where += "".join(words("back", language, hours=hours) for hours in rest)
    return words("crossing", language, precision=c.precision, side=side, where=where)


def corpus_sentences(plan: Plan, facts: Facts, language: str = "en") -> list[str]:
    """What the corpus says about the plan: its size, Kausik's criterion with its n, the band."""
    found = [
        words(
            "corpus_size", language, amount=amount(facts.symbols, language),
            unit=unit_of(facts.unit, language), tokenizer=facts.tokenizer,
            share=share(facts.unique_symbols / facts.symbols),
        )
    ]  # fmt: skip
    found += [str(in_language(facts.note, language))] if facts.note else []
    unique = {(o.unit, o.n): o for o in facts.orders}
    for kind in dict.fromkeys(unit for unit, _ in unique):
        counts = {n: o.unique for (u, n), o in unique.items() if u == kind}
        statements = emergence(counts, plan.chosen.parameters, unit=kind, tokenizer=facts.tokenizer)
        found += [str(in_language(e.sentence, language)) for e in _turning(statements)]
    doubling = doubling_text(growth_of(plan.law.plain.beta).doubling, language)
    return [*found, words("corpus_law", language, law=plan.law.law.name, doubling=doubling)]


def _turning(statements: Sequence) -> list:
    """The statements between which the criterion turns, or the last where it never does."""
    for before, after in pairwise(statements):
        if before.open != after.open:
            return [before, after]
    return list(statements[-1:])


def doubling_text(doubling: tuple[float, float], language: str = "en") -> str:
    """How much more corpus doubles the unique sequences."""
    low, high = doubling
    if high < _BOUNDLESS:
        return words("doubling", language, low=digits(low), high=digits(high))
    why = words("no_bound" if math.isinf(high) else "far_bound", language, high=high)
    return words("doubling_least", language, low=digits(low), why=why)


def order_rows(orders: Sequence[Order], language: str = "en") -> list[tuple[str, ...]]:
    """One row per order: distinct sequences, local exponent, corpus factor to double them."""
    return [
        (
            words("order", language, n=o.n, unit=unit_of(o.unit, language)),
            amount(o.unique, language),
            "–" if o.exponent is None else f"{o.exponent:.3f}",
            "–" if o.doubling is None else f"{digits(o.doubling)} ×",
        )
        for o in orders
    ]
