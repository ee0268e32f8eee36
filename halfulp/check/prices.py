"""Prices: what rounding each site to each format costs, in nats per token, by adjoints."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from halfulp.check.sites import SiteInfo


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of sites × formats (spec roundoff §3.2), nats per token unless said otherwise.

    * `kl` [sites, formats]: expected KL(p‖p̂) of rounding this site alone, max(element, row);
      NaN where no gradient reaches the site ("unknown"), inf where the format overflows to inf.
    * `kl_probes` [probes, sites, formats]: the same from each probe.
    * `kl_stochastic`: under stochastic rounding.
    * `margin_variance`: variance of the top-2 logit margin's error, mean over tokens.
    * `shrinkage` ⟨e,x⟩/⟨x,x⟩, `z` Σge/√Σ(ge)² (the probe of the largest |z|), `saturated` and
      `flushed` (shares of elements beyond the largest value, of nonzero ones that became zero).
    * `heads`: site name → kl [heads, formats] of tensors with a head axis.
    All tensors fp64. `unpriced` lists operations whose effect is in no price, `unpriced_share` is
    their share of all operations that make floats.
    """

    sites: tuple[SiteInfo, ...]
    formats: tuple[str, ...]
    kl: Tensor
    kl_probes: Tensor
    kl_stochastic: Tensor
    margin_variance: Tensor
    shrinkage: Tensor
    z: Tensor
    saturated: Tensor
    flushed: Tensor
    heads: Mapping[str, Tensor]
    unpriced: tuple[str, ...]
    unpriced_share: float
