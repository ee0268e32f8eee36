"""The random Hadamard transform that spreads outliers over a block before quantization.

H = diag(±1) · H_d / √d is orthonormal, so (x H)(w H)ᵀ = x wᵀ: transforming both operands of a GEMM
along K leaves the exact product alone. One fixed sign vector serves everything (NVFP4 recipe).
"""

from functools import cache

import torch
from torch import Tensor

from halfulp.errors import FormatError
from halfulp.numerics.random import Key, word


@cache
def hadamard_matrix(d: int, device: torch.device | str = "cpu") -> Tensor:
    """H, fp32 [d, d], orthonormal; `d` a power of two. Kept per device: a copy would wait."""
    h = torch.ones(1, 1)
    while h.shape[0] < d:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    key = Key.of(0, "hadamard")
    signs = torch.tensor([1.0 if word(i, key.k0, key.k1) >> 31 else -1.0 for i in range(d)])
    return (signs[:, None] * h * d**-0.5).to(device)


@torch.compiler.assume_constant_result
def _traced_matrix(d: int, device: torch.device) -> Tensor:
    return hadamard_matrix(d, device)


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
    matrix = _traced_matrix if torch.compiler.is_compiling() else hadamard_matrix
    return (blocks @ matrix(d, x.device)).flatten(-2)
