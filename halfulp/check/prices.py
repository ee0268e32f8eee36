"""Prices: what rounding each site to each format costs, in nats per token, by adjoints.

One forward pass and one backward pass per probe. A probe is v_t = r_t (e_y − p_t) with labels y
sampled from the model's own distribution and random signs r (spec roundoff §3.2): E_v (g·e)² over
the gradient g of v at a site is twice the KL that the error e of the site causes. Sums stream
through gradient hooks; nothing of the backward pass is kept.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from halfulp.batch import Batch
from halfulp.check.adjoint import NotFinite, Pricer, Record, Relink
from halfulp.check.places import Places
from halfulp.check.reference import Reference
from halfulp.check.setup import prepare
from halfulp.check.sites import SiteInfo, Walk, parameter_sites
from halfulp.check.sums import Rounding, Sums
from halfulp.check.survey import non_finite_error
from halfulp.formats import DEFAULT_FORMATS


@dataclass(frozen=True, kw_only=True)
class Prices:
    """Prices of sites × formats (spec roundoff §3.2), nats per token unless said otherwise.

    * `kl` [sites, formats]: expected KL(p‖p̂) of rounding this site alone, max(element, row);
      NaN where no gradient reaches the site ("unknown"), inf where the format overflows to inf.
    * `kl_element`, `kl_row`: the two sums; `kl_probes` [probes, sites, formats]: from each probe.
    * `kl_stochastic`: under stochastic rounding.
    * `margin_variance`: variance of the top-2 logit margin's error, mean over tokens.
    * `shrinkage` ⟨e,x⟩/⟨x,x⟩, `z` Σge/√Σ(ge)² (the probe of the largest |z|), `saturated` and
      `flushed` (shares of elements beyond the largest value, of nonzero ones that became zero).
    * `heads`: site name → kl [heads, formats] of tensors with a head axis.
    All tensors fp64. `unpriced` lists operations whose effect is in no price, `unpriced_share` is
    their share of all operations that make floats. `reference` is the run that was priced.
    """

    sites: tuple[SiteInfo, ...]
    formats: tuple[str, ...]
    kl: Tensor
    kl_element: Tensor
    kl_row: Tensor
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
    reference: Reference

    def index(self, name: str) -> int:
        """The row of the site called `name`; KeyError if there is none."""
        return self._rows[name]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {site.name: i for i, site in enumerate(self.sites)}

    def total(self, fmt: str, names: Collection[str] | None = None) -> float:
        """Sum of the prices of the named sites (all) in `fmt`; unknown ones are left out."""
        return self._sum(self.kl, fmt, names)

    def total_margin_variance(self, fmt: str, names: Collection[str] | None = None) -> float:
        """Sum of the margin variances, for halfulp.check.reference.predicted_flips."""
        return self._sum(self.margin_variance, fmt, names)

    def _sum(self, table: Tensor, fmt: str, names: Collection[str] | None) -> float:
        column = table[:, self.formats.index(fmt)]
        kept = [i for i, s in enumerate(self.sites) if names is None or s.name in names]
        return column[kept].nan_to_num(nan=0.0, posinf=float("inf")).sum().item()


def price(
    model: nn.Module,
    batch: Batch,
    *,
    formats: Sequence[str] = DEFAULT_FORMATS,
    families: Collection[str] | None = None,
    sites: Collection[str] = (),
    probes: int = 2,
    seed: int = 0,
    rows: float = 1.0,
    margins: bool = True,
    hints: Mapping[str, str] | None = None,
    attention: str = "eager",
) -> Prices:
    """Price every site of `families` and the named `sites` in every format.

    * Without either, the stored sites are priced.
    * Costs one forward pass and probes + 1 backward passes (`margins` is the last one) plus a pass
      over the data per format and probe. The model is unchanged afterwards.
    * `rows` < 1 uses a random share of the rows of large tensors, scaled up: unbiased.
    * The same seed gives the same result. Computed in the dtype of the model (fp32 or fp64).
    Raises CheckError for models that cannot be a reference (halfulp.check.setup.prepare), for a
    reference run that is not finite, and when no asked site exists.
    """

    named = frozenset(sites)
    kinds = families if families is not None else () if named else ("stored",)

    def wanted(info: SiteInfo) -> bool:
        return info.name in named or info.family in kinds

    roundings = [Rounding.of(word) for word in formats]
    for link in (True, False):
        pricer = Pricer(roundings, wanted, seed, rows, link)
        with prepare(model, attention=attention), _gradients(model, pricer, hints):
            try:
                reference = pricer.run(model, batch, probes, margins)
            except Relink:
                continue
            except NotFinite:
                reference = None
        if reference is None:
            raise non_finite_error(model, batch, hints=hints, attention=attention)
        prices = _collect(pricer, reference, tuple(formats), probes)
        pricer.release()
        return prices
    raise AssertionError("unreachable: without links nothing asks for another run")


def _collect(pricer: Pricer, reference: Reference, formats: tuple[str, ...], probes: int) -> Prices:
    infos = [i for i in pricer.walk.infos.values() if i.name in pricer.records]
    known = {i.name for i in infos}
    for identity, record in pricer.parameters.items():
        if record.runs or identity in pricer.walk.used:
            infos += [i for i in record.infos if i.name not in known]
    tables = [_tables(pricer, pricer.records[i.name], reference.tokens, probes) for i in infos]
    stacked = {
        name: torch.stack([t[name] for t in tables], dim=-2) for name in (*_TABLES, "probes")
    }
    heads = {i.name: t["heads"] for i, t in zip(infos, tables, strict=True) if "heads" in t}
    unpriced = tuple(dict.fromkeys([*pricer.walk.unpriced, *pricer.unpriced]))
    made = sum(i.family == "stored" for i in pricer.walk.infos.values()) + len(unpriced)
    return Prices(
        sites=tuple(infos),
        formats=formats,
        kl=torch.maximum(stacked["element"], stacked["row"]),
        kl_element=stacked["element"],
        kl_row=stacked["row"],
        kl_probes=stacked["probes"],
        kl_stochastic=stacked["stochastic"],
        margin_variance=stacked["margin"],
        shrinkage=stacked["shrinkage"],
        z=stacked["z"],
        saturated=stacked["saturated"],
        flushed=stacked["flushed"],
        heads=heads,
        unpriced=unpriced,
        unpriced_share=len(unpriced) / max(made, 1),
        reference=reference,
    )


_TABLES = (
    "element", "row", "stochastic", "margin", "shrinkage", "z", "saturated", "flushed"
)  # fmt: skip


def _tables(pricer: Pricer, record: Record, tokens: int, probes: int) -> dict[str, Tensor]:
    """Everything about one record, [formats] each; NaN where no gradient came."""
    n = len(pricer.roundings)
    unknown = torch.full((n,), torch.nan, dtype=torch.float64)
    if record.side is None or record.beyond is None:
        return dict.fromkeys(_TABLES, unknown) | {"probes": unknown.expand(probes, n)}
    runs, side, beyond = [record.runs[k] for k in range(probes)], record.side, record.beyond
    element = torch.stack([r.elements for r in runs]) / (2 * tokens)
    row = torch.stack([r.rows for r in runs]) / (2 * tokens)
    margin = record.runs.get(pricer.margin_turn)
    variance = unknown if margin is None else torch.maximum(margin.elements, margin.rows) / tokens
    zs = torch.stack([r.total / r.elements.sqrt() for r in runs]).nan_to_num(nan=0.0)
    least = 1 / torch.Size(record.infos[0].shape).numel()
    priced = {
        "element": element.mean(0),
        "row": row.mean(0),
        "probes": torch.maximum(element, row),
        "stochastic": element.mean(0) * side.stochastic,
        "margin": variance,
    }
    table = {name: t.masked_fill(beyond, torch.inf) for name, t in priced.items()} | {
        "shrinkage": side.shrinkage,
        "z": zs.gather(0, zs.abs().argmax(0, keepdim=True))[0],
        "saturated": torch.where(beyond, side.saturated.clamp(min=least), side.saturated),
        "flushed": side.flushed,
    }
    if record.heads and all(r.parts is not None for r in runs):
        table["heads"] = _per_head(runs) / (2 * tokens)
    return table


def _per_head(runs: list[Sums]) -> Tensor:
    """[heads, formats]: max(element, row) of the rows of each head, mean over the probes."""
    total = torch.stack([r.parts for r in runs if r.parts is not None]).mean(0)
    return total.amax(0).T.contiguous()


@contextmanager
def _gradients(model: nn.Module, pricer: Pricer, hints: Mapping[str, str] | None) -> Iterator[None]:
    """Gradients flow to what is priced, into nothing; everything is put back on exit."""
    places = Places(model, hints)
    stored = parameter_sites(model, places)
    before = {i: (s.tensor.requires_grad, s.tensor.grad) for i, s in stored.items()}
    uses: dict[int, int] = {}
    for module in model.modules():
        for p in module._parameters.values():
            uses[id(p)] = uses.get(id(p), 0) + 1
    handles = []
    pricer.walk = Walk(model, places, pricer, lift_no_grad=True)
    try:
        for i, s in stored.items():
            wanted = pricer.wanted(s.info)
            s.tensor.requires_grad_(wanted)
            s.tensor.grad = None
            if wanted:
                pricer.add_parameter(s, uses.get(i) == 1 and s.info.module in places.linear)
                handles.append(s.tensor.register_post_accumulate_grad_hook(pricer.accumulated))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for i, s in stored.items():
            s.tensor.requires_grad_(before[i][0])
            s.tensor.grad = before[i][1]
