"""Shapes of small models with random weights; the vocabulary comes from the data."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    """`family` is the model_type of transformers; `tied`: the head uses the embedding table."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool


PRESETS = {
    "llama-tiny": Preset("llama", 64, 2, 4, 2, 192, tied=False),
    "llama-demo": Preset("llama", 128, 2, 4, 4, 384, tied=False),
    "llama-3m": Preset("llama", 256, 3, 4, 4, 688, tied=True),
    "llama-20m": Preset("llama", 512, 6, 8, 8, 1376, tied=True),
    "gpt2-tiny": Preset("gpt2", 64, 2, 4, 4, 256, tied=True),
    "gpt2-3m": Preset("gpt2", 256, 3, 4, 4, 1024, tied=True),
    "qwen3-tiny": Preset("qwen3", 64, 2, 4, 2, 192, tied=True),
}
