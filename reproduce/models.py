"""Two small decoders that train fast on a CPU, in the styles of GPT-2 and Llama.

Shapes of Wang et al. (arXiv:2502.19002), made small: queries, keys, values and outputs are separate
linears and nothing has a bias, so that every parameter lies in one of the paper's blocks.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, scaled_dot_product_attention, silu

LAYERS, WIDTH, HEADS, LENGTH = 4, 96, 4, 64
STYLES = ("gpt2", "llama")


def build(style: str, vocab: int, seed: int) -> nn.Module:
    """A decoder with random weights of `seed`; token ids [B, T ≤ LENGTH] → logits [B, T, vocab]."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = {"gpt2": GPT2, "llama": Llama}[style](vocab)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                deep = name.endswith(("o_proj.weight", "c_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * LAYERS) ** 0.5 if deep else 0.02)
    return model


class GPT2(nn.Module):
    """LayerNorm without bias, learned positions, GELU, head tied to the embedding."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.wte = nn.Embedding(vocab, WIDTH)
        self.wpe = nn.Embedding(LENGTH, WIDTH)
        self.h = nn.ModuleList(GPT2Layer() for _ in range(LAYERS))
        self.ln_f = nn.LayerNorm(WIDTH, bias=False)
        self.lm_head = nn.Linear(WIDTH, vocab, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD = self.wte(ids_BT) + self.wpe.weight[: ids_BT.shape[1]]
        for layer in self.h:
            x_BTD = layer(x_BTD)
        return self.lm_head(self.ln_f(x_BTD))


class GPT2Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(WIDTH, bias=False)
        self.attn = Attention()
        self.ln_2 = nn.LayerNorm(WIDTH, bias=False)
        self.mlp = nn.ModuleDict(
            {
                "c_fc": nn.Linear(WIDTH, 4 * WIDTH, bias=False),
                "c_proj": nn.Linear(4 * WIDTH, WIDTH, bias=False),
            }
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = x_BTD + self.attn(self.ln_1(x_BTD))
        hidden = gelu(self.mlp["c_fc"](self.ln_2(x_BTD)), approximate="tanh")
        return x_BTD + self.mlp["c_proj"](hidden)


class Llama(nn.Module):
    """RMSNorm, rotary positions, SwiGLU, a head of its own."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab, WIDTH)
        self.layers = nn.ModuleList(LlamaLayer() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.lm_head = nn.Linear(WIDTH, vocab, bias=False)
        angles = rotary_angles()
        self.cos = nn.Buffer(angles.cos(), persistent=False)
        self.sin = nn.Buffer(angles.sin(), persistent=False)

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTD, length = self.embed_tokens(ids_BT), ids_BT.shape[1]
        rotation = self.cos[:length], self.sin[:length]
        for layer in self.layers:
            x_BTD = layer(x_BTD, rotation)
        return self.lm_head(self.norm(x_BTD))


class LlamaLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        self.self_attn = Attention()
        self.post_attention_layernorm = nn.RMSNorm(WIDTH, eps=1e-6)
        inner = 8 * WIDTH // 3
        self.mlp = nn.ModuleDict(
            {
                "gate_proj": nn.Linear(WIDTH, inner, bias=False),
                "up_proj": nn.Linear(WIDTH, inner, bias=False),
                "down_proj": nn.Linear(inner, WIDTH, bias=False),
            }
        )

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rotation)
        y = self.post_attention_layernorm(x_BTD)
        hidden = silu(self.mlp["gate_proj"](y)) * self.mlp["up_proj"](y)
        return x_BTD + self.mlp["down_proj"](hidden)


class Attention(nn.Module):
    """Causal; queries and keys are rotated where a rotation is given."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.k_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.v_proj = nn.Linear(WIDTH, WIDTH, bias=False)
        self.o_proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x_BTD: Tensor, rotation: tuple[Tensor, Tensor] | None = None) -> Tensor:
        q, k, v = (
            project(x_BTD).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rotation is not None:
            q, k = rotated(q, *rotation), rotated(k, *rotation)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


def rotary_angles() -> Tensor:
    """Angles [T, channels of a head], the second half the same as the first."""
    half = WIDTH // HEADS // 2
    rate = 10_000.0 ** -(torch.arange(half) / half)
    return torch.outer(torch.arange(LENGTH).float(), rate).repeat(1, 2)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin
