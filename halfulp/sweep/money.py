"""The bill of every recipe until one run has succeeded, against the reference's, with intervals.

Every figure is drawn 20,000 times: the success probability from its Beta posterior, the window from
its interval, speed-ups and prices from their ranges. Step times of the sweep itself are not used:
its formats are simulated and say nothing about the speed of hardware that has them.
"""

import zlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from halfulp.sweep import cost
from halfulp.sweep.defaults import ABANDONED, ASSUMPTIONS, PROXY_FRACTION, Default, defaults
from halfulp.sweep.evidence import Evidence, gather
from halfulp.sweep.inputs import Inputs
from halfulp.sweep.interval import LEVEL
from halfulp.sweep.ranges import Range, spanned

if TYPE_CHECKING:
    from halfulp.sweep.table import Table

DRAWS = 20_000


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one recipe costs until a run has succeeded, the search for its learning rate included.

    Values are medians, ends those of intervals (95 % unless said); with lost runs the low end is
    that of the best case and the high end that of the worst. `retries` and `search` are in runs of
    the recipe, `ratio` is over the cost of the reference, `break_even` the speed-up at which the
    ratio is 1. `saves`: probability that the ratio is below 1. None where `missing` says what is
    not known, and where nobody asked: hours need `gpu_hours`, dollars a price as well.
    """

    recipe: str
    retries: Range
    speedup: Range | None = None
    search: Range | None = None
    ratio: Range | None = None
    break_even: Range | None = None
    saves: float | None = None
    gpu_hours: Range | None = None
    usd: Range | None = None
    missing: str = ""


@dataclass(frozen=True, kw_only=True)
class Money:
    """The bills of all recipes that the model took, and what they rest on.

    `evidence` has one entry per bill; `octaves`: how many the best learning rate is uncertain by;
    `level`: of the intervals of the bills.
    """

    reference: str
    inputs: Inputs
    octaves: float
    costs: tuple[Cost, ...]
    evidence: tuple[Evidence, ...]
    defaults: tuple[Default, ...]
    assumptions: tuple[str, ...]
    level: float = LEVEL

    def cost(self, recipe: str) -> Cost | None:
        """The bill of `recipe`; None for a refused one."""
        return next((c for c in self.costs if c.recipe == recipe), None)

    def speed_is_given(self, recipe: str) -> bool:
        """Whether the speed-up is the user's, not a published one."""
        return not self.inputs.speed_of(recipe, self.reference)[1]

    def with_seeds(self, recipe: str, factor: int) -> Cost:
        """The bill if `factor` times as many seeds showed the same shares, and none were lost."""
        wanted = {e.recipe: e.times(factor) for e in self.evidence}
        return self._bill(wanted[recipe], wanted[self.reference], self.level)

    def at(self, level: float) -> "Money":
        """The same bills with intervals at `level`."""
        reference = next((e for e in self.evidence if e.recipe == self.reference), None)
        if level == self.level or reference is None:
            return self
        costs = tuple(self._bill(e, reference, level) for e in self.evidence)
        return replace(self, costs=costs, level=level)

    def _bill(self, own: Evidence, reference: Evidence, level: float) -> Cost:
        return bill(own, reference, self.inputs, octaves=self.octaves, level=level)


def money(table: "Table", inputs: Inputs) -> Money:
    """The bill of every recipe of `table` under `inputs`.

    Raises ConfigError for inputs on the reference, or on recipes that the table does not have.
    """
    inputs.check_recipes(table.recipes, table.reference)
    found = [gather(table, recipe) for recipe in table.recipes]
    evidence = tuple(e for e in found if not e.refused)
    reference = next(e for e in found if e.recipe == table.reference)
    octaves = inputs.prior_octaves or float(np.log2(max(table.lrs) / min(table.lrs)))
    return Money(
        reference=table.reference,
        inputs=inputs,
        octaves=octaves,
        costs=tuple(bill(e, reference, inputs, octaves=octaves) for e in evidence),
        evidence=evidence,
        defaults=defaults(evidence, table.reference, inputs, octaves=octaves),
        assumptions=ASSUMPTIONS,
    )


