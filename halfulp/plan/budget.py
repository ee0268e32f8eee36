"""The planner: parameters, tokens, precision, rates, cost and loss of one budget."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from halfulp.errors import ConfigError, PlanError
from halfulp.hardware import Gpu, load_gpu
from halfulp.plan.caveats import flags_of, notes_of
from halfulp.plan.cost import Price, price_of, rate_flops
from halfulp.plan.in_use import LawInUse, open_law
from halfulp.plan.memory import Memory, memory_of
from halfulp.plan.optimum import Setting
from halfulp.plan.options import Comparison, Option, Way, compare
from halfulp.plan.precisions import PRECISIONS, precision_of
from halfulp.plan.rates import Rates, between, deepseek, steplaw
from halfulp.plan.said import Said, said
from halfulp.plan.search import root_log
from halfulp.plan.sentences import REFUSED_JAPANESE
from halfulp.plan.shape import Shape, shape_of
from halfulp.speedups import BF16, Speed, speed_of

KINDS = ("gpu_hours", "money_usd", "flops", "target_loss_nats")
LEAST_GAIN_NATS = 1e-5  # by twice the compute; below, the optimum is too flat to be one
FEWEST, MOST = 1e3, 1e18  # parameters and tokens beyond which only a wrong unit leads


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one budget buys; losses in nats per token of the law's tokenizer and data."""

    gpu: Gpu
    gpus: int | None
    mfu: float
    price: Price | None
    law: LawInUse
    budget: tuple[str, float]  # one of KINDS, and its amount
    chosen: Option
    way: Way  # how the chosen precision spends
    options: tuple[Option, ...]  # the chosen one among them
    comparisons: tuple[Comparison, ...]  # of the others with BF16
    refused: Mapping[str, str]  # precision -> why it was not considered
    why: str  # why the chosen precision
    doubled: Option  # twice the GPU time, in the same precision
    doubled_unique_nats: float | None  # what twice the unique tokens would lower the loss by
    rates: tuple[Rates, ...]
    lr: float
    batch_tokens: float
    memory: Memory
    shape: Shape
    served_tokens: float
    flags: tuple[str, ...]  # laws used outside what they were fitted on
    notes: tuple[str, ...]

    @property
    def days(self) -> float | None:
        """Days on the GPUs given; None without their number."""
        return None if self.gpus is None else self.chosen.gpu_hours / self.gpus / 24


def plan(
    gpu: str = "h100",
    *,
    gpu_hours: float | None = None,
    money_usd: float | None = None,
    flops: float | None = None,
    target_loss_nats: float | None = None,
    unique_tokens: float | None = None,
    serve_tokens: float = 0.0,
    precision: str = "auto",
    law: str = "epoch",
    mfu: float = 0.4,
    gpus: int | None = None,
    price_usd: float | None = None,
    speeds: Mapping[str, Speed] | None = None,
) -> Plan:
    """Plan a training run for exactly one of GPU-hours, money, FLOPs and a loss to reach.

    `law` is a name of laws.toml, a fit.json of `halfulp plan fit`, or a runs.csv to be fitted.
    C = 6 N D; hours = C / (peak x MFU x speed), where `speeds` replaces the published step times.
    With `serve_tokens` the budget pays for training, and the size is the one that reaches its loss
    with the least compute for training and serving together. `precision` "auto" takes the least
    loss of a budget, the fewest GPU-hours to a loss, and BF16 for FLOPs, which cost no more loss
    in it. Raises PlanError and ConfigError for budgets, numbers and hardware that are impossible.
    """  # fmt: skip
    budget = _one_budget(gpu_hours, money_usd, flops, target_loss_nats)
    _check_numbers(unique_tokens, serve_tokens, gpus)
    rented, used = load_gpu(gpu), open_law(law)
    price = price_of(rented, price_usd)
    unique = math.inf if unique_tokens is None else unique_tokens
    setting = Setting(law=used, unique=unique, served=serve_tokens)
    reference = _way("bf16", BF16, rented, mfu, setting, price)
    spend = _spender(*budget, price, rented)
    size = spend(reference).parameters
    ways, refused = _ways(reference, precision, rented, mfu, speeds or {}, size)
    options, out_of_reach = _spent(ways, spend, rented, strict=precision != "auto")
    refused |= out_of_reach
    ways = {name: ways[name] for name in options}
    name, why = _choose(budget[0], precision, options)
    _check_size(options[name], budget[0])
    if unique_tokens is not None:
        _check_worth(ways[name], options[name], budget[0])
    return Plan(
        gpu=rented, gpus=gpus, mfu=mfu, price=price, law=used, budget=budget, refused=refused,
        why=why, served_tokens=serve_tokens, **_bought(name, ways, options),
        memory=memory_of(options[name].parameters, rented, gpus),
        notes=notes_of(options[name], used, tuple(options.values()), price, serve_tokens),
    )  # fmt: skip


