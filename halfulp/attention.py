"""Attention whose two products, QK and PV, run as quantized GEMMs in Hugging Face models."""

import sys

import torch
from torch import Tensor, nn

from halfulp.errors import PolicyError
from halfulp.site import Site, quantized_matmul

PREFIX = "halfulp_"  # of the names in transformers' registry; what follows was there before


def leave_alone(match: str = "layers.*.attn") -> str:
    """What to do about attention products that cannot be quantized."""
    return (
        "Leave these products as they are: give a policy file whose first rule is "
        f'match = "{match}", recipe = "fp32".'
    )


def has_attention_interface(model: nn.Module, module: nn.Module) -> bool:
    """Whether the attention in `module` can be routed through `attention`."""
    there = "ALL_ATTENTION_FUNCTIONS" in vars(sys.modules[type(module).__module__])
    return there and getattr(model, "config", None) is not None


def refuse_own_attention(model: nn.Module, module: nn.Module) -> None:
    """PolicyError if the attention in `module` does not use transformers' attention interface."""
    if not has_attention_interface(model, module):
        raise PolicyError(
            f"the policy rounds attention products, but {type(module).__name__} does not use "
            f"transformers' attention interface. {leave_alone()}"
        )


def route_attention(model: nn.Module) -> None:
    """Route every attention of the model through `attention`, until `restore_attention`."""
    # Encoders and decoders read copies of the model's config.
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    known = [c for c in configs.values() if hasattr(c, "_attn_implementation")]
    vars(model)["halfulp_attention"] = known
    keep_attention(model)


def keep_attention(model: nn.Module) -> None:
    """Route the attention again if a model that shares a config, or the user, changed that."""
    for config in vars(model).get("halfulp_attention", ()):
        name = config._attn_implementation or "eager"
        if not name.startswith(PREFIX):
            _register(PREFIX + name)
            config._attn_implementation = PREFIX + name


def restore_attention(model: nn.Module) -> None:
    """The attention that the model had before `route_attention`, if that was called.

    Otherwise fp32 attention would have other bits after a policy that rounds it than in a resumed
    run, which has never rounded it.
    """
    configs = vars(model).pop("halfulp_attention", ())
    names = [config._attn_implementation for config in configs]
    for config, name in zip(configs, names, strict=True):  # setting one sets those inside it
        config._attn_implementation = name.removeprefix(PREFIX)


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scaling + bias + mask) v; query [B, H, T, D], key, value [B, G, S, D], H = nG.

    QK and PV are quantized as the sites that halfulp.quantize left on `module` say; the softmax is
    fp32. Raises PolicyError for attention sinks, which no recipe describes.
    """
    if any(s is not None for s in (s_aux, others.get("sinks"))):
        raise PolicyError(
            f"{type(module).__name__} uses attention sinks, which halfulp does not quantize. "
            + leave_alone()
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (key, value))
    scores = _product(module, "qk", query, key) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    for added in (position_bias, attention_mask):
        if added is not None:
            scores = scores + added
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, dropout, module.training)
    out = _product(module, "pv", weights, value.mT)
    return out.transpose(1, 2).contiguous(), weights


def _product(module: nn.Module, name: str, x: Tensor, w: Tensor) -> Tensor:
    site: Site | None = getattr(module, f"halfulp_{name}", None)
    if site is None or not site.active:
        return x @ w.mT
    return quantized_matmul(x, w, None, site, module.training)
