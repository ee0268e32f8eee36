"""Sums over the errors e = Q(x) − x of one tensor, for many formats, in one pass over its rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfulp.errors import FormatError
from halfulp.formats import format_quantizer
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.scaling import scale_of

_CHUNK = 1 << 16  # elements: x, g and e of a chunk stay in the second-level cache


@dataclass(frozen=True)
class Rounding:
    """One format at work: the quantizer, and how to apply it to a part of a tensor.

    "element": each element alone; "tensor": with the scale of the whole tensor, given; "row":
    scales do not reach beyond a row; "whole": only the whole tensor at once.
    """

    word: str
    quantizer: Quantizer
    reach: str
    part: Quantizer  # the quantizer of a part

    @classmethod
    def of(cls, word: str) -> "Rounding":
        """Raises FormatError for an unknown word, a transform, or a scale with a history."""
        q = format_quantizer(word)
        if q.hadamard or q.scale == "delayed":
            raise FormatError(
                f"format {word!r}: prices are of one rounding of a tensor as it stands; transforms "
                "and delayed scales are not priced. Ask for it with a current scale, and measure "
                "the recipe with a target run."
            )
        if q.scale in ("none", "static"):
            return cls(word, q, "element", q)
        if q.granularity == "tensor" and q.scale == "current":
            given = replace(q, scale="delayed", power_of_two=False, margin=0, history=1)
            return cls(word, q, "tensor", given)
        rowwise = q.tile[0] == 1 and q.scale != "nvfp4"
        return cls(word, q, "row" if rowwise else "whole", q)

    def overflows(self, amax: float) -> bool:
        """Whether a tensor of this largest magnitude becomes inf somewhere."""
        q = self.quantizer
        middle = q.format.largest * (1 + q.format.unit_roundoff / 2)
        return self.reach == "element" and not q.saturate and amax * q.static_scale > middle


@dataclass
class Sums:
    """Sums over the rows of one tensor, per format; fp64."""

    elements: Tensor  # [formats] Σ (ge)²
    rows: Tensor  # [formats] Σ_rows (Σ ge)²
    total: Tensor  # [formats] Σ ge
    parts: Tensor | None  # [2, formats, rows or heads]: Σ (ge)² and (Σ ge)² of each row, or head


@dataclass
class Side:
    """What errors do besides their price, on a sample of rows; [formats] fp64."""

    stochastic: Tensor  # Σ g² e² under stochastic rounding, over Σ (ge)²
    shrinkage: Tensor  # Σ ex / Σ x²
    flushed: Tensor  # share of nonzero elements that became zero
    saturated: Tensor  # share of all elements beyond the largest value


def tensor_scales(roundings: Sequence[Rounding], amax: Tensor) -> list[Tensor | None]:
    """The scale that each format with one scale per tensor takes for a tensor of `amax` (fp32)."""
    bits = amax.float().reshape(()).view(torch.int32)
    return [scale_of(bits, r.quantizer)[0] if r.reach == "tensor" else None for r in roundings]


def whole_parts(x: Tensor, roundings: Sequence[Rounding]) -> dict[int, Tensor]:
    """Q(x) of the formats whose scales look beyond a row; `x` [m, n]."""
    x = x.float() if any(r.reach == "whole" for r in roundings) else x
    return {
        i: apply_quantizer(x, r.quantizer, key=Key.of(0, r.word))
        for i, r in enumerate(roundings)
        if r.reach == "whole"
    }


def round_part(
    x: Tensor, r: Rounding, scale: Tensor | None, out: Tensor, key: Key | None = None
) -> Tensor:
    """Q(x) of rows `x` [m, n] fp32 in `out`."""
    q = r.part
    if key is not None:
        q = replace(q, rounding="stochastic")
    elif q.stochastic:
        key = Key.of(0, r.word)
    return apply_quantizer(x, q, scale=scale, out=out, key=key)


def error_sums(
    x: Tensor,
    g: Tensor,
    roundings: Sequence[Rounding],
    scales_of: Sequence[Tensor | None],
    *,
    wholes: Mapping[int, Tensor],
    per_row: bool,
) -> Sums:
    """Sums over rows `x`, `g` [m, n] (contiguous, one dtype) for every format.

    `wholes`: Q(x) of the formats that need the whole tensor at once. `per_row` keeps the sums of
    each row.
    """
    m, n = x.shape
    step = max(1, _CHUNK // n)
    row = torch.empty(len(roundings), m, dtype=x.dtype, device=x.device)
    squares = torch.empty_like(row) if per_row else None
    elements = [0.0] * len(roundings)
    buffer = torch.empty(min(step, m), n, dtype=torch.float32, device=x.device)
    for start in range(0, m, step):
        stop = min(start + step, m)
        xs, gs, out = x[start:stop], g[start:stop], buffer[: stop - start]
        x32 = xs.float()
        for i, r in enumerate(roundings):
            y = wholes[i][start:stop] if i in wholes else round_part(x32, r, scales_of[i], out)
            p = torch.sub(y, xs, out=out) if y.dtype == xs.dtype else y.to(xs.dtype).sub_(xs)
            p.mul_(gs)
            torch.sum(p, 1, out=row[i, start:stop])
            if squares is None:
                elements[i] += torch.dot(p.view(-1), p.view(-1)).item()
            else:
                torch.sum(p.square_(), 1, out=squares[i, start:stop])
    row = row.double().cpu()
    parts = None if squares is None else torch.stack([squares.double().cpu(), row.square()])
    if parts is not None:
        elements = parts[0].sum(1).tolist()
    return Sums(
        elements=torch.tensor(elements, dtype=torch.float64),
        rows=row.square().sum(1),
        total=row.sum(1),
        parts=parts,
    )


def side_sums(
    x: Tensor,
    g: Tensor,
    roundings: Sequence[Rounding],
    scales_of: Sequence[Tensor | None],
    *,
    wholes: Mapping[int, Tensor],
    key: Key,
) -> Side:
    """Shares over rows `x`, `g` [m, n] (contiguous, one dtype) for every format."""
    x32 = x.float()
    xx, nonzero = _dot(x, x), float(torch.count_nonzero(x))
    table = torch.zeros(4, len(roundings), dtype=torch.float64)
    for i, r in enumerate(roundings):
        y = wholes[i] if i in wholes else round_part(x32, r, scales_of[i], torch.empty_like(x32))
        flushed = nonzero - float(torch.count_nonzero(y))
        e = y.to(x.dtype) - x
        shrinkage = _dot(e, x) / max(xx, 1e-300)
        nearest = _dot(e.mul_(g), e)
        ratio = 2.0
        if i not in wholes and nearest > 0:
            y = round_part(x32, r, scales_of[i], torch.empty_like(x32), key.fold(i))
            e = y.to(x.dtype).sub_(x).mul_(g)
            ratio = _dot(e, e) / nearest
        saturated = _saturated(x32, r) / max(x.numel(), 1)
        table[:, i] = torch.tensor([ratio, shrinkage, flushed / max(nonzero, 1.0), saturated])
    return Side(*table)


def _dot(a: Tensor, b: Tensor) -> float:
    return torch.dot(a.view(-1), b.view(-1)).item()


def _saturated(x: Tensor, r: Rounding) -> float:
    """How many elements lie beyond the largest value of the scaled format."""
    q = r.quantizer
    if r.reach == "tensor" or q.scale == "e8m0_up" or q.format.exponent_bits == 8:
        return 0.0  # scales from the present amax leave nothing beyond the largest value
    top = q.format.largest * (1 + 2.0**-20)
    if q.scale == "none" and not float(x.abs().amax()) > q.format.largest:
        return 0.0
    s = scales(x, q)[0] if q.scale != "none" else 1.0
    return float((x.abs() * s > top).sum())
