"""How the number of distinct sequences grows with a corpus, for documents in random order."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from halfulp.corpus.adaptive import units_of
from halfulp.corpus.pairs import MOST_UNITS, key_starts
from halfulp.corpus.tally import GROUPS, PLACE_BITS, STEPS, Tally, group_of, step_of

FREQUENCIES = MOST_UNITS - 1
_LEAST_POINTS = 8  # of a curve, for the order of the files to mean something
_CLEAR_DIFFERENCE = 0.05  # of two local exponents
_HALVES = 32


@dataclass(frozen=True)
class Part:
    """A random part of a corpus, as far as a sample shows it.

    `frequencies` [FREQUENCIES]: how many sequences occur in exactly 1, 2, … units. `curve`
    [points, 2]: occurrences and distinct sequences, from the whole part down to small shares.
    """

    occurrences: int
    distinct: int
    frequencies: np.ndarray
    curve: np.ndarray

    @property
    def slope(self) -> float:
        """d log(distinct) / d log(corpus) at its end: f_1 / U; NaN for an empty part."""
        return min(1.0, float(self.frequencies[0] / self.distinct)) if self.distinct else math.nan


class Record:
    """The units of the sampled keys, and how much text there is at every step of the order."""

    def __init__(self, tally: Tally) -> None:
        sample = tally.sample
        self._keys, self._shift = sample.keys, sample.shift
        self._steps, self._groups = step_of(sample.priorities), group_of(sample.priorities)
        self._totals = tally.steps

    def part(self, *, from_step: int = 0, groups: np.ndarray | None = None) -> Part:
        """The units of steps ≥ `from_step`, a share of 2^(−from_step/2), in `groups` (mask)."""
        groups = np.ones(GROUPS, bool) if groups is None else groups
        kept = (self._steps >= from_step) & groups[self._groups]
        totals = self._totals[groups].sum(0)
        keys, steps = self._keys[kept], self._steps[kept]
        counts = np.bincount(units_of(keys), minlength=MOST_UNITS + 1) << self._shift
        lowest = np.bincount(steps[key_starts(keys)], minlength=STEPS) << self._shift
        curve = np.stack([_from_the_end(totals), _from_the_end(lowest)], 1)[from_step:]
        if self._shift:  # an estimate may exceed what there is
            curve[:, 1] = np.minimum(curve[:, 1], curve[:, 0])
        return Part(
            int(curve[0, 0]), int(curve[0, 1]), counts[1:MOST_UNITS], curve[curve[:, 0] > 0]
        )


def _from_the_end(counts: np.ndarray) -> np.ndarray:
    return np.cumsum(counts[::-1])[::-1]


@dataclass(frozen=True)
class Growth:
    """One definition's sequences in a corpus and how their number grows.

    - `occurrences` T, `distinct` U, and its relative standard error `rel_std` (0 when `exact`).
    - `f` [12]: sequences that occur in exactly 1, 2, … documents (or pieces, where there are few
      documents).
    - `slope` = f_1 / U, the local exponent d log U / d log T at the end of the corpus, with the
      standard error of a jackknife over 16 groups of documents.
    - `doubling_factor` = 2^(U / f_1): a corpus so many times as large holds twice as many, were
      the exponent to stay. It falls, so that more is needed.
    - `curve`: (T, U) for random parts spaced by about √2, ascending, the corpus at its end.
    - `unique_symbols`: of lines and documents, the words or tokens in the distinct ones.
    - `order_exponent`: the exponent between the first half, in the order of the files, and the
      whole; `random_exponent`: the same for random halves, their mean and standard deviation. None
      where that says nothing.
    """

    name: str
    occurrences: int
    distinct: int
    exact: bool
    rel_std: float
    f: tuple[int, ...]
    slope: float | None
    slope_se: float | None
    doubling_factor: float | None
    curve: tuple[tuple[int, int], ...]
    unique_symbols: int | None = None
    order_exponent: float | None = None
    random_exponent: float | None = None
    random_exponent_sd: float | None = None

    @property
    def duplicates(self) -> float | None:
        """The share of occurrences that repeat an earlier one, 1 − U / T."""
        return 1 - self.distinct / self.occurrences if self.occurrences else None

    @property
    def shuffled(self) -> bool | None:
        """Whether the first half of the files is like a random half; None where unknown."""
        if self.order_exponent is None or self.random_exponent is None:
            return None
        return abs(self.order_exponent - self.random_exponent) <= max(
            _CLEAR_DIFFERENCE, 3 * (self.random_exponent_sd or 0.0)
        )


def growth(name: str, tally: Tally, symbols: Mapping[int, int] | None = None) -> Growth:
    """What `tally` says of the definition `name`.

    `symbols`: words or tokens in each shard, where the order of the files is to be judged.
    """
    record = Record(tally)
    whole, sample = record.part(), tally.sample
    slope = None if math.isnan(whole.slope) else whole.slope
    factor = 2 ** (1 / slope) if slope and slope > 1e-3 else None
    order = _order_exponent(tally, whole, symbols) if symbols else None
    return Growth(
        name,
        whole.occurrences,
        whole.distinct,
        sample.exact,
        sample.rel_std,
        tuple(int(count) for count in whole.frequencies),
        slope,
        None if slope is None else jackknife(record, lambda part: part.slope),
        factor,
        tuple((int(t), int(u)) for t, u in whole.curve[::-1]),
        None if ":" in name else int(sample.least.sum()) << sample.shift,
        order,
        *(_half_exponents(record, whole) if order is not None else (None, None)),
    )


def jackknife(record: Record, statistic) -> float | None:
    """The standard error of `statistic`(Part) over groups of documents.

    None when a group holds everything, so that the corpus is a single piece.
    """
    parts = [record.part(groups=np.arange(GROUPS) != group) for group in range(GROUPS)]
    values = np.array([statistic(part) for part in parts if part.distinct])
    if len(values) < GROUPS or not np.isfinite(values).all():
        return None
    return float(np.sqrt((GROUPS - 1) / GROUPS * ((values - values.mean()) ** 2).sum()))


def _half_exponents(record: Record, whole: Part) -> tuple[float, float] | tuple[None, None]:
    """Mean and standard deviation of the exponent between random halves and the whole."""
    rng, found = np.random.default_rng(0), []
    for _ in range(_HALVES):
        half = record.part(groups=rng.permutation(GROUPS) < GROUPS // 2)
        if not half.distinct or half.occurrences == whole.occurrences:
            return None, None
        growth = math.log(whole.distinct / half.distinct)
        found.append(growth / math.log(whole.occurrences / half.occurrences))
    return float(np.mean(found)), float(np.std(found))


def _order_exponent(tally: Tally, whole: Part, symbols: Mapping[int, int]) -> float | None:
    total = sum(symbols.values())
    if len(whole.curve) <= _LEAST_POINTS or not whole.distinct:
        return None
    before, base = 0, {}
    for shard in sorted(symbols):
        base[shard], before = before, before + symbols[shard]
    bases = np.zeros(max(base) + 1, np.uint64)
    bases[list(base)] = list(base.values())
    first = tally.sample.least
    place = bases[first >> np.uint64(PLACE_BITS)] + (first & np.uint64((1 << PLACE_BITS) - 1))
    late = place >= total // 2
    early = int((~late).sum()) << tally.sample.shift
    if not (early and late.any()):
        return None
    # A place is where a unit begins: those that begin in the first half end beyond it.
    return math.log(whole.distinct / early) / math.log(total / int(place[late].min()))
