"""The plan in one paragraph that a manager can read, in English and in Japanese."""

import math
from collections.abc import Sequence

from halfulp.errors import PlanError
from halfulp.plan.budget import Plan
from halfulp.plan.said import in_language
from halfulp.plan.sentences import SENTENCES
from halfulp.report.amounts import amount, digits, dollars
from halfulp.report.plan_texts import LANGUAGES, TEXTS
from halfulp.report.words import nats


def paragraph(plan: Plan, language: str = "en") -> str:
    """What the budget buys, what it costs, and what to do; PlanError for an unknown language."""
    if language not in TEXTS:
        known = " or ".join(LANGUAGES)
        raise PlanError(f"--language {language!r} is not written yet. Give {known}.")
    text = TEXTS[language]
    said = [_buys(plan, language), _loss(plan, language), _doubled(plan, language)]
    said += _precision(plan, language)
    if plan.chosen.epochs is not None and plan.chosen.epochs > 1:
        gain = nats(plan.doubled_unique_nats or 0.0)
        said.append(text["repeated"].format(epochs=digits(plan.chosen.epochs), gain=gain))
    if plan.memory.verdict == "fail":
        least = plan.memory.least_gpus
        said.append(text["memory"].format(gpus=gpus_text(plan.gpus or 0, language), least=least))
    if plan.flags:
        said.append(text["caution"].format(count=_rules(plan.flags, language)))
    return (" " if language == "en" else "").join(said)


def words(key: str, language: str, **fields: object) -> str:
    """The text `key` with its fields, which are said in the same language."""
    there = {name: in_language(value, language) for name, value in fields.items()}
    return TEXTS[language][key].format(**there)


def unit_of(unit: str, language: str) -> str:
    """ "token" or "word" in the language."""
    return SENTENCES[language][unit]


def gpus_text(count: int, language: str) -> str:
    """How many GPUs."""
    return words("one_gpu" if count == 1 else "gpus", language, count=count)


def _rules(flags: Sequence[str], language: str) -> str:
    """How many rules the flags are about: a rule has one for each range that it leaves."""
    count = len({flag.partition(":")[0] for flag in flags})
    return words("one_rule" if count == 1 else "rules", language, count=count)


def _buys(plan: Plan, language: str) -> str:
    text, o = TEXTS[language], plan.chosen
    days = cost = ""
    if plan.days is not None:
        gpus = gpus_text(plan.gpus or 0, language)
        days = text["days"].format(days=digits(plan.days), gpus=gpus)
    if o.cost_usd is not None and o.cost_range_usd is not None:
        low, high = (dollars(x) for x in o.cost_range_usd)
        key = "own_cost" if o.cost_range_usd[0] == o.cost_range_usd[1] else "cost"
        date = plan.gpu.price_date
        cost = text[key].format(usd=dollars(o.cost_usd), low=low, high=high, date=date)
    return text["buys"].format(
        hours=digits(o.gpu_hours), gpu=plan.gpu.name, cost=cost, n=amount(o.parameters, language),
        d=amount(o.tokens, language), precision=o.precision.upper(), days=days,
        mfu=f"{digits(100 * plan.mfu)} %",
    )  # fmt: skip


def _loss(plan: Plan, language: str) -> str:
    text, o = TEXTS[language], plan.chosen
    if o.band_nats is None:
        band = text["no_band"]
    else:
        band = text["band"].format(low=nats(o.band_nats[0]), high=nats(o.band_nats[1]))
    return text["loss"].format(loss=nats(o.loss_nats), band=band)


def _doubled(plan: Plan, language: str) -> str:
    gain = plan.chosen.loss_nats - plan.doubled.loss_nats
    percent = f"{-100 * math.expm1(-gain):.1f} %"
    return TEXTS[language]["doubled"].format(gain=nats(gain), percent=percent)


def _precision(plan: Plan, language: str) -> list[str]:
    """Whether the chosen low precision pays for certain; nothing to say of BF16."""
    text = TEXTS[language]
    for c in plan.comparisons:
        if c.precision != plan.chosen.precision:
            continue
        name = c.precision.upper()
        if c.verdict == "pass":
            pays = "precision_pays_measured" if c.speed.measured else "precision_pays"
            return [text[pays].format(precision=name)]
        speed = "16" if c.break_even_speed is None else f"{c.break_even_speed:.2f}"
        low, high = f"{c.speed.low:.2f}", f"{c.speed.high:.2f}"
        return [
            text["precision_open"].format(
                precision=name, speed=speed, low=low, high=high, margin=digits(c.penalty_margin)
            )
        ]
    return []
