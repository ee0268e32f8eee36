"""Prices of `halfulp check` beside the scores that one would use today, site by site.

The truth is the KL of one run per site and format. Everything is in nats/token of the same text, so
that a score can be compared by its ratio as well as by its ranking.
"""

import copy
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from common import section, table
from torch import Tensor, nn

from halfulp.batch import run
from halfulp.check.measure import measure, reference, round_tensor
from halfulp.check.places import Places
from halfulp.check.prices import price
from halfulp.check.setup import prepare
from halfulp.check.sites import MASKED, SiteInfo, Walk, parameter_sites
from halfulp.check.sums import Rounding
from halfulp.check.trace import trace

FORMATS = ("bf16", "e4m3", "e5m2", "e2m1")
ROWS, RESAMPLES, PROBES = 4, 1000, (1, 2)
TRUTH, MSE = "one run per site and format", "relative MSE of the tensor"
SIGNED, FISHER = "data labels, our formula", "data-label Fisher, Σ(ge)²/2"
TAYLOR = "data-label Taylor, Σabs(ge)"


def ours(probes: int) -> str:
    return f"price, K = {probes}"


@dataclass
class Labels:
    """The visitor that scores sites with the labels of the data, and by their relative error.

    With `signs`, each token's loss gets a random sign, as our probes do; without, g is the gradient
    of the summed loss. `scores`: method → [sites, formats] in nats/token, keyed by site and format.
    """

    names: frozenset[str]
    roundings: tuple[Rounding, ...]
    tokens: int
    signs: bool = True
    scores: dict[tuple[str, str, str], float] = field(default_factory=dict)

    def operand(self, infos: tuple[SiteInfo, ...], x: Tensor, transposed: bool) -> Tensor:
        return x

    def output(
        self, info: SiteInfo, x: Tensor, inputs: tuple[Tensor, ...], inplace: bool
    ) -> Tensor:
        if info.name not in self.names:
            return x
        if info.family == "cast":
            x = x.view_as(x)
        if not x.requires_grad:
            x = x.detach().requires_grad_().clone()
        kept = x.detach().clone()
        x.register_hook(lambda g: self.add(info.name, kept, g))
        return x

    def writes(self, x: Tensor) -> None:
        pass

    def add(self, name: str, x: Tensor, g: Tensor, transposed: bool = False) -> None:
        """Scores of one tensor with gradient `g`."""
        for r in self.roundings:
            e = (round_tensor(x, r, name=name, transposed=transposed) - x).double()
            ge = (g * e).mT if transposed else g * e
            element, row = ge.square().sum(), ge.reshape(-1, ge.shape[-1]).sum(1).square().sum()
            if self.signs:
                found = {SIGNED: torch.maximum(element, row) / 2}
            else:
                size = x.masked_fill(x <= MASKED, 0.0).double().square().sum()
                mse = e.square().sum() / size.clamp(min=1e-30) * self.tokens
                found = {FISHER: element / 2, TAYLOR: ge.abs().sum(), MSE: mse}
            for method, score in found.items():
                self.scores[method, name, r.word] = score.item() / self.tokens


def label_scores(model: nn.Module, ids: Tensor, names: frozenset[str], *, seed: int) -> Labels:
    """Scores of `names` from two backward passes with the next tokens of `ids` as labels."""
    model = copy.deepcopy(model).requires_grad_()
    visitor = Labels(names, tuple(map(Rounding.of, FORMATS)), ids[:, 1:].numel())
    with prepare(model):
        places = Places(model)
        stored = [s for s in parameter_sites(model, places).values() if s.info.name in names]
        for visitor.signs in (True, False):
            model.zero_grad()
            with Walk(model, places, visitor, lift_no_grad=True):
                logits = run(model, ids)[:, :-1].flatten(0, 1)
            losses = nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
            generator = torch.Generator().manual_seed(seed)
            signs = torch.randint(0, 2, losses.shape, generator=generator) * 2.0 - 1
            (losses * signs if visitor.signs else losses).sum().backward()
            for s in stored:
                if s.tensor.grad is not None:
                    visitor.add(s.info.name, s.tensor.detach(), s.tensor.grad, s.transposed)
    return visitor


@dataclass(frozen=True)
class Compared:
    """Scores of every method, fp64 [seeds, formats, sites], the truth, and costs in forwards."""

    scores: Mapping[str, Tensor]
    truth: Tensor  # fp64 [formats, sites]
    forwards: Mapping[str, float]
    dropped: int  # sites that some method does not see, or that no format changes
    vectors: Tensor  # bool [sites]: biases and gains, one row each


