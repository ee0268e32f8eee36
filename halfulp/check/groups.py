"""What a plan decides: GEMMs, tables or stored tensors, with their prices and sizes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from halfulp.block_names import block_type, globbed
from halfulp.blocks import BlockMap
from halfulp.check.prices import Prices
from halfulp.check.sites import SiteInfo
from halfulp.errors import CheckError


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tensors that share one format: both operands of a GEMM, a table, or one stored tensor.

    `name` is the GEMM's, a block's ("emb", "layers.0.norm") for a table, or a site's. `kind` names
    its likes: "layers.*.ffn.down_proj", "scores". `role` is the GEMM's role, "embed" or "norm" for
    a table, "stored" for a site. `size` is what its bits weigh: its elements, or multiply-adds.
    `prices`: format → nats per token; NaN is unknown, inf overflows.
    """

    name: str
    block: str
    kind: str
    role: str
    size: float
    prices: Mapping[str, float]


def gemm_groups(prices: Prices, blocks: BlockMap, *, weigh: str = "elements") -> tuple[Group, ...]:
    """One group per GEMM of the block map: the sum of the prices of its forward operands.

    `weigh`: "elements" of both operands, or "macs", the multiply-adds of one forward pass, which
    follow the time that the GEMM takes. Raises CheckError when `prices` has no operand sites.
    """
    if weigh not in ("elements", "macs"):
        raise CheckError(f"weigh = {weigh!r} is unknown. Give 'elements' or 'macs'.")
    found: dict[str, list[int]] = {}
    for i, site in enumerate(prices.sites):
        if site.family == "operand":
            found.setdefault(site.gemm, []).append(i)
    roles = {gemm.name: gemm for gemm in blocks.gemms}
    if not found.keys() & roles.keys():
        raise CheckError(
            "these prices have no operand sites of the model's GEMMs, so that there is nothing to "
            "plan. Price the operand family of the same model."
        )
    return tuple(
        _group(prices, found[name], name, gemm.block, globbed(name), gemm.role, _SIZES[weigh])
        for name, gemm in roles.items()
        if name in found
    )


def table_groups(prices: Prices) -> tuple[Group, ...]:
    """One group per block of embedding tables or norm parameters, as recipes round them.

    A tied table is priced with both of its uses; the policy rounds the look-up only.
    """
    found: dict[str, list[int]] = {}
    for i, site in enumerate(prices.sites):
        if site.op == "parameter" and block_type(site.block) in ("emb", "norm"):
            found.setdefault(site.block, []).append(i)
    return tuple(
        _group(prices, rows, block, block, globbed(block), role, _elements)
        for block, rows in found.items()
        for role in ({"emb": "embed", "norm": "norm"}[block_type(block)],)
    )


def stored_groups(prices: Prices) -> tuple[Group, ...]:
    """One group per tensor that a low-precision program stores."""
    return tuple(
        _group(prices, [i], site.name, site.block, site.kind, "stored", _elements)
        for i, site in enumerate(prices.sites)
        if site.family == "stored"
    )


def _group(
    prices: Prices,
    rows: Sequence[int],
    name: str,
    block: str,
    kind: str,
    role: str,
    size: Callable[[Sequence[SiteInfo]], float],
) -> Group:
    total = prices.kl[list(rows)].sum(0).tolist()
    return Group(
        name=name,
        block=block,
        kind=kind,
        role=role,
        size=size([prices.sites[i] for i in rows]),
        prices=dict(zip(prices.formats, total, strict=True)),
    )


def _elements(sites: Sequence[SiteInfo]) -> float:
    return float(sum(math.prod(site.shape) for site in sites))


def _multiply_adds(sites: Sequence[SiteInfo]) -> float:
    """Elements of x [..., M, K] times N of w [..., N, K]."""
    shapes = {site.operand: site.shape for site in sites}
    return float(math.prod(shapes["x"]) * shapes["w"][-2])


_SIZES = {"elements": _elements, "macs": _multiply_adds}
