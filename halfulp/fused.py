"""Which rows of a fused projection compute queries and keys, and which compute values.

Read off the forward passes of transformers 5, by `config.model_type` and the module's name. What
stands in no table stays one piece: nothing is guessed from shapes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Layout:
    """The output channels of a fused matrix: `groups` equal runs, each [queries and keys, values].

    The first `qk` of the `qk + vo` channels of a run belong to qk.
    """

    groups: int
    qk: int
    vo: int


def layout(config: Any, leaf: str) -> Layout | None:
    """The layout of the fused module called `leaf` in a model of `config`; None if unknown."""
    rule = _RULES.get((str(getattr(config, "model_type", "")), leaf))
    return rule(config) if rule is not None else None


def _head(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _one_after_the_other(config: Any) -> Layout:
    """All queries, all keys, all values."""
    heads = config.num_attention_heads
    kv = getattr(config, "num_key_value_heads", None) or heads
    return Layout(1, (heads + kv) * _head(config), kv * _head(config))


def _head_by_head(config: Any) -> Layout:
    """Query, key and value of the first head, then of the second, …"""
    return Layout(config.num_attention_heads, 2 * _head(config), _head(config))


def _falcon(config: Any) -> Layout:
    heads, head = config.num_attention_heads, _head(config)
    if config.new_decoder_architecture:
        return Layout(config.num_kv_heads, (heads // config.num_kv_heads + 1) * head, head)
    if config.multi_query:
        return Layout(1, (heads + 1) * head, head)
    return _head_by_head(config)


def _big_code(config: Any) -> Layout:
    if config.multi_query:
        return Layout(1, (config.num_attention_heads + 1) * _head(config), _head(config))
    return _head_by_head(config)


_RULES: dict[tuple[str, str], Callable[[Any], Layout]] = {
    ("gpt2", "c_attn"): _one_after_the_other,
    ("gpt_bigcode", "c_attn"): _big_code,
    ("gpt_neox", "query_key_value"): _head_by_head,
    ("bloom", "query_key_value"): _head_by_head,
    ("falcon", "query_key_value"): _falcon,
    ("mpt", "Wqkv"): _one_after_the_other,
    ("phi3", "qkv_proj"): _one_after_the_other,
}
