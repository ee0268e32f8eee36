"""Trained toy models and statistics that the tests of prices share."""

import sys
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from reproduce.toy import Toy, toy, untrained

trained = cache(toy)

__all__ = ["Layer", "Toy", "Words", "spearman", "trained", "untrained"]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation; ties by position, which is rare among floats."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


class Layer(nn.Module):
    """Single-head attention and an MLP in plain torch; `divide` and `inplace` choose spellings."""

    def __init__(self, d: int, divide: bool, inplace: bool):
        super().__init__()
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self.self_attn = nn.ModuleDict({n: nn.Linear(d, d, bias=False) for n in names})
        self.up_proj, self.down_proj = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.divide, self.inplace = divide, inplace

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm1(x)
        q, k, v = (self.self_attn[f"{n}_proj"](a) for n in "qkv")
        scores = q @ k.mT
        if self.inplace:
            scores /= 3.0
        else:
            scores = scores / 3.0 if self.divide else scores * (1 / 3.0)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        p = scores.masked_fill(future, torch.finfo(x.dtype).min).softmax(-1)
        y = self.self_attn["o_proj"](p @ v)
        if self.inplace:
            y += x
            x = y
        else:
            x = x + y
        return x + self.down_proj(nn.functional.gelu(self.up_proj(self.norm2(x))))


class Words(nn.Module):
    """A language model of `Layer`s over 31 words that returns plain logits."""

    def __init__(self, d: int = 24, layers: int = 2, *, divide: bool = True, inplace: bool = False):
        super().__init__()
        self.embed = nn.Embedding(31, d)
        self.layers = nn.ModuleList(Layer(d, divide, inplace) for _ in range(layers))
        self.norm = nn.LayerNorm(d)
        self.lm_head = nn.Linear(d, 31, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))
