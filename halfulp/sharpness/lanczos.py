"""The largest eigenvalue of the Hessian of each block type, by Lanczos' method.

Every new vector is made orthogonal to all earlier ones, twice: in finite precision the three-term
recurrence alone finds the same eigenvalue again and again (Golub and Van Loan, §10.3).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfulp.errors import NonFiniteError
from halfulp.sharpness.hessian import Hessian

MOST_STEPS = 32
TOLERANCE = 1e-2


@dataclass(frozen=True, kw_only=True)
class Eigenvalue:
    """The largest Ritz value: never above the largest eigenvalue, and within `residual` of one.

    `steps`: products that it took. The error is of the order residual² / gap to the next one.
    """

    value: float
    residual: float
    steps: int

    @property
    def converged(self) -> bool:
        """Whether the residual is within TOLERANCE of the value."""
        return self.residual <= TOLERANCE * abs(self.value)


def largest_eigenvalue(
    product: Callable[[Tensor], Tensor], start: Tensor, *,
    steps: int = MOST_STEPS, tolerance: float = TOLERANCE,
) -> Eigenvalue:  # fmt: skip
    """Of the symmetric matrix behind `product`, algebraically largest; `start` [n] is any vector.

    Stops when the residual is within `tolerance` of the value, or after `steps` products. Raises
    NonFiniteError for a product that is not finite.
    """
    steps = min(steps, start.numel())
    basis = start.new_zeros(steps, start.numel())
    basis[0] = start / torch.linalg.vector_norm(start)
    projected = torch.zeros(steps, steps, dtype=torch.float64)
    value = residual = 0.0
    for k in range(steps):
        w = product(basis[k])
        projected[k, k] = torch.dot(w, basis[k]).item()
        if not math.isfinite(projected[k, k]):
            raise NonFiniteError(
                "a Hessian-vector product is not finite: a second derivative overflowed. Measure "
                "in fp64 (model.double()), or leave the batch out."
            )
        for _ in range(2):
            w = w - basis[: k + 1].T @ (basis[: k + 1] @ w)
        norm = torch.linalg.vector_norm(w).item()
        values, vectors = torch.linalg.eigh(projected[: k + 1, : k + 1])
        value, residual = values[-1].item(), norm * abs(vectors[-1, -1].item())
        if k + 1 == steps or residual <= tolerance * abs(value):
            return Eigenvalue(value=value, residual=residual, steps=k + 1)
        projected[k, k + 1] = projected[k + 1, k] = norm
        basis[k + 1] = w / norm
    raise AssertionError("start has no elements")


def eigenvalues(
    hessian: Hessian, *, generator: torch.Generator,
    steps: int = MOST_STEPS, tolerance: float = TOLERANCE,
) -> dict[str, Eigenvalue]:  # fmt: skip
    """The largest eigenvalue of the Hessian's diagonal block of each block type."""
    groups: dict[str, list[int]] = {}
    for i, piece in enumerate(hessian.pieces):
        groups.setdefault(piece.kind, []).append(i)
    found = {}
    for kind, members in groups.items():
        like = hessian.parameters[hessian.pieces[members[0]].parameter]
        size = sum(hessian.pieces[i].numel for i in members)
        start = torch.randn(size, generator=generator, device=generator.device).to(like)
        found[kind] = largest_eigenvalue(
            on_vectors(hessian, members), start, steps=steps, tolerance=tolerance
        )
    return found


def on_vectors(hessian: Hessian, members: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """The Hessian's block at the pieces `members` as a product with flat vectors."""
    pieces = [hessian.pieces[i] for i in members]
    shapes = [p.of(hessian.parameters[p.parameter]).shape for p in pieces]

    def product(v: Tensor) -> Tensor:
        parts = v.split([p.numel for p in pieces])
        vectors = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return torch.cat([h.flatten() for h in hessian.product(members, vectors)])

    return product
