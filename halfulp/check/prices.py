"""Prices: what rounding each site to each format costs, in nats per token, by adjoints.

One forward pass and one backward pass per probe. A probe is v_t = r_t (e_y − p_t) with labels y
sampled from the model's own distribution and random signs r (spec roundoff §3.2): E_v (g·e)² over
the gradient g of v at a site is twice the KL that the error e of the site causes. Sums stream
through gradient hooks; nothing of the backward pass is kept.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfulp.check.formats import DEFAULT_FORMATS
from halfulp.check.places import Places
from halfulp.check.reference import Reference, reference_of
from halfulp.check.sites import (
    MASKED,
    Batch,
    SiteInfo,
    Stored,
    Walk,
    kept_positions,
    parameter_sites,
    prepare,
    run,
)
from halfulp.check.sums import Rounding, Sums, error_sums, tensor_scales
from halfulp.errors import CheckError
from halfulp.numerics.random import Key

Wanted = Callable[[SiteInfo], bool]


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
        return {site.name: i for i, site in enumerate(self.sites)}[name]

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
    families: Collection[str] = ("stored",),
    sites: Collection[str] | None = None,
    probes: int = 2,
    seed: int = 0,
    rows: float = 1.0,
    margins: bool = True,
    hints: Mapping[str, str] | None = None,
    attention: str = "eager",
) -> Prices:
    """Price every site of `families` (or just the named `sites`) in every format.

    * Costs one forward pass and probes + 1 backward passes (`margins` is the last one) plus a pass
      over the data per format and probe. The model is unchanged afterwards.
    * `rows` < 1 uses a random share of the rows of large tensors, scaled up: unbiased.
    * The same seed gives the same result. Computed in the dtype of the model (fp32 or fp64).
    Raises CheckError for models that cannot be a reference (halfulp.check.sites.prepare).
    """

    def wanted(info: SiteInfo) -> bool:
        return info.name in sites if sites is not None else info.family in families

    roundings = [Rounding.of(word) for word in formats]
    for link in (True, False):
        pricer = _Pricer(roundings, wanted, seed, rows, link)
        with prepare(model, attention=attention), _gradients(model, pricer, hints):
            try:
                reference = pricer.run(model, batch, probes, margins)
            except _Relink:
                continue
        return pricer.prices(reference, tuple(formats), probes)
    raise AssertionError("unreachable: without links nothing asks for another run")


class _Relink(Exception):
    """A parameter taken to be used once is used again: its uses must be told apart."""


@dataclass
class _Record:
    """A tensor under several names (a use may be an operand and a cast), and its sums per run."""

    infos: list[SiteInfo]
    x: Tensor
    transposed: bool = False
    heads: int = 0
    key: Key = field(default_factory=lambda: Key(0, 0))
    scales: list[Tensor | None] | None = None
    masked: bool = False
    share: float = 1.0
    runs: dict[int, Sums] = field(default_factory=dict)


class _Pricer:
    """The visitor that hooks every wanted site, and the runs of the backward pass."""

    def __init__(
        self, roundings: list[Rounding], wanted: Wanted, seed: int, rows: float, link: bool
    ) -> None:
        self.roundings, self.wanted, self.seed, self.rows = roundings, wanted, seed, rows
        self.link = link
        self.generator = torch.Generator().manual_seed(seed)
        self.records: dict[str, _Record] = {}
        self.by_storage: dict[int, list[_Record]] = {}
        self.parameters: dict[int, _Record] = {}
        self.linked: set[int] = set()
        self.single: set[int] = set()
        self.unpriced: list[str] = []
        self.turn, self.last = 0, False
        self.walk: Walk

    # What the walk calls.

    def operand(self, infos: tuple[SiteInfo, ...], x: Tensor, transposed: bool) -> Tensor:
        wanted = [info for info in infos if self.wanted(info)]
        if not wanted:
            return x
        if id(x) in self.single:
            record = self.parameters[id(x)]
            if record.transposed == transposed:
                if id(x) in self.linked:
                    raise _Relink
                self.linked.add(id(x))
                self._name(record, wanted)
                return x
        x = x if x.requires_grad else x.detach().requires_grad_()
        alias = x.view_as(x)
        self._watch(alias, wanted, transposed)
        return alias

    def output(
        self, info: SiteInfo, x: Tensor, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        if not self.wanted(info):
            return x
        if info.family == "cast":
            x = x.view_as(x)
        if not torch.is_grad_enabled() or (inplace and (x._is_view() or not x.requires_grad)):
            self.unpriced.append(info.name)
            return x
        if not x.requires_grad:
            x = x.detach().requires_grad_().clone()
        self._watch(x, [info], False)
        return x

    def writes(self, x: Tensor) -> None:
        for record in self.by_storage.pop(x.untyped_storage().data_ptr(), ()):
            record.x = record.x.clone()

    def _watch(self, x: Tensor, infos: list[SiteInfo], transposed: bool) -> None:
        record = _Record(infos=[], x=x.detach(), transposed=transposed)
        if x.ndim == 4 and infos[0].block.endswith(".attn"):
            record.heads = x.shape[1]
        self._name(record, infos)
        self.by_storage.setdefault(x.untyped_storage().data_ptr(), []).append(record)
        x.register_hook(lambda g: self._process(record, g))

    def _name(self, record: _Record, infos: list[SiteInfo]) -> None:
        record.key = record.key if record.infos else Key.of(self.seed, infos[0].name)
        record.infos += infos
        self.records |= {info.name: record for info in infos}

    def add_parameter(self, stored: Stored, single: bool) -> None:
        """Price a parameter or buffer by the gradient that accumulates in it."""
        record = _Record(infos=[], x=stored.tensor.detach(), transposed=stored.transposed)
        if self.wanted(stored.info):
            self._name(record, [stored.info])
        self.parameters[id(stored.tensor)] = record
        if single and self.link:
            self.single.add(id(stored.tensor))

    def accumulated(self, p: Tensor) -> None:
        """The hook of parameters: take the gradient and leave none behind."""
        record, g, p.grad = self.parameters[id(p)], p.grad, None
        if record.infos and g is not None:
            self._process(record, g)

    # The runs.

    def run(self, model: nn.Module, batch: Batch, probes: int, margins: bool) -> Reference:
        with torch.enable_grad(), self.walk:
            logits = run(model, batch)
        keep = kept_positions(batch, logits)
        reference = reference_of(logits, keep)
        turns = probes + margins
        for turn in range(turns):
            self.turn, self.last = turn, turn == turns - 1
            v = self._probe(reference) if turn < probes else self._margin(reference)
            full = torch.zeros_like(logits) if keep is not None else v.view_as(logits)
            if keep is not None:
                full[keep] = v
            logits.backward(full, retain_graph=not self.last)
        self.margin_turn = probes if margins else -1
        return reference

    def _signs(self, n: int) -> Tensor:
        return torch.randint(0, 2, (n, 1), generator=self.generator) * 2.0 - 1.0

    def _probe(self, reference: Reference) -> Tensor:
        p = reference.logits.softmax(-1)
        y = torch.multinomial(p.cpu(), 1, generator=self.generator).to(p.device)
        v = p.neg_().scatter_add_(1, y, torch.ones_like(y, dtype=p.dtype))
        return v.mul_(self._signs(len(v)).to(v))

    def _margin(self, reference: Reference) -> Tensor:
        top = reference.logits.topk(2, -1).indices
        signs = self._signs(len(top)).to(reference.logits)
        v = torch.zeros_like(reference.logits)
        return v.scatter_(1, top, torch.cat([signs, -signs], 1))

    def _process(self, record: _Record, g: Tensor) -> None:
        if g.layout is not torch.strided:
            g = g.to_dense()
        x2, g2 = (_rows(t, record.transposed) for t in (record.x, g.detach()))
        if record.scales is None:
            low, high = x2.aminmax()
            record.masked = bool(low <= MASKED)
            if record.masked:
                low = x2.masked_fill(x2 <= MASKED, 0.0).amin()
            record.scales = tensor_scales(self.roundings, torch.maximum(high, -low))
        if record.masked:
            x2 = x2.masked_fill(x2 <= MASKED, 0.0)
        x2, g2 = self._sample(record, x2, g2)
        record.runs[self.turn] = error_sums(
            x2.contiguous(),
            g2.to(x2.dtype).contiguous(),
            self.roundings,
            record.scales,
            full=self.turn == 0,
            per_row=record.heads > 0,
            key=record.key,
        )
        if self.last:
            record.x = record.x.new_empty(0)

    def _sample(self, record: _Record, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        count = int(len(x) * self.rows)
        if self.rows >= 1 or count < 64 or record.heads:
            return x, g
        record.share = count / len(x)
        at = torch.randperm(len(x), generator=self.generator)[:count].to(x.device)
        return x[at], g[at]

    # The result.

    def prices(self, reference: Reference, formats: tuple[str, ...], probes: int) -> Prices:
        infos = [i for i in self.walk.infos.values() if i.name in self.records]
        known = {i.name for i in infos}
        for identity, record in self.parameters.items():
            if record.runs or identity in self.walk.used:
                infos += [i for i in record.infos if i.name not in known]
        tables = [self._tables(self.records[i.name], reference.tokens, probes) for i in infos]
        names = ("element", "row", "probes", "stochastic", "margin", "shrinkage", "z")
        stacked = {
            name: torch.stack([t[name] for t in tables], dim=-2)
            for name in (*names, "saturated", "flushed")
        }
        heads = {i.name: t["heads"] for i, t in zip(infos, tables, strict=True) if "heads" in t}
        unpriced = tuple(dict.fromkeys([*self.walk.unpriced, *self.unpriced]))
        made = sum(i.family == "stored" for i in self.walk.infos.values()) + len(unpriced)
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

    def _tables(self, record: _Record, tokens: int, probes: int) -> dict[str, Tensor]:
        """Everything about one record, [formats] each; NaN where no gradient came."""
        n = len(self.roundings)
        unknown = torch.full((n,), torch.nan, dtype=torch.float64)
        if 0 not in record.runs:
            table = dict.fromkeys(
                ("element", "row", "stochastic", "margin", "shrinkage", "z", "saturated",
                 "flushed"), unknown,
            )  # fmt: skip
            return table | {"probes": unknown.expand(probes, n)}
        runs = [record.runs[k] for k in range(probes)]
        first, scale = runs[0], 1.0 / (tokens * record.share)
        element = torch.stack([r.elements for r in runs]) * (scale / 2)
        row = torch.stack([r.rows for r in runs]) * (scale / 2)
        size = record.share * _numel(record.infos[0])
        saturated = first.saturated / size
        overflow = torch.tensor([not r.quantizer.saturate for r in self.roundings])
        beyond = overflow & (saturated > 0)
        margin = record.runs.get(self.margin_turn)
        zs = torch.stack([r.total / r.elements.sqrt() for r in runs]).nan_to_num(nan=0.0)
        table = {
            "element": element.mean(0).masked_fill(beyond, torch.inf),
            "row": row.mean(0).masked_fill(beyond, torch.inf),
            "probes": torch.maximum(element, row).masked_fill(beyond, torch.inf),
            "stochastic": (first.stochastic * (scale / 2)).masked_fill(beyond, torch.inf),
            "margin": unknown
            if margin is None
            else (torch.maximum(margin.elements, margin.rows) * scale).masked_fill(
                beyond, torch.inf
            ),
            "shrinkage": first.ex / max(first.xx, 1e-300),
            "z": zs.gather(0, zs.abs().argmax(0, keepdim=True))[0],
            "saturated": saturated,
            "flushed": (first.nonzero + first.flushed) / max(first.nonzero, 1.0),
        }
        if record.heads:
            table["heads"] = _per_head(runs, record) * (scale / 2)
        return table


def _per_head(runs: list[Sums], record: _Record) -> Tensor:
    """[heads, formats]: max(element, row) of the rows of each head, mean over the probes."""
    total = torch.stack([r.of_rows for r in runs if r.of_rows is not None]).mean(0)
    batch = record.infos[0].shape[0]
    split = total.unflatten(2, (batch, record.heads, -1)).sum((2, 4))
    return split.amax(0).T.contiguous()


def _rows(x: Tensor, transposed: bool) -> Tensor:
    """[rows, K]: the last axis, or the one before it, as rows."""
    if x.ndim == 0:
        return x.reshape(1, 1)
    x = x.mT if transposed else x
    return x.reshape(-1, x.shape[-1])


def _numel(info: SiteInfo) -> int:
    return torch.Size(info.shape).numel()


@contextmanager
def _gradients(
    model: nn.Module, pricer: _Pricer, hints: Mapping[str, str] | None
) -> Iterator[None]:
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
    if not pricer.records:
        raise CheckError(
            "none of the asked sites exists in this model. Ask for families among stored, operand "
            "and cast, or for names that halfulp.check.price found in this model."
        )
