"""What each law says at one point: its losses, rates or bits for N parameters and D tokens."""

from halfulp.plan import floating, kaplan
from halfulp.plan.in_use import open_law
from halfulp.plan.laws import LOSS_KINDS, load_law
from halfulp.plan.precision import Bits, optimal_bits, precision_loss, ptq_loss
from halfulp.plan.precisions import PRECISIONS
from halfulp.plan.rates import deepseek, steplaw


def values_at(name: str, n: float, d: float) -> list[tuple[str, str]]:
    """(what, value) of the law `name`, or of a fit in a file; [] for one that says nothing there.

    Losses in nats per token of the law's own tokenizer and data.
    """
    kind = "loss" if name.endswith((".json", ".csv")) else load_law(name).kind
    if kind in LOSS_KINDS:
        return _loss(name, n, d)
    if kind == "precision":
        pairs = [(bits, precision_loss(n, d, Bits(bits, bits, bits))) for bits in (16, 8, 4)]
        rows = [(f"loss with {bits} bits", f"{loss:.5g}") for bits, loss in pairs]
        return [*rows, ("bits of the least loss for the compute", f"{optimal_bits():.2f}")]
    if name == "ptq":
        added = [(bits, ptq_loss(n, d, bits)) for bits in (8, 4, 3)]
        return [(f"loss added by {bits} bits", f"{loss:.3g}") for bits, loss in added]
    if kind == "floating":
        layouts = [(p.name, p.layout) for p in PRECISIONS.values() if p.layout is not None]
        return [(f"loss added by {p}", f"{floating.penalty(n, d, at):.3g}") for p, at in layouts]
    if kind == "kaplan":
        return [("loss", f"{kaplan.loss(n, d):.5g}")]
    if kind == "rates":
        return _rates(name, n, d)
    return []


def _loss(name: str, n: float, d: float) -> list[tuple[str, str]]:
    law = open_law(name)
    rows = [("loss", f"{law.plain.loss(n, d):.6g}")]
    band = law.band(n, d, float("inf"))
    if band is not None:
        rows.append(("80 % band of the law", f"{band[0]:.5g} to {band[1]:.5g}"))
    best_n, best_d = law.plain.allocate(6 * n * d)
    optimum = f"{best_n:.4g} parameters, {best_d:.4g} tokens: {law.plain.loss(best_n, best_d):.6g}"
    return [*rows, ("best of the same 6 N D", optimum)]


def _rates(name: str, n: float, d: float) -> list[tuple[str, str]]:
    if name == "moonlight":
        return []
    found = steplaw(n, d) if name == "steplaw" else deepseek(6 * n * d)
    return [("learning rate", f"{found.lr:.3g}"), ("batch, tokens", f"{found.batch_tokens:.4g}")]
