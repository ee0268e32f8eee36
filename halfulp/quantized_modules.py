"""Modules that compute as a policy says: classes mixed into those of a model, and out again."""

from collections.abc import Collection
from functools import cache, partial

import torch
from torch import Tensor, nn

from halfulp.attention import restore_attention, route_attention
from halfulp.errors import PolicyError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.random import Key, fold_tensor
from halfulp.site import Clock, Site, quantized_matmul


class QuantizedLinear(nn.Module):
    """Mixed into the class of nn.Linear or Conv1D: the three GEMMs run as `halfulp_site` says."""

    halfulp_site: Site | None
    weight: nn.Parameter
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        site = self.halfulp_site
        if site is None or not site.active:
            return super().forward(x)  # pyright: ignore[reportCallIssue]
        # transformers' Conv1D stores [in, out]
        weight = self.weight if isinstance(self, nn.Linear) else self.weight.t()
        rows = x.reshape(-1, x.shape[-1])
        y = quantized_matmul(rows, weight, self.bias, site, self.training)
        return y.view(*x.shape[:-1], y.shape[-1])


class QuantizedTable(nn.Module):
    """Mixed into an embedding or norm: its parameters are read through `halfulp_quantizer`."""

    halfulp_quantizer: Quantizer | None
    halfulp_clock: Clock
    halfulp_key: Key


def _through(name: str, module: QuantizedTable) -> Tensor | None:
    parameter, q = module._parameters.get(name), module.halfulp_quantizer
    clock = module.halfulp_clock
    if parameter is None or q is None or not clock.enabled:
        return parameter
    if hasattr(parameter, "to_local"):  # FSDP2 asks for its own shard here, never a forward pass
        return parameter
    key = _key_at(clock, module.halfulp_key) if q.stochastic else None
    return _StraightThrough.apply(parameter.float(), q, key).to(parameter.dtype)


def _key_at(clock: Clock, key: Key) -> Key | Tensor:
    """The key at the clock's time; a traced graph reads the time from a tensor."""
    if torch.compiler.is_compiling():
        return fold_tensor(fold_tensor(key.tensor(), clock.tensor[0]), clock.tensor[1])
    return key.fold(clock.step).fold(clock.micro)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q: Quantizer, key: Key | Tensor | None):
        return apply_quantizer(x, q, key=key)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


@cache
def _mixed(mixin: type, base: type, tables: tuple[str, ...] = ()) -> type:
    read = {name: property(partial(_through, name)) for name in tables}
    return type(f"Quantized{base.__name__}", (mixin, base), {"__module__": __name__, **read})


def attach(model: nn.Module, name: str, role: str, site: Site) -> None:
    """Let the module `name` run the GEMM of this role as `site` says."""
    module = model.get_submodule(name)
    if role in ("attn_qk", "attn_pv"):
        if "halfulp_attention" not in vars(model):
            route_attention(model)
        vars(module)[f"halfulp_{role[5:]}"] = site
        return
    if not isinstance(module, QuantizedLinear):
        module.__class__ = _mixed(QuantizedLinear, type(module))
        _refuse_fused_inference(model.get_submodule(name.rpartition(".")[0]))
    vars(module)["halfulp_site"] = site


def _refuse_fused_inference(layer: nn.Module) -> None:
    """Keep torch's encoder layer from its inference path, which reads the weights of its linears.

    A layer with a hook does not take that path.
    """
    if isinstance(layer, nn.TransformerEncoderLayer) and "halfulp_hook" not in vars(layer):
        vars(layer)["halfulp_hook"] = layer.register_forward_pre_hook(lambda *_: None)


def attach_table(module: nn.Module, quantizer: Quantizer, clock: Clock, key: Key) -> None:
    """Let an embedding or norm read its parameters through `quantizer`."""
    if not isinstance(module, QuantizedTable):
        module.__class__ = _mixed(QuantizedTable, type(module), tuple(module._parameters))
    vars(module)["halfulp_quantizer"] = quantizer
    vars(module)["halfulp_clock"] = clock
    vars(module)["halfulp_key"] = key


def quantized_tables(
    model: nn.Module, parameters: Collection[str]
) -> list[tuple[nn.Module, Quantizer]]:
    """The quantized embeddings and norms that own any of these parameters."""
    owners = {name.rpartition(".")[0] for name in parameters}
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, QuantizedTable)]
    return [
        (module, module.halfulp_quantizer)
        for name, module in found
        if name in owners and module.halfulp_quantizer is not None
    ]


def detach(model: nn.Module) -> None:
    """Every module computes as before, keeping its class (FSDP may have wrapped it)."""
    restore_attention(model)
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            vars(module)["halfulp_site"] = None
        if isinstance(module, QuantizedTable):
            vars(module)["halfulp_quantizer"] = None
        for name in ("halfulp_qk", "halfulp_pv"):
            module.__dict__.pop(name, None)


def restore_classes(model: nn.Module) -> None:
    """Every module is of its own class again; PolicyError if the model was sharded since."""
    mixins = (QuantizedLinear, QuantizedTable)
    modules = [m for m in model.modules() if isinstance(m, mixins)]
    for module in modules:
        if type(module).__bases__[0] not in mixins:
            raise PolicyError(
                f"{type(module).__name__} was sharded after quantize. Unquantize is not possible "
                "then; handle.switch(resolution) changes the policy in place."
            )
    detach(model)
    for module in model.modules():
        if (hook := vars(module).pop("halfulp_hook", None)) is not None:
            hook.remove()
    for module in modules:
        module.__class__ = type(module).__bases__[1]
        for name in [n for n in module.__dict__ if n.startswith("halfulp_")]:
            del module.__dict__[name]
