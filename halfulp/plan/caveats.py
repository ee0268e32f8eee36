"""What a reader of a plan has to know: laws used beyond their data, and what was assumed."""

from collections.abc import Sequence

from halfulp.plan.cost import Price
from halfulp.plan.in_use import LawInUse
from halfulp.plan.laws import load_law
from halfulp.plan.options import Option
from halfulp.plan.repetition import FEW_EPOCHS
from halfulp.plan.said import Said, said

_SAME_SIZE = 4.0  # factor in parameters within which a published step time is taken over


def flags_of(chosen: Option, law: LawInUse, options: Sequence[Option]) -> tuple[str, ...]:
    """One sentence for every law that is used outside what it was fitted on."""
    n, d, c = chosen.parameters, chosen.tokens, chosen.flops
    flags = [*law.law.outside(N=n, D=d, C=c, L=chosen.loss_nats)]
    if chosen.epochs is not None and chosen.epochs > 1:
        repeated = load_law("muennighoff")
        flags += [f for f in repeated.outside(N=n, epochs=chosen.epochs) if f not in flags]
    if any(option.penalty_nats for option in options):
        flags += load_law("floating").outside(N=n, D=d)
    flags += load_law("steplaw").outside(N=n, D=d)
    flags += load_law("deepseek").outside(C=c)
    return (*flags, *(text for option in options for text in _far(option)))


def _far(option: Option) -> list[str]:
    size = option.speed.parameters
    if size != size or 1 / _SAME_SIZE <= option.parameters / size <= _SAME_SIZE:
        return []
    return [said("far_speed", precision=option.precision, size=size, parameters=option.parameters)]


def notes_of(
    chosen: Option, law: LawInUse, options: Sequence[Option], price: Price | None, served: float
) -> tuple[str, ...]:
    """What was assumed and what limits it."""
    notes = [said("law", law=law.law.name, text=law.law.source)]
    if law.law.warning:
        warning = Said(law.law.warning, law.law.warning_ja)
        notes.append(said("law", law=law.law.name, text=warning))
    notes.append(said("band", text=law.about_band))
    if chosen.epochs is not None:
        notes += _about_repetition(chosen)
    for o in options:
        if o.precision != "bf16":
            range_ = {"ratio": o.speed.ratio, "low": o.speed.low, "high": o.speed.high}
            notes.append(said("speed", precision=o.precision, source=o.speed.source, **range_))
    if any(option.penalty_nats for option in options):
        floating = load_law("floating")
        notes.append(said("formats", source=floating.source, text=floating.note()))
    if served:
        notes.append(said("served", text=load_law("inference").note()))
    if price is not None:
        notes.append(said("price", usd=price.usd, source=price.source))
    return (*notes, said("rates"))


def _about_repetition(chosen: Option) -> list[Said]:
    law = load_law("muennighoff")
    notes = [said("repeated", source=law.source)]
    if chosen.epochs is not None and chosen.epochs > FEW_EPOCHS:
        notes.append(said("many_epochs", epochs=FEW_EPOCHS, text=law.note()))
    return notes