def _bought(name: str, ways: Mapping[str, Way], options: Mapping[str, Option]) -> dict[str, Any]:
    """The fields of a plan that follow from the choice of one precision."""
    chosen, way, every = options[name], ways[name], tuple(options.values())
    hours, reference = options["bf16"].gpu_hours, ways["bf16"]
    others = [other for key, other in ways.items() if key != "bf16"]
    rates = (steplaw(chosen.parameters, chosen.tokens), deepseek(chosen.flops))
    lr, batch = between(rates)
    return {
        "chosen": chosen,
        "way": way,
        "options": every,
        "comparisons": tuple(compare(other, reference, hours) for other in others),
        "doubled": way.option(2 * chosen.flops),
        "doubled_unique_nats": _gain_of_unique(way, chosen),
        "rates": rates,
        "lr": lr,
        "batch_tokens": batch,
        "shape": shape_of(chosen.parameters),
        "flags": flags_of(chosen, way.setting.law, every),
    }


def _gain_of_unique(way: Way, chosen: Option) -> float | None:
    if chosen.unique_tokens is None:
        return None
    wider = replace(way.setting, unique=2 * chosen.unique_tokens)
    return chosen.loss_nats - wider.least_loss(chosen.flops)


def _one_budget(*amounts: float | None) -> tuple[str, float]:
    given = [(k, a) for k, a in zip(KINDS, amounts, strict=True) if a is not None]
    if len(given) != 1:
        said = " and ".join(kind for kind, _ in given) or "none"
        was = "were" if given else "was"
        raise PlanError(
            f"exactly one budget makes a plan, and {said} {was} given. Give one of gpu_hours, "
            "money_usd, flops and target_loss_nats (--gpu-hours, --money, --flops, --target-loss)."
        )
    kind, amount = given[0]
    if not (math.isfinite(amount) and amount > 0):
        raise PlanError(f"{kind} = {amount:g} is no budget. Give a positive number.")
    return kind, amount


def _check_numbers(unique: float | None, served: float, gpus: int | None) -> None:
    if unique is not None and not FEWEST <= unique <= MOST:
        raise PlanError(
            f"{unique:g} unique tokens cannot be planned with: the unit is one token, not millions "
            f"or billions. Give {FEWEST:g} to {MOST:g}, such as 3e9; leave it out for as many as "
            "are needed."
        )
    if not (math.isfinite(served) and served >= 0):
        raise PlanError(f"{served:g} served tokens are impossible. Give 0 or more.")
    if gpus is not None and gpus < 1:
        raise PlanError(f"{gpus} GPUs train nothing. Give 1 or more.")


def _check_size(chosen: Option, kind: str) -> None:
    sizes = chosen.parameters, chosen.tokens
    if min(sizes) < FEWEST or max(sizes) > MOST:
        small = min(sizes) < FEWEST
        what = "target" if kind == "target_loss_nats" else "budget"
        side = "larger" if small != (what == "target") else "smaller"
        raise PlanError(
            f"the optimum has {chosen.parameters:.3g} parameters and {chosen.tokens:.3g} tokens: "
            "no law reaches there, and a unit may be off (FLOPs, not TFLOPs; GPU-hours, not "
            f"seconds). Give a {side} {what}."
        )


