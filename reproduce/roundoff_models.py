"""Round-off in trained models: depth, residual scaling, and which tensors do the damage.

Set-up. Byte-level models of 6 blocks of 128 channels, trained 1000 steps on the Python standard
library by `halfulp train`: one in GPT-2's style, one in Llama's. Held-out text of 128 bytes a row;
fp64 references; KL in nats/token. Intervals are over rows or batches.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from halfulp.blocks import BlockMap, block_map
from halfulp.check.composed import stream_bounds
from halfulp.check.measure import low_copy, measure, uniform
from halfulp.check.prices import Prices, price
from halfulp.check.profile import reference_copy, stream
from halfulp.check.reference import distance, reference_of
from halfulp.check.trace import trace
from halfulp.numerics.rounding import round_to
from reproduce.common import REFUTED, REPRODUCED, Result, interval, judge, show, together
from reproduce.roundoff import powers
from reproduce.streams import few_scores, random_scores, residual, rounded_scores
from reproduce.toy import Toy, prepare, toy, untrained

V1, V2 = "arXiv:2503.10251v1", "arXiv:2503.10251v2"
LAMP = "arXiv:2601.21623"
LAYERS = 6
SCALES = (1 / 64, 1 / 4, 1.0, 4.0, 16.0, 64.0)
U_BF16 = 2.0**-8


def claims(size: str = "full") -> Iterator[Result]:
    """The claims on trained models of `size` (as reproduce.toy names them), trained if need be."""
    families = ("gpt2", "llama")
    if size == "full":
        prepare(*families, size=size)
    models = [eager(toy(family, size)) for family in families]
    yield _worst_case(models)
    yield _residual_scale(models)
    yield _stored_stream(models)
    yield from _sites(models)
    yield _lamp(models)


def eager(model: Toy) -> Toy:
    """The model with attention whose scores can be seen."""
    module: nn.Module = model.model
    module.set_attn_implementation("eager")  # pyright: ignore[reportCallIssue]
    return model


@dataclass(frozen=True)
class Stream:
    """Errors at the points of the stream: median over tokens of ‖d‖∞/‖x‖∞, and of ‖x‖₂."""

    linf: list[float]
    norm: float  # at the last point


def compare(model: nn.Module, ids: Tensor, *, scale: float = 1.0, bf16: bool = False) -> Stream:
    """fp32 (or fp32 with the stream stored in bf16) against fp64, sublayer outputs × `scale`."""
    blocks, wide = block_map(model), reference_copy(model)
    with residual(wide, scale=scale):
        exact = stream(wide, ids, blocks, in_fp64=True)
    store = (lambda x: x.bfloat16().float()) if bf16 else None
    with residual(model, scale=scale, store=store):
        low = stream(model, ids, blocks)
    linf = [
        ((low[k].double() - x).abs().amax(-1) / x.abs().amax(-1)).median().item()
        for k, x in exact.items()
    ]
    last = next(reversed(exact.values()))
    return Stream(linf, last.norm(dim=-1).median().item())


@dataclass(frozen=True)
class Excess:
    """A run in `fmt` against its composed bound."""

    covered: bool  # every element of every point
    ratios: list[float]  # median bound over median error, per point
    linf: list[float]  # median over tokens of ‖d‖∞/‖x‖∞, per point


def excess(model: nn.Module, ids: Tensor, blocks: BlockMap, fmt: str) -> Excess:
    """How far the composed bound exceeds what a run of `model` in `fmt` gets wrong."""
    exact = stream(reference_copy(model), ids, blocks, in_fp64=True)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[fmt]
    got = stream(low_copy(model, dtype), ids, blocks)
    covered, ratios, linf = True, [], []
    for name, bound in stream_bounds(model, ids, fmt):
        if name in exact:
            off = (got[name].double() - exact[name]).abs()
            covered &= bool((off <= bound.error).all())
            ratios.append((bound.error.median() / off.median()).item())
            linf.append((off.amax(-1) / exact[name].abs().amax(-1)).median().item())
    return Excess(covered, ratios, linf)


def _worst_case(models: list[Toy]) -> Result:
    parts, verdicts = [], []
    for model in models:
        ids, blocks = model.batch(1)[:, :64], block_map(model.model)
        for fmt in ("fp32", "bf16"):
            run = excess(model.model, ids, blocks, fmt)
            growth = run.linf[-1] / run.linf[0]
            parts.append(
                f"{model.name} {fmt}: bound/error {run.ratios[0]:.0e} after one sublayer, "
                f"{run.ratios[1]:.0e} after one block, {run.ratios[-1]:.0e} at the end; error "
                f"{run.linf[0]:.1e} → {run.linf[-1]:.1e}"
            )
            verdicts.append(run.covered and run.ratios[1] >= 1e4 and growth < 10)
    return Result(
        "The worst-case bound over L blocks grows exponentially and the error does not (the "
        "bound holds for every element and is 10⁴ × the error after one block; the error grows "
        "less than 10 × over 6 blocks)",
        V1,
        "; ".join(parts),
        REPRODUCED if all(verdicts) else REFUTED,
    )


def _residual_scale(models: list[Toy]) -> Result:
    parts, verdicts = [], []
    for model in models:
        ids = model.batch(2)
        runs = {s: compare(model.model, ids, scale=s) for s in SCALES}
        kept = [runs[s].linf[-1] for s in SCALES if s >= 1]
        spread, grown = max(kept) / min(kept), runs[64.0].norm / runs[1.0].norm
        verdicts.append(spread <= 2.5 and grown >= 30)
        errors = ", ".join(f"{runs[s].linf[-1]:.1e}" for s in SCALES)
        parts.append(
            f"{model.name}: {errors} for s = 1/64, 1/4, 1, 4, 16, 64 (largest over smallest from "
            f"1 on {spread:.2f}) while ‖x‖₂ grows × {grown:.0f} from s = 1 to 64"
        )
    return Result(
        "Scaling all sublayer outputs by s preserves the relative error, whatever the stream's "
        "size (s = 1 … 64: gate 2.5 × while the norm grows 30 ×)",
        V2,
        "median ‖d‖∞/‖x‖∞ of fp32 at the end: " + "; ".join(parts),
        REPRODUCED if all(verdicts) else REFUTED,
    )


def _stored_stream(models: list[Toy]) -> Result:
    parts, values = [], []
    expected = U_BF16 * math.sqrt(2 * LAYERS)
    plain = [(m.name, m.model, m.batch(2)) for m in models]
    plain += [("gpt2, random weights", untrained("gpt2", layers=LAYERS), models[0].batch(2))]
    for name, model, ids in plain:
        ends = [compare(model, ids, scale=s, bf16=True).linf[-1] for s in (1.0, 64.0)]
        values += [end / expected for end in ends]
        parts.append(f"{name} {ends[0]:.1e} (s = 64: {ends[1]:.1e})")
    ratio = interval(values)
    return Result(
        "A residual stream stored in bf16 costs about u √(2L), whatever its scale and training "
        "(gate 0.4 to 1.6 × for L = 6)",
        "corollary of " + V2,
        f"median ‖d‖∞/‖x‖∞: {'; '.join(parts)}; u √(2L) = {expected:.1e}, measured over that "
        f"{ratio.text('.2f')}",
        judge(ratio, above=0.4, below=1.6),
    )


# Which sites matter, and what sparing them buys.

CLASSES = {
    "gpt2": (("scores",), ("scores", "logits"), ("layers.0", "logits", "emb")),
    "llama": (("scores",), ("scores", "logits"), ("logits", "residual")),
}


def _sites(models: list[Toy]) -> Iterator[Result]:
    priced = []
    for m in models:
        texts = [m.batch(8, index=i) for i in (0, 1)]
        names = trace(m.model, texts[0], "bf16").names  # what model.to(bfloat16) rounds
        priced.append([price(m.model, t, formats=("bf16",), sites=names) for t in texts])
    yield _ranking(models, priced)
    yield _additive(models, [pair[0] for pair in priced])


def _ranking(models: list[Toy], priced: list[list[Prices]]) -> Result:
    parts, verdicts = [], []
    for model, (first, second) in zip(models, priced, strict=True):
        a, b = first.kl[:, 0], second.kl[:, 0]
        known = (a > 0) & (b > 0)
        rho, spread = _spearman(a[known], b[known]), (a[known].max() / a[known].min()).item()
        shares: dict[str, float] = {}
        for site, kl in zip(first.sites, a.nan_to_num(), strict=True):
            shares[site.kind] = shares.get(site.kind, 0.0) + kl.item() / first.total("bf16")
        top = sorted(shares.items(), key=lambda item: -item[1])[:4]
        verdicts.append(rho >= 0.9 and spread >= 1e3)
        parts.append(
            f"{model.name}: {int(known.sum())} sites, prices spread × {spread:.0e}, rank "
            f"correlation between two texts {rho:.3f}; "
            + ", ".join(f"{kind} {share:.0%}" for kind, share in top)
        )
    return Result(
        "Some tensors matter far more than others (bf16 prices spread over 10³), and the ranking "
        "does not depend on the text (gate: Spearman 0.9)",
        V2,
        "; ".join(parts),
        REPRODUCED if all(verdicts) else REFUTED,
    )


def _spearman(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([t.argsort().argsort().double() for t in (a, b)])
    return torch.corrcoef(ranks)[0, 1].item()


def _additive(models: list[Toy], priced: list[Prices]) -> Result:
    parts, ratios = [], []
    for model, prices in zip(models, priced, strict=True):
        batch = model.batch(8, index=0)
        reference, texts = prices.reference, []
        for spared in ((), *CLASSES[model.name.split("-")[0]]):
            names = [
                s.name
                for s in prices.sites
                if s.kind not in spared and not any(s.block.startswith(w) for w in spared)
            ]
            predicted = prices.total("bf16", set(names))
            found = measure(model.model, batch, uniform(names, "bf16"), reference).kl
            ratios.append(predicted / found)
            what = " and ".join(spared) or "none"
            texts.append(f"{what} {predicted:.1e}/{found:.1e}")
        parts.append(f"{model.name}: {', '.join(texts)}")
    low, high = min(ratios), max(ratios)
    return Result(
        "Mitigation adds up: the KL of bf16 with some classes kept in fp32 is the sum of the "
        "prices of the rest (gate 0.8 to 1.3)",
        "derived",
        f"predicted/measured nats, by what is kept in fp32: {'; '.join(parts)}; ratios "
        f"{low:.2f} to {high:.2f}",
        REPRODUCED if low >= 0.8 and high <= 1.3 else REFUTED,
    )


# LAMP.


def lamp_gains(model: nn.Module, ids: Tensor, fmt: str, tau: float) -> tuple[float, float, float]:
    """(KL gain of LAMP's choice, of a random choice of the same size, share recomputed)."""
    generator, kls, recomputed = torch.Generator().manual_seed(0), [], 0.0
    with torch.no_grad():
        reference = reference_of(model(ids).logits)
        for chosen in (None, few_scores(tau), random_scores(tau, generator)):
            with rounded_scores(lambda x: round_to(x, fmt), chosen) as shares:
                kls.append(distance(reference, model(ids).logits).kl)
            recomputed = sum(shares) / len(shares) if shares else 0.0
    return kls[0] / kls[1], kls[0] / kls[2], recomputed


def _lamp(models: list[Toy]) -> Result:
    parts, verdicts = [], []
    for model in models:
        for fmt, name in (("e8m3", "4 bits"), ("bf16", "bf16")):
            rows = [lamp_gains(model.model, model.batch(2, index=i), fmt, 0.1) for i in range(6)]
            gain, control = (interval([math.log(row[i]) for row in rows]) for i in (0, 1))
            verdicts += [judge(gain, above=math.log(15)), judge(control, below=math.log(1.5))]
            parts.append(
                f"{model.name}, {name}: KL {powers(gain)} × lower with {rows[0][2]:.0%} of the "
                f"scores recomputed; as many at random {powers(control)} ×"
            )
    return Result(
        "Few attention scores carry the damage of rounding them: recomputing the largest p (1 − p) "
        "until Σ ≤ 0.1 (gate 15 ×; a random set at most 1.5 ×)",
        LAMP,
        "; ".join(parts),
        together(*verdicts),
    )


if __name__ == "__main__":
    show(claims())
