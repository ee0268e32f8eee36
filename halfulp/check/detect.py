"""Detectors: where a prediction must not be trusted, and what breaks before any price counts.

Spec roundoff §3.5 and test A12. A finding names the site, the format and what to do; whoever
prints a prediction asks `trusted` first.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from halfulp.check.measure import TARGETS
from halfulp.check.prices import Prices
from halfulp.check.survey import Survey, rope_angle_errors
from halfulp.formats import format_quantizer

PLAN_LIMIT, SITE_LIMIT = 0.05, 0.03  # nats/token: beyond, first order is no prediction
SHRINKAGE_LIMIT, Z_LIMIT, FLUSH_LIMIT = 0.02, 4.0, 0.01
UNPRICED_LIMIT = 0.02
ANGLE_LIMIT = 0.02  # radians


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing to tell the user.

    `kind`: nonlinear | shrinkage | bias | saturated | overflow | flushed | unknown | unpriced |
    zero | mask | rope | router | nonfinite. `value` is the number behind it, in its kind's unit.
    """

    kind: str
    site: str
    format: str
    value: float
    text: str


def beyond_linear(prices: Prices, plan: Mapping[str, str]) -> Finding | None:
    """Why the prediction for a plan (site → format) is not to be printed; None if it may be."""
    total = 0.0
    for name, fmt in plan.items():
        kl = prices.kl[prices.index(name), prices.formats.index(fmt)].item()
        total += kl if kl == kl else 0.0
        if kl > SITE_LIMIT:
            text = f"{name} alone costs {kl:.2g} nats/token in {fmt}"
            return _nonlinear(name, fmt, kl, text)
    if total > PLAN_LIMIT:
        return _nonlinear("", "", total, f"the plan costs {total:.2g} nats/token")
    return None


def trusted(prices: Prices, plan: Mapping[str, str]) -> bool:
    """Whether the predicted KL of a plan may be shown beside the measured one."""
    return beyond_linear(prices, plan) is None and prices.unpriced_share <= UNPRICED_LIMIT


def _nonlinear(site: str, fmt: str, value: float, what: str) -> Finding:
    text = f"{what}: beyond the linear range, so only the measured value counts."
    return Finding(kind="nonlinear", site=site, format=fmt, value=value, text=text)


def detect(prices: Prices) -> tuple[Finding, ...]:
    """What the prices themselves give away, site by site and format by format."""
    found = list(_unpriced(prices))
    for i, site in enumerate(prices.sites):
        if prices.kl[i].isnan().all():
            text = f"{site.name}: no gradient reaches it (detached); its price is unknown."
            found.append(
                Finding(kind="unknown", site=site.name, format="", value=float("nan"), text=text)
            )
            continue
        for j, fmt in enumerate(prices.formats):
            found += _of_site(prices, i, j, site.name, fmt)
    return tuple(found)


def _unpriced(prices: Prices) -> Iterator[Finding]:
    if prices.unpriced:
        share, some = prices.unpriced_share, ", ".join(prices.unpriced[:3])
        verdict = "the verdict is withheld" if share > UNPRICED_LIMIT else "the rest is priced"
        text = f"{len(prices.unpriced)} operations ({share:.1%}) have no price ({some}): {verdict}."
        yield Finding(kind="unpriced", site=prices.unpriced[0], format="", value=share, text=text)


