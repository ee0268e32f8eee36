"""What the decision page rests on: the figures that were given, and those that stand in."""

from collections.abc import Mapping

from halfulp.hardware import load_gpu
from halfulp.report.sweep_bars import figure_of
from halfulp.report.sweep_choice import Choice, percent
from halfulp.report.sweep_tables import amount
from halfulp.sweep.defaults import PROXY_FRACTION, Default
from halfulp.sweep.inputs import Inputs
from halfulp.sweep.money import Money


def assumed(choice: Choice) -> list[str]:
    """Sentences: what was given, what stands in with its source and date, what always holds.

    Of the speed-ups only the subject's is named.
    """
    bills = choice.judged.bills
    if bills is None:
        return []
    given = _given(choice, bills.inputs)
    texts = [choice.say("given", items=", ".join(given))] if given else []
    found = [_standing(choice, bills, default) for default in bills.defaults]
    standing = "; ".join(dict.fromkeys(text for text in found if text))
    texts += [choice.say("standing", items=standing)] if standing else []
    return [*texts, choice.say("assumed_model")]


def _given(choice: Choice, inputs: Inputs) -> list[str]:
    speed = inputs.speedup
    if isinstance(speed, Mapping):
        speed = speed.get(choice.subject)
    found = [
        ("given_price", {"price": _ends(inputs.price_usd)} if inputs.price_usd else None),
        ("given_hours", {"hours": amount(inputs.gpu_hours)} if inputs.gpu_hours else None),
        ("given_speed", {"speed": _ends(speed)} if speed else None),
        ("given_tokens", {"tokens": choice.large(inputs.tokens)} if inputs.tokens else None),
    ]
    said = [choice.say(key, **fields) for key, fields in found if fields]
    said += [f"{name} = {value}" for name, value in inputs.assumed().items()]
    return [f"GPU {load_gpu(inputs.gpu).name}", *said] if inputs.gpu else said


def _ends(value: float | tuple[float, float] | None) -> str:
    return " – ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:g}"


def _standing(choice: Choice, bills: Money, default: Default) -> str:
    """A figure that nobody gave, in words; "" for a speed-up that the page does not use."""
    inputs, name = bills.inputs, default.name
    if name == "price" and inputs.gpu and inputs.price:
        ends = {"low": figure_of(inputs.price.low), "high": figure_of(inputs.price.high)}
        text = choice.say("assumed_price", gpu=load_gpu(inputs.gpu).name, **ends)
        return _sourced(choice, default, text)
    if name.startswith("speed-up of "):
        recipe = name.removeprefix("speed-up of ")
        speed, _ = inputs.speed_of(recipe, bills.reference)
        if recipe != choice.subject or speed is None:
            return ""
        ends = {key: figure_of(getattr(speed, key)) for key in ("value", "low", "high")}
        return _sourced(choice, default, choice.say("assumed_speed", recipe=recipe, **ends))
    if name.startswith("doubt"):
        return choice.say("assumed_octaves", value=f"{bills.octaves:.1f}")
    if name.startswith("one run"):
        return choice.say("assumed_proxy", value=percent(PROXY_FRACTION))
    if name.startswith("seeds"):
        return choice.say("assumed_seeds")
    return choice.say("assumed_abandoned")


def _sourced(choice: Choice, default: Default, text: str) -> str:
    date = f", {default.date}" if default.date else ""
    return choice.say("source", text=text, source=default.source, date=date)
