"""One look at every tensor of a forward pass: ranges, zeros, and the first that is not finite."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, run
from halfulp.check.places import Places
from halfulp.check.setup import prepare
from halfulp.check.sites import MASKED, SiteInfo, Walk, parameter_sites
from halfulp.errors import CheckError


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One stored site: its largest magnitude, masks left out, and a sum that tells runs apart."""

    info: SiteInfo
    amax: float
    finite: bool
    checksum: float


@dataclass(frozen=True, kw_only=True)
class Survey:
    """Every stored site in the order of the run, parameters first, and additions of a mask."""

    sites: tuple[Seen, ...]
    masked: tuple[str, ...]

    @property
    def first_non_finite(self) -> SiteInfo | None:
        return next((s.info for s in self.sites if not s.finite), None)

    @property
    def zeros(self) -> tuple[str, ...]:
        """Sites whose elements are all zero."""
        return tuple(s.info.name for s in self.sites if s.amax == 0)


def survey(
    model: nn.Module,
    batch: Batch,
    *,
    hints: Mapping[str, str] | None = None,
    attention: str = "eager",
) -> Survey:
    """Look at every stored site in one forward pass; NaN and inf are results, not errors."""
    with prepare(model, attention=attention), torch.no_grad():
        places, looker = Places(model, hints), _Looker()
        walk = Walk(model, places, looker)
        for stored in parameter_sites(model, places).values():
            looker.output(stored.info, stored.tensor, (), False)
        with walk:
            run(model, batch)
    return Survey(sites=tuple(looker.sites), masked=tuple(walk.masked))


def non_finite_error(model: nn.Module, batch: Batch, **options) -> CheckError:
    """The error that names the first tensor with NaN or inf in the reference run."""
    site = survey(model, batch, **options).first_non_finite
    where = "its logits" if site is None else f"{site.name} (block {site.block})"
    return CheckError(
        f"the reference run of {type(model).__name__} is not finite; the first tensor with NaN or "
        f"inf is {where}. Repair the checkpoint or the batch: nothing can be compared with it."
    )


def first_difference(
    model: nn.Module, batch: Batch, *, hints: Mapping[str, str] | None = None
) -> str | None:
    """Name of the first site at which two runs of the model differ; None if they agree."""
    first, second = (survey(model, batch, hints=hints) for _ in range(2))
    pairs = zip(first.sites, second.sites, strict=False)
    differing = (a.info.name for a, b in pairs if repr(a.checksum) != repr(b.checksum))
    return next(differing, None)


def rope_angle_errors(model: nn.Module, length: int, dtype: torch.dtype) -> dict[str, float]:
    """Largest error in radians, over `length` positions, of RoPE with frequencies in `dtype`.

    Keys are the buffers called inv_freq; a buffer that is stored in low precision already is
    judged by half its last place. Rule (spec roundoff §1.3f): the angle belongs in fp32.
    """
    found: dict[str, float] = {}
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] != "inv_freq" or not buffer.is_floating_point():
            continue
        x = buffer.detach().double()
        if buffer.dtype in (torch.bfloat16, torch.float16):
            error = x.abs() * torch.finfo(buffer.dtype).eps / 2
        else:
            error = (x.to(dtype).double() - x).abs()
        found[name] = float(error.max()) * (length - 1)
    return found


def fp32_copy(model: nn.Module) -> nn.Module:
    """A copy in fp32, for checkpoints in bf16 or fp16: the reference has their exact weights."""
    return copy.deepcopy(model).float()


@dataclass
class _Looker:
    """The visitor that notes ranges."""

    sites: list[Seen] = field(default_factory=list)

    def operand(self, infos: tuple[SiteInfo, ...], x: Tensor, transposed: bool) -> Tensor:
        return x

    def output(
        self, info: SiteInfo, x: Tensor, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        if info.family == "stored" and x.numel():
            inside = x.detach().masked_fill(x <= MASKED, 0.0)
            low, high = inside.aminmax()
            amax = torch.maximum(high, -low).item()
            total = inside.sum(dtype=torch.float64).item()
            finite = bool(torch.isfinite(inside).all())
            self.sites.append(Seen(info=info, amax=amax, finite=finite, checksum=total))
        return x

    def writes(self, x: Tensor) -> None:
        pass