def _of_site(prices: Prices, i: int, j: int, name: str, fmt: str) -> Iterator[Finding]:
    shrinkage, z = prices.shrinkage[i, j].item(), prices.z[i, j].item()
    saturated, flushed = prices.saturated[i, j].item(), prices.flushed[i, j].item()
    kl = prices.kl[i, j].item()
    largest = format_quantizer(fmt).format.largest

    def finding(kind: str, value: float, text: str) -> Finding:
        return Finding(kind=kind, site=name, format=fmt, value=value, text=f"{name}: {text}")

    if kl == float("inf"):
        text = f"{saturated:.2%} of the elements exceed {largest:g} and become inf in {fmt}."
        yield finding("overflow", saturated, text)
    elif saturated > 0:
        text = f"{saturated:.2%} of the elements exceed the largest value of {fmt}."
        yield finding("saturated", saturated, text)
    if flushed > FLUSH_LIMIT:
        yield finding(
            "flushed", flushed, f"{flushed:.1%} of the nonzero elements become 0 in {fmt}."
        )
    if abs(shrinkage) > SHRINKAGE_LIMIT:
        text = f"{fmt} scales the tensor by {1 + shrinkage:.3f} on average: its errors agree."
        yield finding("shrinkage", shrinkage, text)
    if abs(z) > Z_LIMIT:
        yield finding("bias", z, f"the errors of {fmt} point one way (z = {z:+.1f}).")
    if kl > SITE_LIMIT and kl != float("inf"):
        yield finding("nonlinear", kl, f"{kl:.2g} nats/token in {fmt}: only a measurement counts.")


def guard(
    model: nn.Module, seen: Survey, *, targets: tuple[str, ...] = (), length: int = 0
) -> tuple[Finding, ...]:
    """What breaks whatever the prices say: NaN, zeros, masks, fp16 overflow, RoPE in bf16.

    `seen`: from halfulp.check.survey.survey. `targets`: programs whose range and RoPE frequencies
    are to be judged, RoPE over `length` positions (0: half-precision buffers only).
    """
    found: list[Finding] = []
    if (site := seen.first_non_finite) is not None:
        text = f"{site.name} is the first tensor with NaN or inf; the model is broken in fp32."
        found.append(_plain("nonfinite", site.name, text))
    found += [
        _plain("zero", name, f"{name} is zero everywhere: rounding it costs nothing here.")
        for name in seen.zeros
    ]
    if seen.masked:
        some = seen.masked[0]
        text = f"additive masks at {len(seen.masked)} places ({some}) are left out of scales."
        found.append(_plain("mask", some, text))
    if any(s.info.block.endswith(".router") for s in seen.sites):
        text = (
            "a router picks experts: a token that changes its expert is no small perturbation, and "
            "no price holds it. Trust measured values only."
        )
        found.append(_plain("router", "", text))
    for target in targets:
        found += _overflow(seen, target)
    return (*found, *_rope(model, targets, length))


def _plain(kind: str, site: str, text: str, value: float = 0.0, fmt: str = "") -> Finding:
    return Finding(kind=kind, site=site, format=fmt, value=value, text=text)


def _overflow(seen: Survey, target: str) -> Iterator[Finding]:
    fmt = "fp16" if target.endswith("fp16") else "bf16"
    largest = format_quantizer(fmt).format.largest
    for s in seen.sites:
        if s.finite and s.amax > largest:
            text = (
                f"{s.info.name} reaches {s.amax:.3g}; {fmt} ends at {largest:g}: inf in {target}."
            )
            yield _plain("overflow", s.info.name, text, s.amax, fmt)


def _rope(model: nn.Module, targets: tuple[str, ...], length: int) -> Iterator[Finding]:
    low = {name: b.dtype for name, b in model.named_buffers() if b.dtype.itemsize < 4}
    for target in targets or ("bf16",):
        if target.startswith("autocast"):
            continue
        for name, error in rope_angle_errors(model, max(length, 256), TARGETS[target]).items():
            stored = name in low
            if not (stored or (targets and error > ANGLE_LIMIT)):
                continue
            what = f"is stored in {low[name]}" if stored else f"would be cast by model.to({target})"
            text = (
                f"{name} {what}: angles are off by up to {error:.2g} radians. Keep RoPE's "
                "frequencies in fp32 (from_pretrained(dtype=...) does)."
            )
            yield _plain("rope", name, text, error, target)


def half_precision(model: nn.Module) -> torch.dtype | None:
    """The dtype of a checkpoint in half precision, whose fp32 copy is the reference; else None."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    return next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), None)