def compare(model: nn.Module, ids: Tensor, seeds: int) -> Compared:
    """Every site that a bf16 program of `model` rounds, each alone in each of FORMATS.

    Scores that draw labels or signs are drawn `seeds` times.
    """
    names = trace(model, ids, "bf16").names
    asked = {"formats": FORMATS, "sites": names, "margins": False}
    forward = seconds(lambda: plain_forward(model, ids), 20)
    cost = {ours(k): seconds(lambda k=k: price(model, ids, probes=k, **asked)) / forward
            for k in PROBES}  # fmt: skip
    runs = {k: [price(model, ids, probes=k, seed=s, **asked) for s in range(seeds)] for k in PROBES}
    sites = runs[1][0].sites
    ref, start = reference(model, ids), time.process_time()
    truth = torch.tensor(
        [[measure(model, ids, {s.name: w}, ref).kl for s in sites] for w in FORMATS],
        dtype=torch.float64,
    )
    cost[TRUTH] = (time.process_time() - start) / forward
    cost |= dict.fromkeys((SIGNED, FISHER, TAYLOR), cost[ours(1)])  # the same passes and sums
    cost |= {MSE: mse_cost(model, ids, names) / forward}
    by_labels = [label_scores(model, ids, names, seed=s) for s in range(seeds)]
    scores = {ours(k): torch.stack([p.kl.T for p in made]) for k, made in runs.items()}
    for method in (SIGNED, FISHER, TAYLOR, MSE):
        some = by_labels if method == SIGNED else by_labels[:1]
        scores[method] = torch.stack([_matrix(f, method, [s.name for s in sites]) for f in some])
    seen = torch.stack([t.nan_to_num(nan=0.0).amin((0, 1)) for t in scores.values()]).amin(0)
    kept = (seen > 0) & (truth.amin(0) > 0)
    return Compared(
        scores={method: t[..., kept] for method, t in scores.items()},
        truth=truth[:, kept],
        forwards=cost,
        dropped=int((~kept).sum()),
        vectors=torch.tensor([len(s.shape) < 2 for s in sites])[kept],
    )


def _matrix(found: Labels, method: str, names: list[str]) -> Tensor:
    rows = [[found.scores.get((method, n, w), torch.nan) for n in names] for w in FORMATS]
    return torch.tensor(rows, dtype=torch.float64)


def plain_forward(model: nn.Module, ids: Tensor) -> None:
    """The reference run alone, with attention that has scores."""
    with prepare(model), torch.no_grad():
        model(ids)


def mse_cost(model: nn.Module, ids: Tensor, names: frozenset[str]) -> float:
    """Seconds of a forward pass that notes the relative error of every site."""
    roundings = list(map(Rounding.of, FORMATS))

    class Squares(Labels):
        def output(self, info, x, inputs, inplace):
            if info.name in names:
                squares(x)
            return x

    def squares(x: Tensor) -> list[Tensor]:
        return [(round_tensor(x, r) - x).square().sum() / x.square().sum() for r in roundings]

    def work() -> None:
        with prepare(model), torch.no_grad():
            places = Places(model)
            for s in parameter_sites(model, places).values():
                squares(s.tensor)
            with Walk(model, places, Squares(names, (), 1)):
                run(model, ids)

    return seconds(work)


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """CPU seconds of one call, the least of some."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def ranks(x: Tensor) -> Tensor:
    """Ranks along the last axis, equal values their mean rank; fp64."""
    order = x.sort(-1).values
    low, high = (torch.searchsorted(order, x.contiguous(), right=right) for right in (False, True))
    return (low + high).double() / 2


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation along the last axis."""
    a, b = (r - r.mean(-1, keepdim=True) for r in (ranks(a), ranks(b)))
    return (a * b).sum(-1) / (a.square().sum(-1) * b.square().sum(-1)).sqrt()


def mean_spearman(score: Tensor, truth: Tensor) -> Tensor:
    """Mean over the seeds of `score` [seeds, ..., sites]."""
    return spearman(score, truth.expand_as(score)).mean(0)


def median_ratio(score: Tensor, truth: Tensor) -> Tensor:
    """Of all sites and seeds."""
    return (score / truth).movedim(0, -1).flatten(-2).median(-1).values


