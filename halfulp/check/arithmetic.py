"""What one rounding can do: unit roundoff, underflow and overflow, and sums made of roundings.

fl(a op b) = (a op b)(1 + d) + t with |d| ≤ u / (1 + u), |t| ≤ h and d t = 0, as long as the result
stays below x_max; t = 0 for sums of numbers of the format.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from halfulp.errors import FormatError
from halfulp.numerics.format import Format, get_format


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """Round-to-nearest in one format: `u` unit roundoff, `h` half the smallest step, `x_max`."""

    name: str
    u: float
    h: float
    x_max: float

    @classmethod
    def of(cls, fmt: Format | str) -> "Arithmetic":
        """The arithmetic of a floating-point format.

        Raises FormatError for integers: their errors are absolute and need a scale.
        """
        fmt = get_format(fmt) if isinstance(fmt, str) else fmt
        if fmt.is_int:
            raise FormatError(
                f"bounds are about floating-point arithmetic; found {fmt}, whose step is the same "
                "everywhere. Give a format such as bf16 or e4m3."
            )
        half = fmt.smallest_subnormal / 2
        return cls(name=fmt.name, u=fmt.unit_roundoff, h=half, x_max=fmt.largest)

    def up(self, n: float) -> float:
        """(1 + u)^n: the most that n roundings can enlarge a positive number."""
        return math.exp(min(n * math.log1p(self.u), 700.0))

    def down(self, n: float) -> float:
        """(1 − u)^n: the least that n roundings leave of it."""
        return math.exp(n * math.log1p(-self.u))

    def growth(self, n: float) -> float:
        """(1 + u)^n − 1, valid for every n (n u / (1 − n u) is not)."""
        return math.expm1(min(n * math.log1p(self.u), 700.0))


EXACT = Arithmetic(name="exact", u=0.0, h=0.0, x_max=math.inf)


class Bounded(NamedTuple):
    """A reference value in fp64 and how far a computed value can be from it, componentwise.

    `error` has the shape of `value`; inf means that nothing can be promised (overflow).
    """

    value: Tensor
    error: Tensor


def exact(x: Tensor) -> Bounded:
    """`x`, known without error."""
    value = x.detach().double()
    return Bounded(value, torch.zeros_like(value))


def stored(x: Tensor, arithmetic: Arithmetic) -> Bounded:
    """`x` after it was rounded to the format: what a low-precision copy of a parameter holds."""
    return rounded(exact(x), arithmetic)


def rounded(y: Bounded, out: Arithmetic | None) -> Bounded:
    """`y` after one more rounding, that of storing it; None stores nothing."""
    if out is None:
        return y
    reach = y.value.abs() + y.error
    error = y.error + (out.u * reach).clamp(min=out.h)
    return guarded(y.value, error, reach * (1 + out.u) + out.h < out.x_max)


def guarded(value: Tensor, error: Tensor, fits: Tensor) -> Bounded:
    """The bound where `fits` holds, inf elsewhere: what overflows has no error bound."""
    return Bounded(value, torch.where(fits & ~error.isnan(), error, math.inf))


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """How the n terms of a dot product are added up.

    * `order`: "any" (n roundings reach a term at most: sequential, with or without FMA, or any
      other tree), "pairwise", or "blocked": sums of `block` terms, then the sum of these sums in
      the arithmetic `between` (default: the same).
    * `exact_products`: the products need no rounding (bf16 or fp8 operands in an fp32 accumulator).
    """

    arithmetic: Arithmetic
    order: str = "any"
    block: int = 0
    between: Arithmetic | None = None
    exact_products: bool = False

    def __post_init__(self) -> None:
        if self.order not in ("any", "pairwise", "blocked"):
            raise FormatError(f"order {self.order!r} is unknown. Use any, pairwise or blocked.")
        if (self.order == "blocked") != (self.block > 0):
            raise FormatError(
                f"order {self.order!r} with block = {self.block}: blocks belong to order "
                "'blocked', and to it only."
            )

    def relative(self, n: int) -> float:
        """Bound of |computed − exact| over sum |a_k b_k|, barring underflow."""
        a, skip = self.arithmetic, 1 if self.exact_products else 0
        if self.order == "any":
            # n u without any restriction on n: Jeannerod and Rump (2013).
            return max(n - skip, 0) * a.u
        if self.order == "pairwise":
            return a.growth(math.ceil(math.log2(max(n, 1))) + 1 - skip)
        inside = a.up(min(self.block, n) - skip)
        return inside * (self.between or a).up(math.ceil(n / self.block) - 1) - 1

    def reach(self, n: int) -> float:
        """Bound of any intermediate sum over sum |a_k b_k|."""
        a = self.arithmetic
        return a.up(n) * (self.between.up(n) if self.between else 1.0)

    def flushed(self, n: int) -> float:
        """Absolute error of n products that underflow."""
        return n * self.arithmetic.h * (1 + self.relative(n))

    @property
    def x_max(self) -> float:
        """Beyond it a sum overflows."""
        wide = self.between.x_max if self.between else math.inf
        return min(self.arithmetic.x_max, wide)
