"""What a reader of a plan has to know: laws used beyond their data, and what was assumed."""

from collections.abc import Sequence

from halfulp.plan.cost import Price
from halfulp.plan.in_use import LawInUse
from halfulp.plan.laws import load_law
from halfulp.plan.options import Option
from halfulp.plan.repetition import FEW_EPOCHS

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
    return [
        f"speed of {option.precision}: published for {size:.3g} parameters, used for "
        f"{option.parameters:.3g}"
    ]


def notes_of(
    chosen: Option, law: LawInUse, options: Sequence[Option], price: Price | None, served: float
) -> tuple[str, ...]:
    """What was assumed and what limits it."""
    notes = [f"law {law.law.name}: {law.law.source}"]
    if law.law.warning:
        notes.append(f"law {law.law.name}: {law.law.warning}")
    notes.append(f"band: {law.about_band}")
    if chosen.epochs is not None:
        notes += _about_repetition(chosen)
    notes += [
        f"speed of {o.precision}: {o.speed.ratio:.3g} times BF16 "
        f"({o.speed.low:.3g} to {o.speed.high:.3g}): {o.speed.source}"
        for o in options
        if o.precision != "bf16"
    ]
    if any(option.penalty_nats for option in options):
        floating = load_law("floating")
        notes.append(f"loss added by formats: {floating.source}; {floating.notes[0]}")
    if served:
        notes.append(f"served tokens: {load_law('inference').notes[0]}")
    if price is not None:
        notes.append(f"price: {price.usd:.3g} $/GPU-hour, {price.source}")
    notes.append("learning rate and batch: halfway between two laws that were not fitted on yours")
    return tuple(notes)


def _about_repetition(chosen: Option) -> list[str]:
    law = load_law("muennighoff")
    notes = [f"repeated tokens: {law.source}"]
    if chosen.epochs is not None and chosen.epochs > FEW_EPOCHS:
        notes.append(f"more than {FEW_EPOCHS} epochs: {law.notes[0]}")
    return notes
