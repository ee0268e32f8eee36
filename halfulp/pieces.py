"""Which elements of which parameter belong to which block, in the words of blockwise sharpness.

The block map knows whole parameters; sharpness and learning rates need five things told apart
(Wang et al., arXiv:2502.19002, §2): queries and keys within a fused projection, position tables,
the gains of norms on queries and keys, and biases, of which the paper has none.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from halfulp.block_names import BLOCK_TYPES, block_type, layer_of
from halfulp.blocks import BlockMap, block_map
from halfulp.fused import layout

PIECE_TYPES = (*BLOCK_TYPES, "pos", "qk_norm", "bias", "qkvo")
"""The block types, and: position tables, norms of queries and keys, biases and other vectors, and
fused projections whose layout no table knows."""

_POSITIONS = re.compile(r"(?:^|\.)(?:wpe|\w*pos(?:ition)?s?(?:_?emb\w*|itional\w*)?)(?:\.|$)")
_QK_NORM = re.compile(r"(?:^|[._])[qk]_?(?:norm|ln|layer_?norm)(?:\.|$)")


@dataclass(frozen=True)
class Piece:
    """Elements of the parameter `parameter` that belong to one block.

    A slice has `groups` > 0: dimension `dim` is cut into `groups` equal runs, and of each the
    channels `start` to `stop` are meant.
    """

    parameter: str
    kind: str  # one of PIECE_TYPES
    layer: int | None
    numel: int
    dim: int = 0
    groups: int = 0
    start: int = 0
    stop: int = 0

    @property
    def block(self) -> str:
        """ "layers.3.qk", or the type alone outside the layers."""
        return self.kind if self.layer is None else f"layers.{self.layer}.{self.kind}"

    @property
    def name(self) -> str:
        """The parameter, with the type in brackets where only a slice of it is meant."""
        return f"{self.parameter}[{self.kind}]" if self.groups else self.parameter

    def of(self, tensor: Tensor) -> Tensor:
        """The piece's elements of a `tensor` shaped like the parameter; a view."""
        if not self.groups:
            return tensor
        runs = tensor.unflatten(self.dim, (self.groups, -1))
        return runs.narrow(self.dim + 1, self.start, self.stop - self.start)


def pieces(model: nn.Module, hints: Mapping[str, str] | None = None) -> tuple[Piece, ...]:
    """Every element of every parameter of `model` in exactly one piece; tied parameters once.

    Frozen parameters are listed as well. Raises PolicyError as block_map does.
    """
    blocks = block_map(model, hints)
    fused = _fused(model, blocks)
    found: list[Piece] = []
    for name, parameter in model.named_parameters():
        whole = _whole(name, parameter, blocks.parameters[name])
        module, _, leaf = name.rpartition(".")
        split = fused.get(module) if whole.kind != "norm" else None
        if split is not None and leaf in ("weight", "bias"):
            found += _sliced(whole, parameter, *split)
        else:
            found.append(whole)
    return tuple(found)


def _whole(name: str, parameter: nn.Parameter, block: str) -> Piece:
    kind = block_type(block)
    vector = parameter.ndim < 2
    if kind == "emb" and _POSITIONS.search(name):
        kind = "pos"
    elif kind == "norm" and _QK_NORM.search(name) and not name.endswith("bias"):
        kind = "qk_norm"
    elif vector and (kind != "norm" or name.endswith("bias")):
        kind = "bias"
    return Piece(name, kind, layer_of(block), parameter.numel())


def _fused(model: nn.Module, blocks: BlockMap) -> dict[str, tuple[Any, int]]:
    """Module of a fused projection → its layout (None if unknown) and its output dimension."""
    config = getattr(model, "config", None)
    found = {}
    for gemm in blocks.gemms:
        if len(gemm.parts) > 1:
            module = model.get_submodule(gemm.module)
            dim = 0 if isinstance(module, nn.Linear) else 1  # transformers' Conv1D is [in, out]
            found[gemm.module] = (layout(config, gemm.module.rpartition(".")[2]), dim)
    return found


def _sliced(whole: Piece, parameter: nn.Parameter, split: Any, dim: int) -> list[Piece]:
    if whole.kind == "bias":
        return [whole]
    size = parameter.shape[dim]
    if split is None or size != split.groups * (split.qk + split.vo):
        return [Piece(whole.parameter, "qkvo", whole.layer, whole.numel)]
    ends = (("qk", 0, split.qk), ("vo", split.qk, split.qk + split.vo))
    return [
        Piece(
            whole.parameter, kind, whole.layer, whole.numel // size * (b - a) * split.groups,
            dim, split.groups, a, b,
        )
        for kind, a, b in ends
    ]  # fmt: skip
