"""The figures that stand in for what the user has not said, and what every bill assumes."""

from collections.abc import Iterable
from dataclasses import dataclass

from halfulp.hardware import load_gpu
from halfulp.sweep.evidence import Evidence
from halfulp.sweep.inputs import Inputs

ABANDONED = 0.5  # share of a run at which a failing one is given up, where no run has failed
PROXY_FRACTION = 0.01
ASSUMPTIONS = (
    "Attempts succeed independently, and as often in the run to decide on as in this sweep.",
    "A failed attempt is started again from the beginning.",
    "The learning rate is searched on a grid as fine as the window is wide, with one proxy run per "
    "point, and moves by the same factor from the proxy to the run.",
    "Speed-ups are those of hardware that has the format; step times of this sweep are not used.",
    "Hardware failures cost every recipe the same factor: it is in the GPU-hours of one run.",
)
_OWN = "assumption of halfulp"


@dataclass(frozen=True, kw_only=True)
class Default:
    """A figure that the user has not given, and where it comes from."""

    name: str
    value: str
    source: str
    date: str = ""


def defaults(
    evidence: Iterable[Evidence], reference: str, inputs: Inputs, *, octaves: float
) -> tuple[Default, ...]:
    """Every figure that the bills use and the user has not given."""
    found = list(evidence)
    return (
        *_price(inputs),
        *(default for e in found for default in _speedup(e.recipe, reference, inputs)),
        *_search(inputs, octaves),
        *(_abandoned(e.recipe) for e in found if e.abandoned_fraction is None),
    )


def _price(inputs: Inputs) -> tuple[Default, ...]:
    price = inputs.price
    if inputs.price_usd is not None or price is None or inputs.gpu is None:
        return ()
    gpu = load_gpu(inputs.gpu)
    value = f"{price.low:.2f} to {price.high:.2f} dollars per hour of {gpu.name}"
    return (Default(name="price", value=value, source=gpu.price_source, date=gpu.price_date),)


def _speedup(recipe: str, reference: str, inputs: Inputs) -> tuple[Default, ...]:
    ratio, rows = inputs.speed_of(recipe, reference)
    if ratio is None or not rows:
        return ()
    value = f"{ratio.value:.2f} ({ratio.low:.2f} to {ratio.high:.2f})"
    source = "; ".join(row.source for row in rows)
    date = min(row.date for row in rows)
    return (Default(name=f"speed-up of {recipe}", value=value, source=source, date=date),)


def _search(inputs: Inputs, octaves: float) -> tuple[Default, ...]:
    given = (inputs.prior_octaves, inputs.proxy_fraction, inputs.search_seeds)
    rows = (
        ("doubt about the learning rate", f"{octaves:.1f} octaves", "the grid of this sweep"),
        ("one run of the search", f"{100 * PROXY_FRACTION:g} % of a run", _OWN),
        ("seeds of the search", "1", _OWN),
    )
    return tuple(
        Default(name=name, value=value, source=source)
        for (name, value, source), known in zip(rows, given, strict=True)
        if known is None
    )


def _abandoned(recipe: str) -> Default:
    return Default(name=f"share of a failing run of {recipe}", value=f"{ABANDONED:g}", source=_OWN)
