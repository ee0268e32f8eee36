"""Whether the optimizer stores the weights as their recipes say, or leaves them in fp32."""

import torch
from torch import Tensor, nn

from halfulp.errors import PolicyError
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.rounding import round_to
from halfulp.policy import Resolution
from halfulp.processes import local


class Stored:
    """Looks at the weights once, after the first step that moved them.

    Only formats without a scale are looked at: which values they have is known.
    """

    def __init__(self, resolution: Resolution) -> None:
        stored = {
            name: (recipe.name, recipe.weight if recipe.master is None else recipe.master)
            for name, recipe in resolution.parameters.items()
        }
        self.formats = {
            name: (recipe, q)
            for name, (recipe, q) in stored.items()
            if q.granularity == "element" and not q.is_identity
        }
        self.versions: list[int] = []

    @torch.no_grad()
    def look(self, model: nn.Module) -> None:
        """PolicyError if a step has left most weights at values that their formats do not have.

        One that was damaged, or set by hand, is not the optimizer's doing.
        """
        if not self.formats:
            return
        named = model.named_parameters()
        found = [(n, p) for n, p in named if n in self.formats and p.requires_grad]
        versions = [p._version for _, p in found]
        if versions == (self.versions or versions):
            self.versions = versions
            return
        formats, self.formats = self.formats, {}
        others = [n for n, p in found if _has_others(local(p.detach()), formats[n][1])]
        if 2 * len(others) > len(found):
            recipe, q = formats[others[0]]
            raise PolicyError(
                f"recipe {recipe!r} stores weights as {q}, and the optimizer has left {others[0]} "
                f"and {len(others) - 1} others at values that {q} does not have. Use "
                "halfulp.AdamW(halfulp.param_groups(model, handle.resolution)), or simulate "
                "the GEMMs alone: halfulp.quantize(model, policy, allow_partial=True)."
            )


def _has_others(weight: Tensor, q: Quantizer) -> bool:
    """Whether `weight` has finite values that are not in the format of `q`."""
    values = weight.float().contiguous()
    differs = round_to(values, q.format, saturate=q.saturate) != values
    return bool((differs & values.isfinite()).any())