def interval(statistic: Callable[[Tensor], Tensor], sites: int, show: str = "") -> str:
    """`statistic` of all sites, with the central 95% of its values over resampled ones.

    `statistic` is given indices of sites [..., sites].
    """
    generator = torch.Generator().manual_seed(0)
    at = torch.randint(0, sites, (RESAMPLES, sites), generator=generator)
    ends = statistic(at).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    middle, low, high = (short(x, show) for x in (statistic(torch.arange(sites)).item(), *ends))
    return f"{middle} [{low}, {high}]"


def short(x: float, show: str = "") -> str:
    """Three digits after the point at most, and about three in all."""
    if show or abs(x) < 1:
        return f"{x:{show or '.3f'}}"
    return f"{x:.2f}" if abs(x) < 10 else f"{x:.0f}" if abs(x) < 1000 else f"{x:.0e}"


def spread(score: Tensor, truth: Tensor) -> str:
    """5% and 95% of score over truth, over sites and seeds."""
    ends = torch.tensor([0.05, 0.95], dtype=torch.float64)
    return "–".join(short(x) for x in (score / truth).flatten().quantile(ends).tolist())


def report(name: str, c: Compared) -> None:
    """Two tables: how well each method ranks, and how far its values are from the truth."""
    sites = c.truth.shape[1]
    ranked, sized = [], []
    for method, score in c.scores.items():
        pairs = [(score[:, i], t) for i, t in enumerate(c.truth)]
        cost = f"{c.forwards[method]:.0f}" if method in c.forwards else ""
        rho = [interval(lambda at, a=a, t=t: mean_spearman(a[:, at], t[at]), sites)
               for a, t in pairs]  # fmt: skip
        ratio = [interval(lambda at, a=a, t=t: median_ratio(a[:, at], t[at]), sites)
                 for a, t in pairs]  # fmt: skip
        ranked.append([method, *rho, cost])
        sized.append([method, *(f"{r}; {spread(*p)}" for r, p in zip(ratio, pairs, strict=True))])
    ranked.append([TRUTH, *["1"] * len(FORMATS), f"{c.forwards[TRUTH]:.0f}"])
    head = ["Spearman [95% over sites]", *FORMATS, "forwards"]
    section(
        f"{name}: ranking {sites} sites by their measured KL, one at a time",
        f"{table(head, ranked)}\n\n{_gain(c)} {c.dropped} sites left out.",
    )
    head = ["median [95%]; 5%–95% of sites", *FORMATS]
    section(f"{name}: score over measured KL", f"{table(head, sized)}\n\n{_shapes(c)}")


def _gain(c: Compared) -> str:
    """The paired difference that sampled labels make."""

    def difference(i: int) -> str:
        a, b, t = c.scores[ours(1)][:, i], c.scores[SIGNED][:, i], c.truth[i]
        return interval(
            lambda at: mean_spearman(a[:, at], t[at]) - mean_spearman(b[:, at], t[at]),
            c.truth.shape[1],
            "+.3f",
        )

    parts = ", ".join(f"{w} {difference(i)}" for i, w in enumerate(FORMATS))
    return f"Sampled labels in place of the data's, K = 1, change the correlation by: {parts}."


def _shapes(c: Compared) -> str:
    """5%–95% of price over measurement for matrices, and for vectors."""
    score, parts = c.scores[ours(2)], []
    for what, which in (("matrices", ~c.vectors), ("vectors", c.vectors)):
        if not which.any():
            continue
        ends = (f"{w} {spread(score[:, i, which], c.truth[i, which])}"
                for i, w in enumerate(FORMATS))  # fmt: skip
        parts.append(f"{int(which.sum())} {what}: {', '.join(ends)}")
    return f"K = 2, 5%–95%, {'; '.join(parts)}."


def compare_toys(size: str, *, seeds: int, random: bool) -> None:
    """Both tables for the trained toys of reproduce/toy.py, which are trained if need be.

    `random`: also for a model with random weights, which is what is checked before a run.
    """
    sys.path.append(str(Path(__file__).parents[1]))
    from reproduce.toy import toy, untrained

    for family in ("gpt2", "llama"):
        made = toy(family, size)
        report(made.name, compare(made.model, made.batch(ROWS), seeds))
        if random and family == "llama":
            report("llama, random weights", compare(untrained(family), made.batch(ROWS), seeds))
