"""Tables of a check: costly sites, blocks × formats, and everything about each site."""

import math
from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from halfulp.check.detect import Finding
from halfulp.check.prices import Prices
from halfulp.check.reasons import reason
from halfulp.check.report import SiteDetail, SiteRow
from halfulp.check.survey import Survey
from halfulp.formats import format_bits

TOP_SITES, TOP_CHANGES = 20, 5


def costliest(
    prices: Prices,
    names: Sequence[str],
    focus: str,
    seen: Survey,
    *,
    formats: Sequence[str],
    budget: float,
) -> tuple[SiteRow, ...]:
    """The twenty sites of `names` with the highest price in the format `focus`."""
    column = prices.kl[:, prices.formats.index(focus)]
    found = {s.info.name: s for s in seen.sites}
    members = [prices.index(n) for n in names]
    priced = [i for i in members if column[i] == column[i]]
    total = math.fsum(column[i].item() for i in priced) or math.nan
    widest = sorted(formats, key=format_bits, reverse=True)
    rows, cumulative = [], 0.0
    for i in sorted(priced, key=lambda i: -column[i].item())[:TOP_SITES]:
        kl, site = column[i].item(), prices.sites[i]
        cumulative += kl
        over = [w for w in widest if prices.kl[i, prices.formats.index(w)] > budget]
        rows.append(
            SiteRow(
                name=site.name,
                block=site.block,
                kind=site.kind,
                kl=kl,
                share=kl / total,
                cumulative=cumulative / total,
                crosses=over[0] if over else "",
                reason=reason(prices, i, focus, found.get(site.name)),
            )
        )
    return tuple(rows)


def findings_of(
    findings: Sequence[Finding], names: Collection[str], formats: Collection[str]
) -> tuple[Finding, ...]:
    """Those about the named sites and formats, and those that are about no format."""
    return tuple(f for f in findings if not f.format or (f.site in names and f.format in formats))


def details(prices: Prices, formats: Sequence[str], seen: Survey) -> tuple[SiteDetail, ...]:
    """Everything about every priced site."""
    columns = {word: prices.formats.index(word) for word in formats}
    amaxes = {s.info.name: s.amax for s in seen.sites}

    def cells(table: Tensor, i: int) -> dict[str, float]:
        return {word: table[i, j].item() for word, j in columns.items()}

    return tuple(
        SiteDetail(
            name=site.name, family=site.family, block=site.block, kind=site.kind, op=site.op,
            shape=site.shape, amax=amaxes.get(site.name, math.nan), kl=cells(prices.kl, i),
            kl_stochastic=cells(prices.kl_stochastic, i), flushed=cells(prices.flushed, i),
            saturated=cells(prices.saturated, i), shrinkage=cells(prices.shrinkage, i),
            z=cells(prices.z, i), heads=_heads(prices, site.name, columns),
        )
        for i, site in enumerate(prices.sites)
    )  # fmt: skip


def _heads(prices: Prices, name: str, columns: Mapping[str, int]) -> dict[str, tuple[float, ...]]:
    if name not in prices.heads:
        return {}
    return {word: tuple(prices.heads[name][:, j].tolist()) for word, j in columns.items()}


def heat(
    prices: Prices, names: Collection[str], formats: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Block → format → sum of the prices of the named sites; unknown ones are left out."""
    kept, table = set(names), {}
    for i, site in enumerate(prices.sites):
        if site.name in kept:
            cells = table.setdefault(site.block, dict.fromkeys(formats, 0.0))
            for word in formats:
                kl = prices.kl[i, prices.formats.index(word)].item()
                cells[word] += kl if kl == kl else 0.0
    return table


def confidence(
    prices: Prices, names: Sequence[str], formats: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Lowest and highest total that a single probe gives."""
    members = [prices.index(n) for n in names]
    totals = prices.kl_probes[:, members].nan_to_num(nan=0.0, posinf=math.inf).sum(1)
    columns = {word: totals[:, prices.formats.index(word)] for word in formats}
    return {word: (t.min().item(), t.max().item()) for word, t in columns.items()}


def keep_exact(prices: Prices, names: Sequence[str], focus: str) -> dict[str, float]:
    """What is left of the KL in `focus` when one kind stays exact: the five that buy most."""
    j, by_kind = prices.formats.index(focus), {}
    for n in names:
        i = prices.index(n)
        kl = prices.kl[i, j].item()
        by_kind[prices.sites[i].kind] = by_kind.get(prices.sites[i].kind, 0.0) + (
            kl if kl == kl else 0
        )
    total = math.fsum(by_kind.values())
    best = sorted(by_kind, key=lambda kind: -by_kind[kind])[:TOP_CHANGES]
    return {kind: total - by_kind[kind] for kind in best}
