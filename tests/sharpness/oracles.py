"""Tiny transformers in float64, and their curvature by other means than halfulp's."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from halfulp.pieces import Piece, pieces

VOCAB = 20
TINY: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 12, "n_head": 2, "n_layer": 2, "n_inner": 24, "n_positions": 8},
    "llama": {
        "hidden_size": 12,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 6,
        "num_hidden_layers": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 16,
        "tie_word_embeddings": False,
    },
}


def causal_lm(model_type: str, *, attention: str = "sdpa", **shape: Any) -> nn.Module:
    """A random model in eval mode whose every parameter matters: none is 0, no gain is 1."""
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(model_type, **({"vocab_size": VOCAB} | tokens | shape))
    config._attn_implementation = attention
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.0 if p.ndim < 2 else 0.0)
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model.eval()


def tiny(family: str) -> nn.Module:
    """About 3,000 parameters, in float64 throughout."""
    model = causal_lm(family, **TINY[family]).double()
    for owner in list(model.modules()):
        for name, norm in list(owner.named_children()):
            if type(norm).__name__ == "LlamaRMSNorm":  # it computes in fp32
                exact = nn.RMSNorm(norm.weight.numel(), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(owner, name, exact)
    return model


def ids(rows: int = 2, length: int = 8, *, vocab: int = VOCAB, seed: int = 1) -> Tensor:
    return torch.randint(0, vocab, (rows, length), generator=torch.Generator().manual_seed(seed))


class Curvature:
    """Matrices over the flattened parameters of `model`, for the next-token loss on `batch`."""

    def __init__(self, model: nn.Module, batch: Tensor):
        self.model, self.batch = model, batch
        self.names = [name for name, _ in model.named_parameters()]
        values = [p.detach() for p in model.parameters()]
        self.shapes = [v.shape for v in values]
        self.flat = torch.cat([v.flatten() for v in values])

    def logits(self, flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in self.shapes])
        given = {
            name: part.view(shape)
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }
        out = torch.func.functional_call(self.model, given, (self.batch,), tie_weights=True)
        return out.logits[:, :-1].flatten(0, 1)

    def loss(self, flat: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.logits(flat), self.batch[:, 1:].flatten())

    def hessian(self) -> Tensor:
        """Reverse over reverse: forward mode over GPT-2's norms is not symmetric in torch 2.13."""
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jacrev(torch.func.grad(self.loss), chunk_size=512)(self.flat)

    def gauss_newton_diagonal(self) -> Tensor:
        """Of the mean over positions of Jᵀ (diag p - p pᵀ) J."""
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = torch.func.jacrev(self.logits)(self.flat)  # [positions, V, parameters]
        p = self.logits(self.flat).softmax(-1).unsqueeze(-1).detach()
        centered = jacobian - (p * jacobian).sum(1, keepdim=True)
        return (p * centered.square()).sum(1).mean(0)

    def indices(self, members: Sequence[Piece]) -> Tensor:
        """Where the elements of the pieces lie in the flattened parameters, piece by piece."""
        starts, at = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            starts[name] = torch.arange(at, at + shape.numel()).view(shape)
            at += shape.numel()
        return torch.cat([p.of(starts[p.parameter]).flatten() for p in members])

    def by_type(self) -> dict[str, Tensor]:
        """Indices of the elements of each block type."""
        found = pieces(self.model)
        kinds = dict.fromkeys(p.kind for p in found)
        return {k: self.indices([p for p in found if p.kind == k]) for k in kinds}


@cache
def curvature(family: str) -> Curvature:
    """Of the tiny model of that family; shared, so leave it as it is."""
    return Curvature(tiny(family), ids())


@cache
def dense_hessian(family: str) -> Tensor:
    return curvature(family).hessian()
