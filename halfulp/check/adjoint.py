"""The visitor that prices: gradient hooks at every wanted site, and the probes that run through."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfulp.batch import Batch, run
from halfulp.check.reference import Reference, reference_of
from halfulp.check.setup import kept_positions
from halfulp.check.sites import MASKED, SiteInfo, Stored, Walk
from halfulp.check.sums import (
    Rounding,
    Side,
    Sums,
    error_sums,
    side_sums,
    tensor_scales,
    whole_parts,
)
from halfulp.errors import CheckError
from halfulp.numerics.random import Key

_STRIDE = 4
Wanted = Callable[[SiteInfo], bool]


class Relink(Exception):
    """A parameter taken to be used once is used again: its uses must be told apart."""


class NotFinite(Exception):
    """The reference run has NaN or inf."""


@dataclass
class Record:
    """A tensor under several names (a use may be an operand and a cast), and its sums per run."""

    infos: list[SiteInfo]
    x: Tensor
    transposed: bool = False
    heads: int = 0
    key: Key = field(default_factory=lambda: Key(0, 0))
    scales: list[Tensor | None] | None = None
    masked: bool = False
    beyond: Tensor | None = None  # [formats] bool: some element overflows to inf
    side: Side | None = None
    runs: dict[int, Sums] = field(default_factory=dict)


class Pricer:
    """The visitor that hooks every wanted site, and the runs of the backward pass."""

    def __init__(
        self, roundings: list[Rounding], wanted: Wanted, seed: int, rows: float, link: bool
    ) -> None:
        self.roundings, self.wanted, self.seed, self.rows = roundings, wanted, seed, rows
        self.link = link
        self.generator = torch.Generator().manual_seed(seed)
        self.records: dict[str, Record] = {}
        self.by_storage: dict[int, list[Record]] = {}
        self.parameters: dict[int, Record] = {}
        self.linked: set[int] = set()
        self.single: set[int] = set()
        self.unpriced: list[str] = []
        self.turn, self.margin_turn, self.last = 0, -1, False
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
                    raise Relink
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
            if torch.equal(x, x.round()):
                return x  # counts and positions: a constant of integers is no site
            x = x.detach().requires_grad_().clone()
        self._watch(x, [info], False)
        return x

    def writes(self, x: Tensor) -> None:
        for record in self.by_storage.pop(x.untyped_storage().data_ptr(), ()):
            record.x = record.x.clone()

    def _watch(self, x: Tensor, infos: list[SiteInfo], transposed: bool) -> None:
        record = Record(infos=[], x=x.detach(), transposed=transposed)
        if x.ndim == 4 and infos[0].block.endswith(".attn"):
            record.heads = x.shape[1]
        self._name(record, infos)
        self.by_storage.setdefault(x.untyped_storage().data_ptr(), []).append(record)
        x.register_hook(lambda g: self._process(record, g))

    def _name(self, record: Record, infos: list[SiteInfo]) -> None:
        record.key = record.key if record.infos else Key.of(self.seed, infos[0].name)
        record.infos += infos
        self.records |= {info.name: record for info in infos}

    def add_parameter(self, stored: Stored, single: bool) -> None:
        """Price a parameter or buffer by the gradient that accumulates in it."""
        record = Record(infos=[], x=stored.tensor.detach(), transposed=stored.transposed)
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
        if not bool(torch.isfinite(logits).all()):
            raise NotFinite
        reference = reference_of(logits, keep)
        if not any(record.infos for record in self.records.values()):
            raise CheckError(
                "none of the asked sites exists in this model. Ask for families among stored, "
                "operand and cast, or for names that halfulp.check.prices.price found in it."
            )
        if not logits.requires_grad:
            return reference  # every site is detached
        turns = probes + margins
        self.margin_turn = probes if margins else -1
        for turn in range(turns):
            self.turn, self.last = turn, turn == turns - 1
            v = self._probe(reference) if turn < probes else self._margin(reference)
            full = torch.zeros_like(logits) if keep is not None else v.view_as(logits)
            if keep is not None:
                full[keep] = v
            logits.backward(full, retain_graph=not self.last)
        return reference

    def release(self) -> None:
        """Let go of the tensors that no gradient reached, and of the walk, which knows us."""
        for record in (*self.records.values(), *self.parameters.values()):
            record.x = torch.empty(0)
        self.by_storage.clear()
        del self.walk

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

    def _process(self, record: Record, g: Tensor) -> None:
        if g.layout is not torch.strided:
            g = g.to_dense()
        x2, g2 = (_rows(t, record.transposed) for t in (record.x, g.detach()))
        if record.scales is None:
            low, high = x2.aminmax()
            record.masked = bool(low <= MASKED)
            if record.masked:
                low = x2.masked_fill(x2 <= MASKED, 0.0).amin()
            amax = torch.maximum(high, -low)
            record.scales = tensor_scales(self.roundings, amax)
            record.beyond = torch.tensor([r.overflows(amax.item()) for r in self.roundings])
        if record.masked:
            x2 = x2.masked_fill(x2 <= MASKED, 0.0)
        self._add(record, x2.contiguous(), g2.to(x2.dtype).contiguous())
        if self.last:
            record.x = record.x.new_empty(0)

    def _add(self, record: Record, x: Tensor, g: Tensor) -> None:
        """Sums of one probe; the margin probe and side effects look at a quarter of the rows."""
        assert record.scales is not None
        wholes = whole_parts(x, self.roundings)
        margin = self.turn == self.margin_turn
        stride = _STRIDE if margin else max(1, round(1 / self.rows))
        per_row = record.heads > 0 and stride == 1
        rows, part = _stride(stride, record.key, x, g, wholes)
        sums = error_sums(*rows, self.roundings, record.scales, wholes=part, per_row=per_row)
        share = len(rows[0]) / len(x)
        for table in (sums.elements, sums.rows):
            table /= share
        if sums.parts is not None:  # rows of a head together: a tenth of the memory and less
            batch = record.infos[0].shape[0]
            sums.parts = sums.parts.unflatten(2, (batch, record.heads, -1)).sum((2, 4))
        record.runs[self.turn] = sums
        if self.turn == 0:
            rows, part = _stride(_STRIDE, record.key, x, g, wholes)
            record.side = side_sums(
                *rows, self.roundings, record.scales, wholes=part, key=record.key
            )


def _stride(
    stride: int, key: Key, x: Tensor, g: Tensor, wholes: Mapping[int, Tensor]
) -> tuple[tuple[Tensor, Tensor], dict[int, Tensor]]:
    """Every `stride`-th row from a random first one; all rows of a small tensor."""
    if stride == 1 or len(x) < 8 * stride:
        return (x, g), dict(wholes)
    at = slice(key.k0 % stride, None, stride)
    return (x[at].contiguous(), g[at].contiguous()), {i: y[at] for i, y in wholes.items()}


def _rows(x: Tensor, transposed: bool) -> Tensor:
    """[rows, K]: the last axis, or the one before it, as rows."""
    if x.ndim == 0:
        return x.reshape(1, 1)
    x = x.mT if transposed else x
    return x.reshape(-1, x.shape[-1])
