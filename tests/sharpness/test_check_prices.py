"""Two rooms, one number: ½ Σ h δ² of a weight and the KL price that `halfulp check` gives it.

Both estimate the KL of rounding one stored tensor: the forecast by sampled labels, the price by
signed residuals of labels of its own.
"""

from collections import defaultdict
from functools import cache

import torch

from halfulp.check.prices import Prices, price
from halfulp.sharpness.coherent import quadratic_form
from halfulp.sharpness.curvature import Curvature, measure_curvature
from halfulp.sharpness.rounding import terms
from halfulp.sharpness.weights import Weights, weight_quantizer
from tests.check.toys import spearman, trained

WORDS = ("e4m3", "nvfp4")


@cache
def both() -> tuple[Curvature, Prices]:
    toy = trained("gpt2")
    batch, names = toy.batch(4), dict(toy.model.named_parameters())
    known = measure_curvature(toy.model, [batch], draws=24, seed=0)
    sites = [f"weight:{name}" for name in names]
    prices = price(toy.model, batch, formats=WORDS, sites=sites, probes=8, seed=1, margins=False)
    return known, prices


def test_diagonal_forecasts_are_the_prices_of_check():
    known, prices = both()
    weights = Weights.of(trained("gpt2").model)
    kinds = defaultdict(set)
    for piece in known.pieces:
        kinds[piece.parameter].add(piece.kind)
    for word in WORDS:
        each, ours = terms(known, weights, weight_quantizer(word)).second, defaultdict(float)
        for piece, value in zip(known.pieces, each.tolist(), strict=True):
            ours[piece.parameter] += value
        column = prices.kl_element[:, WORDS.index(word)]
        theirs = {name: column[prices.index(f"weight:{name}")].item() for name in ours}
        for kind in ("emb", "pos", "vo", "ffn", "norm", "bias"):
            group = [n for n in ours if kind in kinds[n]]
            ratio = sum(ours[n] for n in group) / sum(theirs[n] for n in group)
            # 24 draws and 8 probes: about 20 % apart where queries and keys dominate (vo holds the
            # fused projections), 10 % elsewhere.
            assert 0.6 < ratio < 1.6, (word, kind, ratio)
        pairs = [torch.tensor([table[n] for n in ours]) for table in (ours, theirs)]
        assert spearman(*pairs) > 0.97


def test_quadratic_forms_are_the_row_prices_of_check():
    """A vector is one row: its price for errors that move together is ½ δᵀGδ."""
    model, (_, prices) = trained("gpt2").model, both()
    weights, batch = Weights.of(model), trained("gpt2").batch(4)
    names = [n for n, p in model.named_parameters() if p.ndim < 2 and ".ln_" in n]
    q, column = weight_quantizer("e4m3"), prices.kl_row[:, WORDS.index("e4m3")]
    ours = [quadratic_form(model, [batch], weights, {n: weights.error(n, q)}) for n in names]
    theirs = [column[prices.index(f"weight:{n}")].item() for n in names]
    # The price of a row is a sum of 8 squares of one Gaussian number per tensor.
    assert 0.6 < sum(ours) / sum(theirs) < 1.7
    assert spearman(torch.tensor(ours), torch.tensor(theirs)) > 0.85
