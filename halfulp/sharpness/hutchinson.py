"""Traces of the exact Hessian's blocks by random probes (Hutchinson 1990).

With independent signs v, E vᵀ H v = tr H, and the part of the sum at a piece is an estimate of that
piece's own trace. Its variance holds every entry of H that joins the piece to another one under the
same probe: a small block drowns in its neighbors' share, so those get a probe for themselves.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from halfulp.batch import Batch
from halfulp.pieces import Piece
from halfulp.sharpness.first_order import turns
from halfulp.sharpness.hessian import Hessian, signs_like

# Of the model's parameters: block types below get probes of their own. With 0.01 a draw costs a
# third on small trained models, but queries and keys need ten times the draws.
SMALL = 0.2


def probe_groups(pieces: Sequence[Piece]) -> list[list[int]]:
    """Which pieces share a probe: those of all large block types, and those of each small one.

    Every piece is in exactly one group.
    """
    sizes: dict[str, int] = {}
    for piece in pieces:
        sizes[piece.kind] = sizes.get(piece.kind, 0) + piece.numel
    limit = SMALL * sum(sizes.values())
    groups: dict[str, list[int]] = {}
    for i, piece in enumerate(pieces):
        small = sizes[piece.kind] < limit
        groups.setdefault(piece.kind if small else "", []).append(i)
    return list(groups.values())


def probes(
    model: nn.Module, batches: Sequence[Batch], pieces: Sequence[Piece], *,
    draws: int, generator: torch.Generator,
) -> Iterator[tuple[Tensor, int]]:  # fmt: skip
    """(vᵀ H v of each piece [pieces], fp64; positions) of each of `draws` draws.

    A draw is one product per group of `probe_groups`, so that it tells something of every piece.
    Batches take turns, and the first product is checked against a difference of gradients. Use
    within `twice_differentiable`; raises what Hessian raises.
    """
    groups = probe_groups(pieces)
    for n, (batch, count) in enumerate(turns(batches, draws)):
        hessian = Hessian(model, batch, pieces)
        if n == 0:
            hessian.check(generator)
        for _ in range(count):
            values = torch.zeros(len(pieces), dtype=torch.float64)
            for members in groups:
                values[members] = probe(hessian, members, generator)
            yield values, hessian.positions


def probe(hessian: Hessian, members: Sequence[int], generator: torch.Generator) -> Tensor:
    """vᵀ H v of each of the pieces `members`, fp64, under one probe of all of them."""
    views = [hessian.pieces[i].of(hessian.parameters[hessian.pieces[i].parameter]) for i in members]
    vectors = [signs_like(view, generator) for view in views]
    found = hessian.product(members, vectors)
    sums = [(v * h).sum(dtype=torch.float64) for v, h in zip(vectors, found, strict=True)]
    return torch.stack(sums).cpu()