def _check_worth(way: Way, chosen: Option, kind: str) -> None:
    """PlanError where repeated tokens are worn out: every size of the model is as good."""
    if kind == "target_loss_nats" or way.gain_of_twice(chosen.flops) >= LEAST_GAIN_NATS:
        return
    enough = root_log(
        lambda c: way.gain_of_twice(c) - LEAST_GAIN_NATS, chosen.flops / 2**60, chosen.flops
    )
    cure = "" if enough is None else f" {enough:.3g} FLOPs ({enough / way.flops_per_hour:.3g} "
    raise PlanError(
        f"{chosen.unique_tokens:.3g} unique tokens cannot use {chosen.flops:.3g} FLOPs: seen "
        f"{chosen.epochs:.3g} times, they have no more to teach, and every size of the model comes "
        f"out alike.{cure and cure + 'GPU-hours) get all that can be had.'} "
        "Give a smaller budget, or more unique tokens."
    )


def _way(
    name: str, speed: Speed, gpu: Gpu, mfu: float, setting: Setting, price: Price | None
) -> Way:
    rate = rate_flops(gpu, mfu, speed, name)
    return Way(precision=precision_of(name), speed=speed, setting=setting, flops_per_hour=rate,
               price=price)  # fmt: skip


def _spender(kind: str, amount: float, price: Price | None, gpu: Gpu) -> Callable[[Way], Option]:
    """How each way spends the budget."""
    if kind == "flops":
        return lambda way: way.option(amount)
    if kind == "target_loss_nats":
        return lambda way: way.option(way.setting.flops_for(amount))
    if kind == "gpu_hours":
        return lambda way: way.option(amount * way.flops_per_hour)
    if price is None:
        raise PlanError(
            f"money buys GPU-hours at a price, and none is listed for {gpu.name}. Give --price."
        )
    return lambda way: way.option(amount / price.usd * way.flops_per_hour)


def _ways(
    reference: Way, precision: str, gpu: Gpu, mfu: float, speeds: Mapping[str, Speed], size: float
) -> tuple[dict[str, Way], dict[str, str]]:
    """The reference and the other precisions; those that cannot be had, with the reason."""
    for name in speeds:
        precision_of(name)
    ways, refused = {"bf16": reference}, {}
    asked = PRECISIONS if precision == "auto" else (precision_of(precision).name,)
    for name in asked:
        if name == "bf16":
            continue
        try:
            gpu.peak_flops(name)
            speed = speeds[name] if name in speeds else speed_of(name, gpu, parameters=size)
            ways[name] = _of_format(reference, name, speed, gpu, mfu)
        except ConfigError as error:
            if precision != "auto":
                raise
            why = "speed" if name in gpu.peak_tflops and name not in speeds else "units"
            why = "peak" if isinstance(error, PlanError) else why
            refused[name] = _left_out(why, name, gpu, str(error))
    return ways, refused


def _left_out(why: str, precision: str, gpu: Gpu, english: str) -> Said:
    japanese = REFUSED_JAPANESE[why].format(precision=precision, gpu=gpu.name)
    return Said(english, japanese)


def _spent(
    ways: Mapping[str, Way], spend: Callable[[Way], Option], gpu: Gpu, *, strict: bool
) -> tuple[dict[str, Option], dict[str, str]]:
    """What each way buys, and why some do not reach the target; `strict`: all have to."""
    options, refused = {}, {}
    for name, way in ways.items():
        try:
            options[name] = spend(way)
        except PlanError as error:
            if strict or name == "bf16":
                raise
            refused[name] = _left_out("target", name, gpu, f"{name}: {error}")
    return options, refused


def _of_format(reference: Way, name: str, speed: Speed, gpu: Gpu, mfu: float) -> Way:
    setting = replace(reference.setting, layout=PRECISIONS[name].layout)
    return _way(name, speed, gpu, mfu, setting, reference.price)


def _choose(kind: str, precision: str, options: Mapping[str, Option]) -> tuple[str, str]:
    if precision != "auto":
        return precision, said("asked")
    if kind == "flops":
        return "bf16", said("why_flops")
    if kind == "target_loss_nats":
        best = min(options.values(), key=lambda o: o.gpu_hours)
        return best.precision, said("why_target")
    best = min(options.values(), key=lambda o: o.loss_nats)
    return best.precision, said("why_loss")
