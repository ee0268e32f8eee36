"""A model's weights under a format: their errors, the moments of stochastic ones, and putting them
in place for a measurement."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from halfulp.blocks import block_map
from halfulp.errors import CheckError, FormatError, NonFiniteError
from halfulp.formats import format_quantizer
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.format import Format
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to
from halfulp.pieces import Piece
from halfulp.sharpness.setup import check_finite


def weight_quantizer(word: str) -> Quantizer:
    """The quantizer that rounds a stored weight to `word` (a word of halfulp.formats).

    Raises FormatError for an unknown word, a rounding other than nearest, a transform, or a scale
    with a history.
    """
    q = format_quantizer(word)
    if q.hadamard or q.scale == "delayed" or q.rounding != "nearest":
        raise FormatError(
            f"format {word!r}: a stored weight has no transform and no scale with a history, and "
            "is forecast under nearest and stochastic rounding both. Give the format with a "
            "current scale and leave the rounding out, such as e4m3 or int4@1x32:current."
        )
    return q


@dataclass(frozen=True)
class Weights:
    """The parameters of a model by name, and which of them store the reduction dimension first.

    Rows and blocks that share a scale run along the reduction dimension: the last one, but the
    first of a product's weight stored as [in, out] (transformers' Conv1D).
    """

    tensors: Mapping[str, nn.Parameter]
    transposed: frozenset[str]

    @classmethod
    def of(cls, model: nn.Module, hints: Mapping[str, str] | None = None) -> "Weights":
        """Raises CheckError for dtypes other than fp32 and fp64, NonFiniteError for inf or NaN."""
        tensors = dict(model.named_parameters())
        for name, p in tensors.items():
            if p.dtype not in (torch.float32, torch.float64):
                raise CheckError(
                    f"{name} is {p.dtype}; the effect of rounding is measured on fp32 or fp64 "
                    "weights, which can hold the rounded values. Convert the model: model.float()."
                )
        check_finite(tensors)
        modules = {g.module for g in block_map(model, hints).gemms}
        found = set()
        for module in modules:
            weight = tensors.get(name := f"{module}.weight")
            plain = isinstance(model.get_submodule(module), nn.Linear)
            if weight is not None and weight.ndim == 2 and not plain:
                found.add(name)
        return cls(tensors, frozenset(found))

    def rounded(self, name: str, q: Quantizer, key: Key | None = None) -> Tensor:
        """Q(w) in the shape and dtype of the parameter; stochastic where a `key` is given.

        NonFiniteError where the format overflows.
        """
        w = self._oriented(name)
        if key is not None:
            q = replace(q, rounding="stochastic")
        y = w if q.is_identity else apply_quantizer(w, q, key=key)
        if not bool(torch.isfinite(y).all()):
            raise NonFiniteError(
                f"{name} reaches {w.abs().max().item():.3g}, beyond {q}. Give a format with a "
                "current scale, or a wider one."
            )
        return self._back(name, y).to(self.tensors[name].dtype)

    def error(self, name: str, q: Quantizer) -> Tensor:
        """Q(w) − w under nearest rounding, in the shape and dtype of the parameter."""
        return self.rounded(name, q).sub_(self.tensors[name].detach())

    def moments(self, name: str, q: Quantizer) -> tuple[Tensor, Tensor]:
        """(E e, E e²) of the error e of stochastic rounding, fp32, shaped like the parameter."""
        mean, square = stochastic_moments(self._oriented(name), q)
        return self._back(name, mean), self._back(name, square)

    def _oriented(self, name: str) -> Tensor:
        w = self.tensors[name].detach().float()
        # A copy in any case: the kernels want contiguous memory, and callers write into results.
        return (w.mT if name in self.transposed else w).clone(memory_format=torch.contiguous_format)

    def _back(self, name: str, x: Tensor) -> Tensor:
        return x.mT if name in self.transposed else x


def stochastic_moments(x: Tensor, q: Quantizer) -> tuple[Tensor, Tensor]:
    """(E e, E e²) of e = Q(x) − x under stochastic rounding of `x` (fp32) by `q`.

    Between two grid points lo ≤ x ≤ hi the mean is 0 and the variance (x − lo)(hi − x), in the
    units of x; beyond the largest value the error is certain.
    """
    one = torch.ones((), device=x.device)
    s, inverse = (one, one) if q.scale == "none" else scales(x, q)
    scaled = (x * s).abs()
    low = round_to(scaled, q.format, rounding="truncate", saturate=True)
    high = (low + spacing(scaled, q.format)).clamp_(max=q.format.largest)
    up, down = (high - scaled) * inverse, (low - scaled) * inverse
    beyond = scaled > q.format.largest
    square = torch.where(beyond, down.square(), -up * down)
    return torch.where(beyond, down * x.sign(), 0.0), square


def spacing(magnitude: Tensor, fmt: Format) -> Tensor:
    """Distance from the grid point at or below each |x| (fp32) to the next."""
    exponent = torch.frexp(magnitude)[1] - 1
    exponent = exponent.clamp(min=fmt.smallest_exponent)
    return torch.ldexp(torch.ones_like(magnitude), exponent - fmt.mantissa_bits)


@contextmanager
def in_place(
    weights: Weights, parts: Sequence[Piece], q: Quantizer | Mapping[str, Quantizer],
    *, key: Key | None = None,
) -> Iterator[Mapping[str, Tensor]]:  # fmt: skip
    """Inside, the elements of `parts` are rounded by `q` (one, or one per parameter).

    Yields the parameters as they were before.

    Whatever happens inside, the parameters are bit for bit what they were afterwards.
    """
    kept: dict[str, Tensor] = {}
    try:
        for name in dict.fromkeys(p.parameter for p in parts):
            used = q if isinstance(q, Quantizer) else q[name]
            draw = None if key is None else key.fold(_number(name))
            y = weights.rounded(name, used, draw)
            parameter = weights.tensors[name].detach()
            kept[name] = parameter.clone()
            for piece in parts:
                if piece.parameter == name:
                    piece.of(parameter).copy_(piece.of(y))
        yield kept
    finally:
        for name, before in kept.items():
            weights.tensors[name].detach().copy_(before)


def _number(name: str) -> int:
    return Key.of(0, name).k0
