"""Sums over the errors e = Q(x) − x of one tensor, for many formats, in one pass over its rows."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfulp.check.formats import format_quantizer
from halfulp.errors import FormatError
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


@dataclass
class Sums:
    """Sums over one tensor, per format: fp64 [formats], or [formats, rows] for `of_rows`."""

    elements: Tensor  # Σ (ge)²
    rows: Tensor  # Σ_rows (Σ ge)²
    total: Tensor  # Σ ge
    stochastic: Tensor  # Σ g² e² under stochastic rounding
    ex: Tensor  # Σ ex
    saturated: Tensor  # elements
    flushed: Tensor  # elements
    xx: float = 0.0
    nonzero: float = 0.0
    of_rows: Tensor | None = None  # [2, formats, rows]: Σ (ge)² and (Σ ge)² of each row

    @classmethod
    def zeros(cls, formats: int) -> "Sums":
        new = (torch.zeros(formats, dtype=torch.float64) for _ in range(7))
        elements, rows, total, stochastic, ex, saturated, flushed = new
        return cls(elements, rows, total, stochastic, ex, saturated, flushed)


def tensor_scales(roundings: Sequence[Rounding], amax: Tensor) -> list[Tensor | None]:
    """The scale that each format with one scale per tensor takes for a tensor of `amax` (fp32)."""
    bits = amax.float().reshape(()).view(torch.int32)
    return [scale_of(bits, r.quantizer)[0] if r.reach == "tensor" else None for r in roundings]


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
    full: bool,
    per_row: bool,
    key: Key,
) -> Sums:
    """Sums over rows `x`, `g` [m, n] (contiguous, one dtype) for every format.

    `full` adds what needs no gradient, and stochastic rounding on a quarter of the rows (scaled
    up, so unbiased). `per_row` keeps the sums of each row.
    """
    sums = Sums.zeros(len(roundings))
    if per_row:
        sums.of_rows = torch.zeros(2, len(roundings), len(x), dtype=torch.float64)
    wholes = {
        i: apply_quantizer(x.float(), r.quantizer, key=Key.of(0, r.word))
        for i, r in enumerate(roundings)
        if r.reach == "whole"
    }
    step = max(1, _CHUNK // x.shape[1])
    starts = range(0, len(x), step)
    drawn = _draws(len(starts), key)
    buffer = torch.empty(min(step, len(x)), x.shape[1], dtype=torch.float32)
    for number, start in enumerate(starts):
        xs, gs = x[start : start + step], g[start : start + step]
        x32, out = xs.float(), buffer[: len(xs)]
        if full:
            sums.xx += torch.dot(xs.view(-1), xs.view(-1)).item()
            sums.nonzero += torch.count_nonzero(xs).item()
        for i, r in enumerate(roundings):
            if i in wholes:
                y = out.copy_(wholes[i][start : start + step])
            else:
                y = round_part(x32, r, scales_of[i], out)
            if full:
                _add_ranges(sums, i, r, x32, y, scales_of[i])
            p = y.to(xs.dtype).sub_(xs)
            if full:
                sums.ex[i] += torch.dot(p.view(-1), xs.view(-1)).item()
            _add_products(sums, i, p.mul_(gs), start)
            if full and number in drawn and r.reach != "whole":
                y = round_part(x32, r, scales_of[i], out, key.fold(number).fold(i))
                p = (
                    y.sub_(x32).mul_(gs)
                    if y.dtype == gs.dtype
                    else y.to(gs.dtype).sub_(xs).mul_(gs)
                )
                square = torch.dot(p.view(-1), p.view(-1)).item()
                sums.stochastic[i] += square * len(starts) / len(drawn)
    for i in wholes:
        sums.stochastic[i] = 2 * sums.elements[i]
    return sums


def _draws(count: int, key: Key) -> set[int]:
    """A random quarter of the chunks; all of a few."""
    if count < 8:
        return set(range(count))
    return set(range(key.k0 % 4, count, 4))


def _add_products(sums: Sums, i: int, p: Tensor, start: int) -> None:
    """`p` = g e of some rows [m, n]; overwritten."""
    rows = p.sum(1).double()
    sums.total[i] += rows.sum()
    if sums.of_rows is None:
        sums.rows[i] += torch.dot(rows, rows)
        sums.elements[i] += torch.dot(p.view(-1), p.view(-1))
        return
    elements = p.square_().sum(1).double()
    squares = rows.square()
    sums.of_rows[0, i, start : start + len(p)] = elements
    sums.of_rows[1, i, start : start + len(p)] = squares
    sums.rows[i] += squares.sum()
    sums.elements[i] += elements.sum()


def _add_ranges(
    sums: Sums, i: int, r: Rounding, x: Tensor, y: Tensor, scale: Tensor | None
) -> None:
    """Count what `y` = Q(x) saturated and flushed; overflow to inf keeps no error."""
    sums.flushed[i] -= torch.count_nonzero(y).item()
    q = r.quantizer
    if r.reach == "tensor" or q.scale == "e8m0_up" or q.format.exponent_bits == 8:
        return  # scales from the present amax leave nothing beyond the largest value
    top = q.format.largest * (1 + 2.0**-20)
    if q.scale == "none" and not float(x.abs().amax()) > q.format.largest:
        return
    s = scales(x, q)[0] if q.scale != "none" else 1.0
    sums.saturated[i] += (x.abs() * s > top).sum().item()
