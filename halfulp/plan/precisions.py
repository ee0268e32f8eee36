"""The precisions that a plan compares: their layout in the law of formats, and their recipe."""

import difflib
from dataclasses import dataclass

from halfulp.errors import PlanError
from halfulp.plan.floating import Layout


@dataclass(frozen=True)
class Precision:
    """`layout` None: the reference, which adds nothing to a law fitted on 16-bit runs."""

    name: str
    recipe: str
    layout: Layout | None
    what: str


PRECISIONS = {
    p.name: p
    for p in (
        Precision("bf16", "bf16_amp", None, "BF16"),
        Precision("fp8", "te_current", Layout(4, 3, None), "FP8 (E4M3), scales per tensor"),
        Precision("mxfp8", "mxfp8", Layout(4, 3, 32), "MXFP8 (E4M3), blocks of 32"),
        Precision("nvfp4", "nvfp4", Layout(2, 1, 16), "NVFP4 (E2M1), blocks of 16"),
    )
}


def precision_of(name: str) -> Precision:
    """The precision `name`; PlanError naming the nearest."""
    if name not in PRECISIONS:
        near = difflib.get_close_matches(name, PRECISIONS, n=2, cutoff=0.3) or list(PRECISIONS)
        raise PlanError(
            f"precision {name!r} cannot be planned with. Nearest: {', '.join(near)}. "
            f"Give auto, or one of {', '.join(PRECISIONS)}."
        )
    return PRECISIONS[name]