def bill(
    evidence: Evidence,
    reference: Evidence,
    inputs: Inputs,
    *,
    octaves: float,
    level: float = LEVEL,
) -> Cost:
    """The bill of one recipe against that of `reference`, with intervals at `level`."""
    retries, search = _draws(evidence, inputs, octaves)
    retries_reference, search_reference = _draws(reference, inputs, octaves)
    speedup, _ = inputs.speed_of(evidence.recipe, reference.recipe)
    found = Cost(recipe=evidence.recipe, retries=spanned(retries, level), speedup=speedup)
    if search is None or search_reference is None:
        who = evidence.recipe if search is None else reference.recipe
        return replace(found, missing=f"no learning rate is known that suits {who}")
    found = replace(found, search=spanned(search, level))
    own = (1 + inputs.extra_tokens.get(evidence.recipe, 0.0)) * (retries + search)
    other = own
    if evidence.recipe != reference.recipe:
        # The recipe's best case is the reference's worst.
        other = (retries_reference + search_reference)[[0, 2, 1]]
    return _priced(found, own, other, inputs, level)


def _draws(
    evidence: Evidence, inputs: Inputs, octaves: float
) -> tuple[np.ndarray, np.ndarray | None]:
    """Compute of all attempts and of the search, in runs: draws [case, n] each."""
    prior = inputs.success_prior
    posteriors = [cost.success_posterior(*counts, prior=prior) for counts in evidence.cases()]
    success = np.stack([_rng(evidence.recipe).beta(a, b, DRAWS) for a, b in posteriors])
    share = ABANDONED if evidence.abandoned_fraction is None else evidence.abandoned_fraction
    retries = cost.expected_runs(success, abandoned_fraction=share, guard=inputs.guard)
    width = _widths(evidence)
    if width is None:
        return retries, None
    fraction, seeds = inputs.proxy_fraction or PROXY_FRACTION, inputs.search_seeds or 1
    runs = cost.grid_search_runs(octaves, width, proxy_fraction=fraction, seeds=seeds)
    return retries, np.broadcast_to(runs, retries.shape)


def _widths(evidence: Evidence) -> np.ndarray | None:
    """Octaves of the window [n]; one that is open counts as wide as it was seen at most.

    None without a window, and where the runs show none: a search for it may never end.
    """
    window = evidence.window
    if window is None or window.octaves == 0:
        return None
    high = window.octaves if window.open_ended else window.high
    width = Range(value=window.octaves, low=window.low, high=high)
    return width.normal(_rng(f"window {evidence.recipe}"), DRAWS)


def _priced(found: Cost, own: np.ndarray, other: np.ndarray, inputs: Inputs, level: float) -> Cost:
    """With everything that speed-up, hours and price give. own, other [case, n]: in runs."""
    price = inputs.price and inputs.price.triangular(_rng("price"), DRAWS)
    leaving = np.zeros(DRAWS)
    if own is not other and price is not None and inputs.gpu_hours is not None:
        leaving = inputs.adoption_usd / (inputs.gpu_hours * price)
    found = replace(found, break_even=spanned(_ratio(own, other - leaving), level))
    if found.speedup is None:
        why = f"no speed-up of {found.recipe} over the reference is given or published"
        return replace(found, missing=why)
    runs = own / found.speedup.triangular(_rng(f"speed {found.recipe}"), DRAWS) + leaving
    ratio = _ratio(runs, other)
    found = replace(found, ratio=spanned(ratio, level))
    if own is not other:
        found = replace(found, saves=float(np.mean(ratio[0] < 1)))
    if inputs.gpu_hours is None:
        return found
    hours = inputs.gpu_hours * (runs - leaving)
    usd = None if price is None else spanned(inputs.gpu_hours * runs * price, level)
    return replace(found, gpu_hours=spanned(hours, level), usd=usd)


def _ratio(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b; inf where b is not positive, nan where both are infinite."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(b > 0, a / b, np.inf)


def _rng(name: str) -> np.random.Generator:
    """The same draws for the same name, whatever else is in the table."""
    return np.random.default_rng(zlib.crc32(name.encode()))
