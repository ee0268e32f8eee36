"""What two corpora share, from the samples of their distinct sequences."""

from dataclasses import dataclass

import numpy as np

from halfulp.corpus.sketch_file import Sketch, require_alike

_OUTSIDE = 0.025  # on each side of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; both ends are the value where it was counted."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Distinct sequences of corpora A and B that are in both.

    `common`: how many. `share_of_a`, `share_of_b`: their share of each corpus; `jaccard`: of the
    union. `compared`: sampled sequences that this rests on; `exact`: they are all there are.
    """

    common: Estimate
    share_of_a: Estimate
    share_of_b: Estimate
    jaccard: Estimate
    compared: int
    exact: bool


def overlap(a: Sketch, b: Sketch) -> Overlap:
    """What `a` and `b` share.

    Both samples are cut to the smaller share of hashes: what is left of one is a random part of
    its distinct sequences, so shares have binomial intervals (Clopper–Pearson) and the number in
    common a Poisson one (Garwood 1936).
    Raises DataError for sketches of unlike definitions or sizes.
    """
    require_alike(a, b)
    shift = max(a.theta.shift, b.theta.shift)
    ours, theirs = a.theta.at_shift(shift), b.theta.at_shift(shift)
    common = len(np.intersect1d(ours, theirs, assume_unique=True))
    union = len(ours) + len(theirs) - common
    exact = shift == 0
    return Overlap(
        common=_scaled(common, 1 << shift, exact),
        share_of_a=_share(common, len(ours), exact),
        share_of_b=_share(common, len(theirs), exact),
        jaccard=_share(common, union, exact),
        compared=union,
        exact=exact,
    )


def _share(part: int, whole: int, exact: bool) -> Estimate:
    if whole == 0:
        return Estimate(0.0, 0.0, 0.0 if exact else 1.0)
    value = part / whole
    if exact:
        return Estimate(value, value, value)
    from scipy.stats import beta

    low = float(beta.ppf(_OUTSIDE, part, whole - part + 1)) if part else 0.0
    high = float(beta.isf(_OUTSIDE, part + 1, whole - part)) if part < whole else 1.0
    return Estimate(value, low, high)


def _scaled(count: int, scale: int, exact: bool) -> Estimate:
    value = float(count * scale)
    if exact:
        return Estimate(value, value, value)
    from scipy.stats import chi2

    low = float(chi2.ppf(_OUTSIDE, 2 * count)) / 2 if count else 0.0
    high = float(chi2.isf(_OUTSIDE, 2 * count + 2)) / 2
    return Estimate(value, low * scale, high * scale)
