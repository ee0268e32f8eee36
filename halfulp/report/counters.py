"""Counters boiled down: shares per block over time, the worst operand, and whether it is bad."""

import re
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
        "Share of the elements beyond the largest number of the scaled format. Each cell is the "
        "worst operand of the block. Tiles of N elements with a rounded scale saturate by design, "
        "up to a share of about 2/N.",
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
    """The operand with the largest share over all blocks, and the place where it is worst.

    The place is a GEMM, or for weights a block; `site` is one of its sites.
    """

    share: float
    place: str
    site: Site
    site_share: float
    operand: str
    steps: int
    sites: int


def overall(counts: Counts) -> Worst:
    """The operand with the largest pooled share over blocks and steps, and its worst place.

    Norms lead only if nothing else was counted: their few weights, all near 1, always stand still.
    """
    groups = _places(counts)
    operands = sorted({site.operand for site in counts.sites})
    hits, total = counts.hits.sum(axis=1), counts.total.sum(axis=1)
    members = {o: [i for i, s in enumerate(counts.sites) if s.operand == o] for o in operands}
    pooled = {o: float(_ratio(hits[m].sum(), total[m].sum())) for o, m in members.items()}
    operand = max(operands, key=lambda o: pooled[o])
    places = {
        place: float(_ratio(hits[rows].sum(), total[rows].sum()))
        for place, rows in groups.items()
        if place[2] == operand
    }
    matrices = [p for p in places if not p[0].endswith("norm")]
    top = max(matrices or places, key=lambda p: places[p])
    site = counts.sites[groups[top][0]]
    n = len(members[operand])
    return Worst(pooled[operand], top[1], site, places[top], operand, len(counts.steps), n)


_Place = tuple[str, str, str]  # block, name, operand


def _places(counts: Counts) -> dict[_Place, list[int]]:
    """Rows that are one place: a GEMM's operand, or all parameters of a block."""
    groups: dict[_Place, list[int]] = {}
    for i, site in enumerate(counts.sites):
        name = site.name if site.operand else site.block
        groups.setdefault((site.block, name, site.operand), []).append(i)
    return groups


def level(counter: Counter, share: float, form: str) -> str:
    """pass below the warning level, fail from the level to act on, could not tell between.

    Blocks of N that share a rounded scale saturate at their largest elements by design: a share
    of 2/N is still quiet.
    """
    tile = re.search(r"@(\d+)x(\d+)", form)
    warn, act = counter.warn, counter.act
    if counter.key == "saturation" and tile is not None:
        elements = int(tile[1]) * int(tile[2])
        warn, act = max(warn, 2 / elements), max(act, 8 / elements)
    if share >= act:
        return FAIL
    return UNKNOWN if share >= warn else PASS


@dataclass(frozen=True)
class Strip:
    """One counter of one run as a picture: `shares` [blocks, steps], nan where nothing was counted.

    Per block: the share of its worst place over the whole run, that place, and its level.
    """

    run: Record
    blocks: tuple[str, ...]
    steps: np.ndarray
    shares: np.ndarray
    pooled: np.ndarray
    places: tuple[str, ...]
    levels: tuple[str, ...]


def strip(record: Record, counter: Counter) -> Strip:
    """Per block and step the share of the worst place in the block."""
    counts = record.counters[counter.key]
    groups = _places(counts)
    blocks = tuple(sorted({site.block for site in counts.sites}, key=block_order))
    rows, worst, places, levels = [], [], [], []
    for block in blocks:
        mine = {p: g for p, g in groups.items() if p[0] == block}
        hits = np.array([counts.hits[g].sum(axis=0) for g in mine.values()])
        total = np.array([counts.total[g].sum(axis=0) for g in mine.values()])
        pooled = _ratio(hits.sum(axis=1), total.sum(axis=1))
        top = int(np.nanargmax(pooled))
        place = list(mine)[top]
        form = counts.sites[mine[place][0]].format
        rows.append(np.fmax.reduce(_ratio(hits, total), axis=0))
        worst.append(float(pooled[top]))
        places.append(" ".join(part for part in place[1:] if part))
        levels.append(level(counter, worst[-1], form))
    table = np.array(rows)
    return Strip(record, blocks, counts.steps, table, np.array(worst), tuple(places), tuple(levels))


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
