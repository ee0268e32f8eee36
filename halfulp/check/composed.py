"""The bound of a whole forward pass: the bounds of its operations, composed through all blocks.

Rigorous and useless as a prediction: it exceeds what is measured by orders of magnitude after one
block (worst cases compound, real errors do not). It exists to show that, and is never a verdict.
Knows the layers of GPT-2, Llama, Qwen2 and Qwen3 as transformers runs them with eager attention.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.check import bounds
from halfulp.check.arithmetic import Accumulator, Arithmetic, Bounded, exact, rounded, stored
from halfulp.errors import CheckError

ULPS = 4.0  # error of exp and tanh in a vector library, in units of u
FAMILIES = ("gpt2", "llama", "qwen2", "qwen3")


def stream_bounds(model: nn.Module, ids: Tensor, fmt: str) -> Iterator[tuple[str, Bounded]]:
    """(point, stream [B, T, d]) after the embedding and at two points of each layer, in order.

    For the model stored and run in `fmt` ("fp32", "bf16", "fp16"), sums in fp32. Each point holds
    for every element. Raises CheckError for a model of another family.
    """
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", type(model).__name__)
    if family not in FAMILIES:
        raise CheckError(
            f"the composed bound knows {', '.join(FAMILIES)}; this model is {family}. "
            "Use halfulp.check.profile.profile_depth, which measures."
        )
    program = _Program(config, fmt)
    yield from (program.gpt2(model, ids) if family == "gpt2" else program.llama(model, ids))


class _Program:
    """The operations of one low-precision program, with their storage roundings."""

    def __init__(self, config: Any, fmt: str):
        self.config, self.low, self.wide = config, Arithmetic.of(fmt), Arithmetic.of("fp32")
        same = fmt == "fp32"
        self.out = None if same else self.low
        self.sums = Accumulator(arithmetic=self.wide, exact_products=not same)
        self.same = same

    def weight(self, w: Tensor) -> Bounded:
        return exact(w) if self.same else stored(w, self.low)

    def linear(self, x: Bounded, module: Any) -> Bounded:
        w = self.weight(module.weight)
        if type(module).__name__ == "Conv1D":
            w = Bounded(w.value.mT, w.error.mT)
        bias = None if module.bias is None else self.weight(module.bias)
        return bounds.linear(x, w, bias, self.sums, out=self.out)

    def attend(self, q: Bounded, k: Bounded, v: Bounded, scale: float | None = None) -> Bounded:
        """Heads [B, H, T, d] → [B, T, H d]; the heads of k and v are shared by groups."""
        groups = q.value.shape[1] // k.value.shape[1]
        k, v = (Bounded(*(t.repeat_interleave(groups, 1) for t in b)) for b in (k, v))
        t = q.value.shape[-2]
        y = bounds.attention(
            q,
            k,
            v,
            self.sums,
            scores=self.out,
            probabilities=self.out,
            softmax_in=self.wide,
            visible=torch.ones(t, t, dtype=torch.bool).tril(),
            scale=scale,
            ulps=ULPS,
            out=self.out,
        )
        return Bounded(*(part.transpose(1, 2).flatten(-2) for part in y))

    def gpt2(self, model: Any, ids: Tensor) -> Iterator[tuple[str, Bounded]]:
        body = model.transformer
        tokens, places = self.weight(body.wte.weight), self.weight(body.wpe.weight)
        here = torch.arange(ids.shape[1])
        x = bounds.add(
            Bounded(*(t[ids] for t in tokens)), Bounded(*(t[here] for t in places)), self.low
        )
        yield "emb", x
        for n, block in enumerate(body.h):
            parts = [
                Bounded(value, error)
                for value, error in zip(
                    *(
                        t.chunk(3, -1)
                        for t in self.linear(self.layer_norm(x, block.ln_1), block.attn.c_attn)
                    ),
                    strict=True,
                )
            ]
            q, k, v = (_heads(part, block.attn.num_heads) for part in parts)
            x = bounds.add(x, self.linear(self.attend(q, k, v), block.attn.c_proj), self.low)
            yield f"layers.{n}.attn", x
            inner = self.linear(self.layer_norm(x, block.ln_2), block.mlp.c_fc)
            inner = bounds.gelu_tanh(inner, self.low, ulps=ULPS)
            x = bounds.add(x, self.linear(inner, block.mlp.c_proj), self.low)
            yield f"layers.{n}.ffn", x

    def layer_norm(self, x: Bounded, norm: Any) -> Bounded:
        gain, bias = self.weight(norm.weight), self.weight(norm.bias)
        return bounds.layer_norm(x, gain, bias, norm.eps, self.wide, out=self.out)

    def llama(self, model: Any, ids: Tensor) -> Iterator[tuple[str, Bounded]]:
        body = model.model
        x = Bounded(*(t[ids] for t in self.weight(body.embed_tokens.weight)))
        yield "emb", x
        cos, sin = self.rotation(body.rotary_emb, ids.shape[1])
        for n, layer in enumerate(body.layers):
            attention, mlp = layer.self_attn, layer.mlp
            inner = self.rms_norm(x, layer.input_layernorm)
            size = attention.head_dim
            q, k, v = (
                _heads(y := self.linear(inner, m), y.value.shape[-1] // size)
                for m in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            if hasattr(attention, "q_norm"):
                q, k = self.rms_norm(q, attention.q_norm), self.rms_norm(k, attention.k_norm)
            q, k = (bounds.rope(t, cos, sin, self.low) for t in (q, k))
            x = bounds.add(x, self.linear(self.attend(q, k, v), attention.o_proj), self.low)
            yield f"layers.{n}.attn", x
            inner = self.rms_norm(x, layer.post_attention_layernorm)
            gate, up = self.linear(inner, mlp.gate_proj), self.linear(inner, mlp.up_proj)
            gate = bounds.silu(gate, self.wide, ulps=ULPS, out=self.out)
            inner = bounds.multiply(gate, up, self.low)
            x = bounds.add(x, self.linear(inner, mlp.down_proj), self.low)
            yield f"layers.{n}.ffn", x

    def rms_norm(self, x: Bounded, norm: Any) -> Bounded:
        one = exact(torch.ones_like(norm.weight))
        y = bounds.rms_norm(x, one, norm.variance_epsilon, self.wide, out=self.out)
        return bounds.multiply(y, self.weight(norm.weight), self.low)

    def rotation(self, module: Any, length: int) -> tuple[Bounded, Bounded]:
        """cos and sin [T, d] of angles computed in fp32 from the module's own frequencies."""
        positions, inv_freq = torch.arange(length), module.inv_freq.double()
        angle = positions.double()[:, None] * inv_freq
        wrong = bounds.rope_angle_error(positions, inv_freq, self.wide) + ULPS * self.wide.u
        tables = (
            torch.cat((t, t), -1) * module.attention_scaling for t in (angle.cos(), angle.sin())
        )
        error = torch.cat((wrong, wrong), -1) * module.attention_scaling
        cos, sin = (rounded(Bounded(table, error), self.out) for table in tables)
        return cos, sin


def _heads(x: Bounded, heads: int) -> Bounded:
    """[B, T, H d] → [B, H, T, d]."""
    return Bounded(*(t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in x))
