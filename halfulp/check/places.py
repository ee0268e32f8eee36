"""Where an operation sits in the transformer: its block, its GEMM, the kind of tensor it makes.

The block comes from the block map; the kind is carried from operation to operation: what q_proj
makes is a query until it meets a key in a product.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

from torch import nn

from halfulp.block_names import block_type, layer_of
from halfulp.blocks import BlockMap, Gemm, block_map

KINDS = (
    "weight", "emb", "residual", "norm", "q", "k", "v", "qkv", "scores", "probs", "attn_out",
    "act", "mlp", "logits", "other",
)  # fmt: skip
PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_ACTIVATIONS = {"gelu", "silu", "sigmoid", "tanh", "relu", "mish", "glu", "softplus", "erf"}
_CARRIED = {"q", "k", "v", "qkv", "scores", "probs", "attn_out"}


class Places:
    """Blocks and kinds of the operations of one model; `hints` as in halfulp.blocks."""

    def __init__(self, model: nn.Module, hints: Mapping[str, str] | None = None):
        self.map: BlockMap = block_map(model, hints)
        self.linear = {g.module: g for g in self.map.gemms if not g.role.startswith("attn_")}
        self.attention: dict[str, tuple[Gemm, Gemm]] = {}
        for qk, pv in zip(self.map.gemms, self.map.gemms[1:], strict=False):
            if qk.role == "attn_qk" and pv.role == "attn_pv":
                self.attention[qk.module] = (qk, pv)
        self._blocks: dict[str, str] = {}

    @cached_property
    def _table(self) -> dict[str, str]:
        """Module path → block, of every module that the block map names."""
        table = {path: gemm.block for path, gemm in self.linear.items()}
        table |= {**self.map.embeddings, **self.map.norms}
        return table | {path: pair[0].block for path, pair in self.attention.items()}

    def block(self, path: str) -> str:
        """The block of what the module at `path` computes itself.

        Residual additions belong to "layers.N.residual", operations outside all layers to "emb".
        """
        if path not in self._blocks:
            self._blocks[path] = self._find_block(path)
        return self._blocks[path]

    def _find_block(self, path: str) -> str:
        if path in self._table:
            return self._table[path]
        inside = {b for p, b in self._table.items() if not path or p.startswith(path + ".")}
        if len(inside) == 1:
            return next(iter(inside))
        layers = {layer_of(b) for b in inside}
        if inside and len(layers) == 1 and None not in layers:
            kinds = {block_type(b) for b in inside}
            n = layers.pop()
            return f"layers.{n}.{'attn' if kinds <= {'qk', 'vo', 'attn'} else 'residual'}"
        if inside or not path:
            return "emb"
        return self.block(path.rpartition(".")[0])

    def parameter(self, name: str) -> tuple[str, str]:
        """(block, kind) of the parameter `name`."""
        block = self.map.parameters.get(name) or self.block(name.rpartition(".")[0])
        return block, {"emb": "emb", "norm": "norm"}.get(block_type(block), "weight")

    def gemm(self, path: str, op: str, product: int) -> Gemm | None:
        """The GEMM that `op` in the module at `path` is; `product` counts its products so far."""
        if op in ("linear", "addmm"):
            return self.linear.get(path)
        if op in PRODUCTS and path in self.attention and product < 2:
            return self.attention[path][product]
        return None

    def kind(self, path: str, op: str, tags: Sequence[str], gemm: Gemm | None) -> str:
        """What the output of `op` is; `tags` are the kinds of its tensor operands, in order."""
        block = self.block(path)
        if gemm is not None:
            return {"attn_qk": "scores", "attn_pv": "attn_out"}.get(gemm.role) or _linear(gemm)
        if path in self.map.norms or block_type(block) == "norm":
            return "norm"
        if op == "softmax" and (path in self.attention or "scores" in tags):
            return "probs"
        if op == "scaled_dot_product_attention":
            return "attn_out"
        if block_type(block) == "attn":
            return next((t for t in tags if t in _CARRIED), "other")
        if block_type(block) == "residual":
            return "residual"
        if block_type(block) == "ffn":
            product = op == "mul" and tags.count("mlp") + tags.count("act") > 1
            inner = path not in self._table and not self._owns(path)
            return "act" if op in _ACTIVATIONS or product or inner else "mlp"
        return {"emb": "emb", "head": "logits"}.get(block_type(block), "other")

    def _owns(self, path: str) -> bool:
        return any(p.startswith(path + ".") for p in self._table)


def _linear(gemm: Gemm) -> str:
    leaf, kinds = gemm.module.rpartition(".")[2], {block_type(part) for part in gemm.parts}
    if kinds == {"qk", "vo"}:
        return "qkv"
    if kinds == {"qk"}:
        return "k" if re.search(r"(?:^|_)k(?:_|$)|key", leaf) else "q"
    if kinds == {"vo"}:
        return "v" if re.search(r"(?:^|_)v(?:_|$)|value", leaf) else "attn_out"
    return {"ffn": "mlp", "head": "logits"}.get(block_type(gemm.block), "other")
