"""Published scaling laws, evaluated by halfulp.plan and compared with what the papers print."""

import math
from collections.abc import Iterator

import numpy as np

from reproduce.common import REFUTED, REPRODUCED, Result

KAUSIK, HOFFMANN, EPOCH = "arXiv:2402.14746", "arXiv:2203.15556", "arXiv:2404.10102"
MUENNIGHOFF, KUMAR, SUN = "arXiv:2305.16264", "arXiv:2411.04330", "arXiv:2501.02423"
BETA = 0.28  # of the rounded Chinchilla law


def published() -> Iterator[Result]:
    """Claims that arithmetic decides."""
    yield _gammas()
    yield _doublings()
    yield _other_laws()
    yield _chinchilla("hoffmann", HOFFMANN, "the rounded coefficients")
    yield _chinchilla("epoch", EPOCH, "the coefficients fitted again")
    yield _repetition()
    yield _bits()
    yield _critical()
    yield _layouts()


def _gammas() -> Result:
    from halfulp.plan.kausik import growth_of

    found = growth_of(BETA)
    values = (found.low, found.high, found.middle)
    right = np.allclose(values, (0.44, 0.72, 0.58), rtol=0, atol=1e-12)
    return Result(
        "N ∝ D^γ with γ from 0.44 to 0.72, in the first version 0.58",
        f"{KAUSIK}, abstracts of v1, v3 and v4",
        f"1 − 2β = {values[0]:.2f}, 1 − β = {values[1]:.2f}, middle {values[2]:.2f} for β = "
        f"{BETA}, Chinchilla's rounded exponent (our reconstruction of the derivation)",
        REPRODUCED if right else REFUTED,
    )


def _doublings() -> Result:
    from halfulp.plan.kausik import growth_of

    found = growth_of(BETA)
    least, most = found.doubling
    middle = 2 ** (1 / (found.middle or math.nan))
    right = np.allclose((most, middle, least), (4.832, 3.304, 2.619), rtol=0, atol=1e-3)
    return Result(
        "doubling the skills takes a corpus more than four times as large (v3), three to five "
        "times (v1)",
        f"{KAUSIK}, abstracts of v1 and v3",
        f"2^(1/γ) = {most:.3f}, {middle:.3f} and {least:.3f} for γ = 0.44, 0.58 and 0.72",
        REPRODUCED if right else REFUTED,
    )


def _other_laws() -> Result:
    from halfulp.plan.kausik import growth_of
    from halfulp.plan.laws import load_law

    names = ("hoffmann", "hoffmann_tex", "muennighoff", "epoch", "precision", "floating")
    bands = {name: growth_of(load_law(name).coefficients["beta"]) for name in names}
    said = [
        f"{name} {'no lower bound' if g.low is None else f'{g.low:.3f}'} to {g.high:.3f}"
        for name, g in bands.items()
    ]
    same = all(abs((g.low or 0) - 0.44) < 0.02 for g in bands.values())
    return Result(
        "γ from 0.44 to 0.72 whatever law the loss follows",
        f"{KAUSIK}; not claimed there, but asked of a planner",
        f"(1 − 2β, 1 − β): {'; '.join(said)}",
        REPRODUCED if same else REFUTED,
    )


def _chinchilla(name: str, source: str, what: str) -> Result:
    from halfulp.plan.chinchilla import chinchilla

    n, d = chinchilla(name).allocate(6 * 70e9 * 1.4e12)
    return Result(
        f"70 B parameters and 1.4 T tokens are the best use of their compute, by {what}",
        source,
        f"{n / 1e9:.1f} B and {d / 1e12:.2f} T, {d / n:.0f} tokens per parameter (gate: N within "
        "25%)",
        REPRODUCED if abs(math.log(n / 70e9)) < math.log(1.25) else REFUTED,
    )


def _repetition() -> Result:
    from halfulp.plan.repetition import repetition

    law = repetition()
    wanted = {(6.34e9, 242e9): 2.2256440889984477, (8.67e9, 178e9): 2.2269634075087867}
    found = {place: law.loss(*place, 25e9) for place in wanted}
    off = max(abs(found[p] / wanted[p] - 1) for p in wanted)
    return Result(
        "loss of 6.34 B and 8.67 B parameters on 25 B different tokens, seen 9.7 and 7.1 times",
        f"{MUENNIGHOFF}, README of huggingface/datablations",
        f"{', '.join(f'{x:.6f}' for x in found.values())}; relative difference {off:.1g}",
        REPRODUCED if off < 1e-12 else REFUTED,
    )


def _bits() -> Result:
    from halfulp.plan.precision import optimal_bits

    with_shifts, without = optimal_bits(), optimal_bits(shifted=False)
    return Result(
        "training at 7 to 8 bits is compute-optimal",
        f"{KUMAR}, abstract",
        f"{with_shifts:.2f} bits with the shifts of appendix K, {without:.2f} by the formula of "
        "the main text without them (gate 6.5 to 8.5)",
        REPRODUCED if 6.5 <= with_shifts <= 8.5 else REFUTED,
    )


def _critical() -> Result:
    from halfulp.plan.floating import Layout, critical_tokens

    printed = {"BF16": (8, 7, 1730e12), "E4M3": (4, 3, 27e12), "E2M1": (2, 1, 0.4e12)}
    found = {name: critical_tokens(1e9, Layout(e, m, 128)) for name, (e, m, _) in printed.items()}
    off = max(abs(found[name] / wanted - 1) for name, (*_, wanted) in printed.items())
    return Result(
        "tokens beyond which 1 B parameters get worse: 1730 T in BF16, 27 T in E4M3, 0.4 T in E2M1",
        SUN,
        ", ".join(f"{name} {value / 1e12:.3g} T" for name, value in found.items()),
        REPRODUCED if off < 0.03 else REFUTED,
    )


def _layouts() -> Result:
    from halfulp.plan.floating import best_layout

    wanted = {4: (2, 1), 8: (4, 3), 16: (8, 7)}
    found = {bits: best_layout(bits) for bits in wanted}
    right = all(tuple(map(round, found[b])) == wanted[b] for b in wanted)
    said = ", ".join(f"{b} bits: E{e:.2f} M{m:.2f}" for b, (e, m) in found.items())
    return Result(
        "the best layouts of 4, 8 and 16 bits are E2M1, E4M3 and E8M7",
        SUN,
        said,
        REPRODUCED if right else REFUTED,
    )
