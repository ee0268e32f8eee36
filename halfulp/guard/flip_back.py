"""Weights that swing across a rounding boundary: codes that leave and come back within three steps.

A weight whose master copy sits on a boundary costs an update to move there and back and learns
nothing (F15; TetraJet-v2 names it as the obstacle of FP4 training).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from halfulp.block_survey import is_gemm_module
from halfulp.guard.readings import Reading, worst
from halfulp.numerics.apply import static_scale
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.quantizer import Quantizer
from halfulp.numerics.rounding import round_to
from halfulp.numerics.scaling import amax_bits, scale_of
from halfulp.site import Site

SAMPLE = 4096  # codes of each weight
_MOST_BITS = 8  # finer grids than these do not hold a weight back


class FlipBack:
    """The codes of a sample of every quantized weight in consecutive steps.

    Enter `look` around the forward pass of three steps in a row; then `readings` has the shares.
    """

    def __init__(self) -> None:
        self._codes: dict[str, list[Tensor]] = {}  # of each GEMM, oldest first
        self._blocks: dict[str, str] = {}
        self._step = -1

    @contextmanager
    def look(self, model: nn.Module, step: int) -> Iterator[None]:
        """Note the codes that the forward pass inside uses as those of `step`; once per step."""
        if step != self._step + 1:
            self._codes = {}
        self._step, seen = step, {}
        with ExitStack() as stack:
            for module in model.modules():
                site: Site | None = getattr(module, "halfulp_site", None)
                if site is not None and is_gemm_module(module) and _coarse(site):
                    hook = module.register_forward_pre_hook(_sampler(site, seen))
                    stack.callback(hook.remove)
                    self._blocks[site.name] = site.block
            yield
        self._codes = {name: [*self._codes.get(name, ()), c][-3:] for name, c in seen.items()}

    def readings(self) -> list[Reading]:
        """`flip_back` of the worst weight of each block; empty before the third look in a row."""
        full = {name: codes for name, codes in self._codes.items() if len(codes) == 3}
        if not full:
            return []
        flips = [((a == c) & (b != c)).float().mean() for a, b, c in full.values()]
        shares = zip(full, torch.stack(flips).tolist(), strict=True)
        return worst(
            Reading("flip_back", self._blocks[name], f"{name} fprop.w", v) for name, v in shares
        )

    def state_dict(self) -> dict[str, Any]:
        """The codes noted so far, fp32 [looks, sample] by GEMM, and the step of the last look."""
        codes = {name: torch.stack(codes) for name, codes in self._codes.items()}
        return {"step": self._step, "codes": codes, "blocks": dict(self._blocks)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse of `state_dict`."""
        self._step, self._blocks = state["step"], dict(state["blocks"])
        self._codes = {name: list(codes.clone()) for name, codes in state["codes"].items()}


def codes_of(w: Tensor, q: Quantizer, scale: Tensor | None = None) -> Tensor:
    """At most SAMPLE codes of a weight [N, K]: whole groups from its corner, before unscaling.

    `scale`: of a delayed quantizer. A group of more elements than SAMPLE is cut off.
    """
    w = hadamard(w.float(), q.hadamard) if q.hadamard else w.float()
    rows, columns = q.tile
    if rows == 0:
        s = 1.0 if q.scale == "none" else _tensor_scale(w, q, scale)
        return _rounded(_corner(w, 1, 1) * s, q).flatten()[:SAMPLE]
    part = _corner(w, rows, columns or w.shape[1])
    columns = columns or part.shape[1]
    padded = nn.functional.pad(part, (0, -part.shape[1] % columns, 0, -part.shape[0] % rows))
    tiles = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    whole = _amax(w) if q.scale == "nvfp4" else None
    codes = _rounded(tiles * scale_of(amax_bits(tiles, (1, 3)), q, whole)[0], q)
    matrix = codes.flatten(2).flatten(0, 1)[: part.shape[0], : part.shape[1]]
    return matrix.flatten()[:SAMPLE]


def _tensor_scale(w: Tensor, q: Quantizer, scale: Tensor | None) -> Tensor:
    if q.scale == "static":
        return static_scale(q.static_scale).to(w.device)
    return scale_of(_amax(w), q)[0] if scale is None else scale.to(w.device)


def _amax(w: Tensor) -> Tensor:
    """As amax_bits, in one pass without a copy."""
    return torch.stack(torch.aminmax(w)).abs().amax().view(torch.int32)


def _corner(w: Tensor, rows: int, columns: int) -> Tensor:
    """The first whole groups of `rows` x `columns` with about SAMPLE elements, as a matrix."""
    wide = min(w.shape[1], columns * max(1, SAMPLE // (rows * columns)))
    high = rows * max(1, SAMPLE // (wide * rows))
    return w[:high, :wide]


def _rounded(scaled: Tensor, q: Quantizer) -> Tensor:
    return round_to(scaled.contiguous(), q.format, rounding=q.rounding, saturate=True)


def _coarse(site: Site) -> bool:
    q = site.quantizers["fprop_w"]
    return not q.is_identity and not q.stochastic and q.format.bits <= _MOST_BITS


def _sampler(site: Site, seen: dict[str, Tensor]) -> Callable:
    @torch.no_grad()
    def sample(module: nn.Module, args: tuple) -> None:
        if site.name not in seen:
            weight: Any = module.weight
            weight = weight if isinstance(module, nn.Linear) else weight.t()
            history = site.histories.get("fprop_w")
            scale = None if history is None else history.scale
            codes = codes_of(weight.detach(), site.quantizers["fprop_w"], scale)
            seen[site.name] = codes.clone()

    return sample
