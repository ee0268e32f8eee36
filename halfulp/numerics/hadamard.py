"""The random Hadamard transform that spreads outliers over a block before quantization.

H = diag(±1) · H_d / √d is orthonormal, so (x H)(w H)ᵀ = x wᵀ: transforming both operands of a GEMM
along K leaves the exact product alone. One fixed sign vector serves everything (NVFP4 recipe).
"""

from functools import cache

import torch
from torch import Tensor

from halfulp.errors import FormatError
from halfulp.numerics.random import Key, words

_SIGNS = Key.of(0, "hadamard")


@cache
def hadamard_matrix(d: int, device: torch.device | str = "cpu") -> Tensor:
    """H, fp32 [d, d], orthonormal; `d` a power of two up to 128."""
    return _matrix(d, device)


def _matrix(d: int, device: torch.device | str) -> Tensor:
    """Computed where it is used: a copy from the CPU would make the host wait."""
    i = torch.arange(d, dtype=torch.int32, device=device)
    parity = i[:, None] & i
    for bits in (4, 2, 1):
        parity = parity ^ (parity >> bits)
    signs = torch.where(words(i, _SIGNS.k0, _SIGNS.k1) < 0, 1.0, -1.0)
    return signs[:, None] * torch.where((parity & 1) == 1, -1.0, 1.0) * d**-0.5


def hadamard(x: Tensor, d: int) -> Tensor:
    """`x` [..., K] with each run of `d` along K multiplied by H.

    Raises FormatError when K is not a multiple of `d`.
    """
    if x.shape[-1] % d:
        raise FormatError(
            f"hadamard({d}) needs a contraction length that is a multiple of {d}; found "
            f"{x.shape[-1]}. Change the batch or layer size, or a recipe without the transform."
        )
    blocks = x.unflatten(-1, (-1, d))
    if x.is_cpu:
        return (blocks @ hadamard_matrix(d)).flatten(-2)
    matrix = _matrix if torch.compiler.is_compiling() else hadamard_matrix
    return _in_order(blocks, matrix(d, x.device)).flatten(-2)


def _in_order(blocks: Tensor, matrix: Tensor) -> Tensor:
    """The product as GEMMs on a CPU sum it: term by term, each added with one rounding."""
    total = torch.zeros_like(blocks)
    for k, row in enumerate(matrix.unbind()):
        total = torch.addcmul(total, blocks[..., k : k + 1], row)
    return total
