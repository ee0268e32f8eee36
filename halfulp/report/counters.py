"""Counters boiled down: shares per block over time, the worst operand, and whether it is bad."""

from dataclasses import dataclass

import numpy as np

from halfulp.report.price import FAIL, PASS, UNKNOWN
from halfulp.report.read import Counts, Record, Site


@dataclass(frozen=True)
class Counter:
    """A counter in words; shares from `warn` on are raised, from `act` on they are high.

    Shares below `faint` are drawn like `faint`.
    """

    key: str
    title: str
    warn: float
    act: float
    faint: float
    meaning: str


COUNTERS = (
    Counter(
        "lost_updates",
        "Lost updates",
        0.1,
        0.5,
        1e-3,
        "Share of the weights whose nonzero update was rounded away, so that the optimizer asked "
        "and nothing moved.",
    ),
    Counter(
        "underflow",
        "Underflow",
        0.05,
        0.5,
        1e-4,
        "Share of the nonzero elements that the format rounds to zero. "
        "Each cell is the worst operand of the block.",
    ),
    Counter(
        "saturation",
        "Saturation",
        1e-5,
        1e-2,
        1e-6,
        "Share of the elements beyond the largest number of the scaled format. "
        "Each cell is the worst operand of the block.",
    ),
    Counter(
        "v_underflow",
        "Second moments at zero",
        1e-9,
        1e-3,
        1e-6,
        "Share of the second moments that are zero although the gradient is not: "
        "these updates explode.",
    ),
)


@dataclass(frozen=True)
class Worst:
    """Pooled share of the worst operand over all blocks, and of its worst site."""

    share: float
    site: Site
    site_share: float
    operand: str
    steps: int
    sites: int


def overall(counts: Counts) -> Worst:
    """The operand with the largest pooled share over blocks and steps, and its worst site."""
    operands = sorted({site.operand for site in counts.sites})
    hits, total = counts.hits.sum(axis=1), counts.total.sum(axis=1)
    best: Worst | None = None
    for operand in operands:
        members = [i for i, site in enumerate(counts.sites) if site.operand == operand]
        shares = _ratio(hits[members], total[members])
        top = int(np.argmax(shares))
        pooled = float(_ratio(hits[members].sum(), total[members].sum()))
        if best is None or pooled > best.share:
            site = counts.sites[members[top]]
            n = len(members)
            best = Worst(pooled, site, float(shares[top]), operand, len(counts.steps), n)
    assert best is not None
    return best


def level(counter: Counter, share: float) -> str:
    """pass below the warning level, fail from the level to act on, could not tell between."""
    if share >= counter.act:
        return FAIL
    return UNKNOWN if share >= counter.warn else PASS


@dataclass(frozen=True)
class Strip:
    """One counter of one run as a picture: `shares` [blocks, steps], nan where nothing was counted."""

    run: Record
    blocks: tuple[str, ...]
    steps: np.ndarray
    shares: np.ndarray
    pooled: np.ndarray  # [blocks]: share over the whole run of the block's worst site
    places: tuple[str, ...]  # [blocks]: that site in words


def strip(record: Record, counts: Counts) -> Strip:
    """Per block and step the share of the worst site in the block."""
    blocks = tuple(sorted({site.block for site in counts.sites}, key=block_order))
    shares = _ratio(counts.hits, counts.total)
    pooled = _ratio(counts.hits.sum(axis=1), counts.total.sum(axis=1))
    rows, worst, places = [], [], []
    for block in blocks:
        members = [i for i, site in enumerate(counts.sites) if site.block == block]
        rows.append(np.fmax.reduce(shares[members], axis=0))
        top = members[int(np.nanargmax(pooled[members]))]
        worst.append(pooled[top])
        site = counts.sites[top]
        places.append(f"{site.name} {site.operand}".strip())
    table = np.array(rows)
    return Strip(record, blocks, counts.steps, table, np.array(worst), tuple(places))


def block_order(block: str) -> tuple[int, int, str]:
    """Sort key in the order of the forward pass: emb, layers.0.…, the final norm, head."""
    kinds = ["norm", "qk", "vo", "attn", "router", "ffn"]
    parts = block.split(".")
    if parts[0] == "layers" and len(parts) > 2 and parts[1].isdecimal():
        kind = kinds.index(parts[2]) if parts[2] in kinds else len(kinds)
        return 1 + int(parts[1]), kind, block
    last = {"emb": 0, "norm": 10**9, "head": 10**9 + 1}
    return last.get(block, 10**9 - 1), 0, block


def _ratio(hits: np.ndarray, total: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 0, hits / total, np.nan)
