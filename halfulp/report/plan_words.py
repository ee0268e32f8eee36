"""The plan in one paragraph that a manager can read, in English and in Japanese."""

import math

from halfulp.errors import PlanError
from halfulp.plan.budget import Plan
from halfulp.report.amounts import amount, digits, dollars
from halfulp.report.words import nats

LANGUAGES = ("en", "ja")

TEXTS = {
    "en": {
        "buys": "{hours} GPU-hours of {gpu}{cost} train a model of {n} parameters on {d} tokens in "
        "{precision}{days}.",
        "cost": ", about {usd} ({low} to {high} depending on the provider),",
        "own_cost": ", about {usd} at your price,",
        "days": ", in about {days} days on {gpus} GPUs",
        "loss": "The expected loss is {loss} nats per token{band}.",
        "band": " (most likely {low} to {high}: four chances in five if your text is like the "
        "text behind the forecast)",
        "no_band": "; how far off that may be is not known",
        "doubled": "Twice the budget would lower it by {gain} nats, which makes the model's "
        "uncertainty about the next word (perplexity) {percent} smaller.",
        "precision_pays": "By all published figures {precision} gives a lower loss than BF16 for "
        "the same GPU time.",
        "precision_pays_measured": "At the speed that you gave, {precision} gives a lower loss "
        "than BF16 for the same GPU time.",
        "precision_open": "Whether {precision} really pays is open: it has to be at least {speed} "
        "times as fast as BF16 on your machines ({low} to {high} times is on record), and to add "
        "less than {margin} times the loss that is forecast for it. Try both on a short run "
        "first.",
        "repeated": "Your text is read {epochs} times; twice as much different text would lower "
        "the loss by {gain} nats at the same cost.",
        "memory": "It does not fit into the memory of {gpus} GPUs: at least {least} are needed.",
        "caution": "This plan uses {count} rules beyond the sizes they were tested on; try a "
        "smaller run first and compare its loss with this forecast.",
    },
    "ja": {
        "buys": "{gpu} を {hours} GPU時間使うと{cost}、パラメータ数 {n} のモデルを {d} トークンで、"
        "{precision} 精度で学習できます{days}。",
        "cost": "(約 {usd}、業者により {low}〜{high})",
        "own_cost": "(ご指定の単価で約 {usd})",
        "days": "(GPU {gpus} 台で約 {days} 日)",
        "loss": "予想される損失は 1 トークンあたり {loss} ナットです{band}。",
        "band": "(お使いの文章が予測の元になった文章と似ていれば、80 % の確率で {low}〜{high})",
        "no_band": "(どの程度外れるかは分かりません)",
        "doubled": "予算を 2 倍にすると損失は {gain} ナット下がり、次の単語についてのモデルの迷い"
        "(パープレキシティ)は {percent} 小さくなります。",
        "precision_pays": "公表されている数値によれば、同じ GPU 時間で {precision} は BF16 より低い"
        "損失になります。",
        "precision_pays_measured": "ご指定の速度では、同じ GPU 時間で {precision} は BF16 より低い"
        "損失になります。",
        "precision_open": "{precision} が本当に得かどうかはまだ分かりません。"
        "お使いの機械で BF16 の {speed} 倍以上の速さ(報告されているのは {low}〜{high} 倍)が必要で、"
        "精度を下げることによる損失の増加も予測の {margin} 倍未満でなければなりません。"
        "まず短い学習で両方を確かめてください。",
        "repeated": "手持ちの文章を {epochs} 回繰り返して読むことになります。異なる文章を 2 倍に"
        "増やせば、同じ費用で損失が {gain} ナット下がります。",
        "memory": "GPU {gpus} 台のメモリには収まりません。少なくとも {least} 台が必要です。",
        "caution": "この計画は、{count} 個の経験則を検証された範囲の外で使っています。"
        "まず小さな学習で試し、その損失をこの予測と比べてください。",
    },
}


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
        said.append(text["memory"].format(gpus=plan.gpus, least=least))
    if plan.flags:
        said.append(text["caution"].format(count=len(plan.flags)))
    return (" " if language == "en" else "").join(said)


def _buys(plan: Plan, language: str) -> str:
    text, o = TEXTS[language], plan.chosen
    days = "" if plan.days is None else text["days"].format(days=digits(plan.days), gpus=plan.gpus)
    cost = ""
    if o.cost_usd is not None and o.cost_range_usd is not None:
        low, high = (dollars(x) for x in o.cost_range_usd)
        key = "own_cost" if o.cost_range_usd[0] == o.cost_range_usd[1] else "cost"
        cost = text[key].format(usd=dollars(o.cost_usd), low=low, high=high)
    return text["buys"].format(
        hours=digits(o.gpu_hours), gpu=plan.gpu.name, cost=cost, n=amount(o.parameters, language),
        d=amount(o.tokens, language), precision=o.precision.upper(), days=days,
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
