"""Whether a forward pass computed its GEMMs in the sites that round them, or went past them."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from halfulp.attention import leave_alone
from halfulp.block_names import block_type, globbed
from halfulp.blocks import Gemm
from halfulp.errors import PolicyError
from halfulp.policy import Resolution
from halfulp.site import Site


def refuse_bypassed(
    model: nn.Module, resolution: Resolution, sites: dict[str, Site], output: Any
) -> None:
    """PolicyError if `output` depends on weights of a site that no forward pass has used.

    So it is when a model hands the weight of a linear to a function of its own, or computes an
    attention outside transformers' interface. Models with compiled parts are not looked at.
    """
    unused = [
        gemm
        for gemm, *_ in resolution.gemms
        if (site := sites.get(gemm.name)) is not None and site.enabled and not site.used
    ]
    modules = dict(model.named_modules())
    if not unused or any(map(_is_compiled, modules.values())):
        return
    if (reached := _parameters_of(output)) is None:
        return
    # A tied head's weight is used by the embedding.
    reached -= {id(p) for n, p in model.named_parameters() if resolution.blocks.get(n) == "emb"}
    past = [g for g in unused if _own(modules.get(g.module), g.role) & reached]
    if past:
        raise PolicyError(_message(model, past))


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module._compiled_call_impl is not None


def _own(module: nn.Module | None, role: str) -> set[int]:
    """The ids of the parameters that the module cannot compute this GEMM without."""
    if module is None:  # the model was changed after it was quantized
        return set()
    own = module.parameters() if role.startswith("attn") else [module._parameters.get("weight")]
    return {id(parameter) for parameter in own}


def _parameters_of(output: Any) -> set[int] | None:
    """The ids of the parameters that `output` depends on; None if a compiled graph hides them."""
    found = set()
    for node in _nodes(output):
        if type(node).__name__.startswith("CompiledFunction"):
            return None
        if (variable := getattr(node, "variable", None)) is not None:
            found.add(id(variable))
    return found


def _nodes(output: Any) -> Iterator[Any]:
    """The autograd graph of every tensor in `output`."""
    pending: list[Any] = [x.grad_fn for x in tree_leaves(output) if isinstance(x, Tensor)]
    seen: set[Any] = {None}
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            yield node
            pending += [following for following, _ in node.next_functions]


def _message(model: nn.Module, past: list[Gemm]) -> str:
    names = ", ".join(dict.fromkeys(globbed(gemm.name) for gemm in past))
    text = (
        f"the policy rounds {names}, but {type(model).__name__} computes these products past "
        "the modules that round them: nothing was rounded."
    )
    hints = {
        globbed(gemm.module): "+".join(map(block_type, gemm.parts)) + ":fp32"
        for gemm in past
        if not gemm.role.startswith("attn")
    }
    if hints:
        text += f" Leave these linears as they are: hints={hints}."
    blocks = dict.fromkeys(gemm.block for gemm in past if gemm.role.startswith("attn"))
    return " ".join([text, *map(leave_alone, blocks)])
