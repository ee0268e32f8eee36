"""Prices against measurement, one site at a time (A4-A6), and the sums they are made of."""

import copy
from dataclasses import dataclass, field

import pytest
import torch

from halfulp.batch import run
from halfulp.check.adjoint import Pricer
from halfulp.check.measure import (
    measure,
    reference,
    round_tensor,
)
from halfulp.check.places import Places
from halfulp.check.prices import Prices, price
from halfulp.check.reference import log_softmax
from halfulp.check.setup import prepare
from halfulp.check.sites import Walk, parameter_sites
from halfulp.check.sums import Rounding
from halfulp.check.trace import trace
from tests.check.toys import Words, spearman, trained

FAMILIES = ("gpt2", "llama")


# A4: the instrumentation. The signed change of the loss has no room for a wrong factor.


def loss_of(model, ids) -> float:
    """Sum of the cross entropies in fp64."""
    logits = log_softmax(model(ids).logits[:, :-1])
    return -logits.gather(-1, ids[:, 1:, None]).sum().item()


def signed_predictions(model, ids, monkeypatch) -> tuple[Prices, dict[str, float]]:
    """Σ g·e of every site for the gradient g of the loss, from the pricer's own sums."""

    def gradient(self, ref):
        v = ref.logits.softmax(-1).view(*ids.shape, -1)
        v[:, :-1].scatter_add_(2, ids[:, 1:, None], -torch.ones_like(v[:, 1:, :1]))
        v[:, -1] = 0
        return v.flatten(0, 1)

    sums: dict[str, float] = {}
    run_all = Pricer.run

    def run_and_keep(self, *args):
        reference = run_all(self, *args)
        sums.update({n: r.runs[0].total.item() for n, r in self.records.items() if r.runs})
        return reference

    monkeypatch.setattr(Pricer, "_probe", gradient)
    monkeypatch.setattr(Pricer, "run", run_and_keep)
    return price(model, ids, formats=("tf32",), probes=1, margins=False), sums


@pytest.mark.parametrize("family", FAMILIES)
def test_signed_loss_changes_of_11_bit_rounding(family, monkeypatch):
    toy = trained(family)
    model, ids = copy.deepcopy(toy.model).double(), toy.batch(2)
    prices, predicted = signed_predictions(model, ids, monkeypatch)
    monkeypatch.undo()
    # RoPE's angles reach 127 radians: 11 bits of them are no small error.
    names = [
        s.name
        for s, kl in zip(prices.sites, prices.kl[:, 0], strict=True)
        if kl > 0 and "rotary" not in s.name
    ]
    measured = []
    with prepare(model), torch.no_grad():
        before = loss_of(model, ids)
    for name in names:
        measured.append(_loss_with(model, ids, name) - before)
    p = torch.tensor([predicted[n] for n in names], dtype=torch.float64)
    m = torch.tensor(measured, dtype=torch.float64)
    assert len(names) > 60
    assert torch.corrcoef(torch.stack([p, m]))[0, 1] >= 0.9999
    assert (p - m).norm() / m.norm() <= 0.01


def _loss_with(model, ids, name) -> float:
    from halfulp.check.measure import _Rounder

    rounder = _Rounder({name: Rounding.of("tf32")})
    with prepare(model), torch.no_grad():
        places = Places(model)
        walk = Walk(model, places, rounder)
        with rounder.parameters(model, places), walk:
            logits = run(model, ids)
    rounder.check_used()
    logits = log_softmax(logits[:, :-1])
    return -logits.gather(-1, ids[:, 1:, None]).sum().item()


# A5, A6: one site at a time.


@dataclass
class Compared:
    """Prices and measurements of one model in one format, site by site."""

    names: list[str]
    kinds: list[str]
    measured: torch.Tensor
    predicted: torch.Tensor
    element: torch.Tensor
    one_probe: torch.Tensor
    relative_mse: torch.Tensor

    def ratio(self, which: str = "predicted", kinds: tuple[str, ...] = ()) -> torch.Tensor:
        chosen = [i for i, k in enumerate(self.kinds) if not kinds or k in kinds]
        return (getattr(self, which) / self.measured)[chosen]


@dataclass
class Squares:
    """The visitor that notes Σe²/Σx² of every site: what tensor statistics know."""

    rounding: Rounding
    found: dict[str, float] = field(default_factory=dict)

    def operand(self, infos, x, transposed):
        return x

    def output(self, info, x, inputs, inplace):
        e = round_tensor(x, self.rounding) - x
        self.found[info.name] = float(e.square().sum() / x.square().sum().clamp(min=1e-30))
        return x

    def writes(self, x):
        pass


def compare(model, ids, word: str, *, probes: int = 4) -> Compared:
    """Every tensor of rank 2 and more that `.to(bfloat16)` stores, rounded alone to `word`."""
    names = trace(model, ids, "bf16").names
    prices = price(model, ids, formats=(word,), sites=names, probes=probes, margins=False)
    ref = reference(model, ids)
    squares = Squares(Rounding.of(word))
    with prepare(model), torch.no_grad():
        places = Places(model)
        for s in parameter_sites(model, places).values():
            squares.output(s.info, s.tensor, (), False)
        with Walk(model, places, squares):
            run(model, ids)
    kept = [i for i, s in enumerate(prices.sites) if len(s.shape) > 1 and prices.kl[i, 0] > 0]
    sites = [prices.sites[i] for i in kept]
    measured = [measure(model, ids, {s.name: word}, ref).kl for s in sites]
    return Compared(
        names=[s.name for s in sites],
        kinds=[s.kind for s in sites],
        measured=torch.tensor(measured, dtype=torch.float64),
        predicted=prices.kl[kept, 0],
        element=prices.kl_element[kept, 0],
        one_probe=prices.kl_probes[0, kept, 0],
        relative_mse=torch.tensor([squares.found[s.name] for s in sites], dtype=torch.float64),
    )


def check_agreement(c: Compared, at_least: int, *, small: bool = False) -> None:
    """The gates of A5; wider on `small` toys, whose few sites scatter with their training."""
    ratio = c.ratio()
    rank, middle, low, high = (0.95, 0.15, 0.5, 2.0) if small else (0.97, 0.1, 0.6, 1.6)
    assert len(c.names) >= at_least
    assert spearman(c.predicted, c.measured) >= rank
    assert spearman(c.one_probe, c.measured) >= rank
    assert abs(ratio.median() - 1) <= middle
    assert ratio.quantile(0.05) >= low
    assert ratio.quantile(0.95) <= high
    assert abs(spearman(c.relative_mse, c.measured)) <= 0.5


@pytest.mark.parametrize(("family", "word"), [("gpt2", "bf16"), ("llama", "e4m3")])
def test_prices_are_what_single_sites_cost(family, word):
    toy = trained(family)
    check_agreement(compare(toy.model, toy.batch(4), word), at_least=38, small=True)


@pytest.mark.slow
@pytest.mark.parametrize("word", ["bf16", "fp16", "e4m3", "e5m2"])
@pytest.mark.parametrize("family", FAMILIES)
def test_prices_of_six_layers(family, word):
    toy = trained(family, "full")
    check_agreement(compare(toy.model, toy.batch(4), word, probes=8), at_least=100)


@pytest.mark.slow
def test_only_coherent_rows_price_fp4():
    """A6: `act` and `probs` flushed to zero; elements alone do not see it."""
    toy = trained("gpt2", "full")
    c = compare(toy.model, toy.batch(4), "e2m1")
    assert spearman(c.predicted, c.measured) >= 0.98
    assert c.ratio(kinds=("act", "probs")).quantile(0.05) >= 0.5
    assert c.ratio("element", kinds=("act", "probs")).quantile(0.05) < 0.6


def test_rows_correct_what_elements_miss_in_fp4():
    toy = trained("gpt2")
    c = compare(toy.model, toy.batch(4), "e2m1")
    kinds = ("act", "probs")
    assert c.ratio("element", kinds=kinds).min() < 0.6
    assert c.ratio(kinds=kinds).min() > c.ratio("element", kinds=kinds).min()
    assert c.ratio(kinds=kinds).median() >= 0.75


# The sums themselves.


@pytest.fixture(scope="module")
def words() -> tuple[Words, torch.Tensor]:
    torch.manual_seed(0)
    return Words().eval(), torch.randint(0, 31, (4, 24))


def test_equal_seeds_give_equal_prices_and_others_do_not(words):
    model, ids = words
    state = torch.get_rng_state()
    first, second, other = (price(model, ids, formats=("e4m3",), seed=s) for s in (0, 0, 1))
    for name in ("kl", "kl_probes", "kl_stochastic", "margin_variance", "z"):
        a, b, c = (getattr(p, name) for p in (first, second, other))
        assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
        assert not torch.equal(a.nan_to_num(), c.nan_to_num()), name
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_heads_and_stochastic_rounding_add_up():
    toy = trained("llama")
    p = price(toy.model, toy.batch(4), formats=("bf16", "mxfp8", "nvfp4"), probes=3)
    mean = torch.maximum(p.kl_element, p.kl_row)
    assert torch.allclose(p.kl, mean, equal_nan=True)
    assert torch.all(p.kl <= p.kl_probes.mean(0) * (1 + 1e-9))
    scores = "model.layers.0.self_attn:matmul#0"
    heads = p.heads[scores]
    assert heads.shape == (4, 3)
    row = p.index(scores)
    assert torch.all(heads.sum(0) >= p.kl[row] * (1 - 1e-9))
    assert torch.all(heads.sum(0) <= 1.5 * p.kl[row])
    matrices = [i for i, s in enumerate(p.sites) if len(s.shape) > 1 and s.kind == "weight"]
    ratio = (p.kl_stochastic / p.kl_element)[matrices][:, :2]
    assert 1.8 < ratio.median() < 2.2


def test_rows_drawn_at_random_are_unbiased(words):
    toy = trained("gpt2")
    ids = toy.batch(8)
    full, part = (
        price(toy.model, ids, formats=("e4m3",), rows=r, margins=False, probes=4)
        for r in (1.0, 0.25)
    )
    assert part.total("e4m3") == pytest.approx(full.total("e4m3"), rel=0.25)
    assert not torch.equal(full.kl, part.kl)


def test_a_weight_used_twice_is_priced_use_by_use():
    class Shared(Words):
        def forward(self, ids):
            x = self.embed(ids)
            for _ in range(2):
                x = self.layers[0](x)
            return self.lm_head(self.norm(x))

    torch.manual_seed(0)
    model = Shared().eval()
    ids = torch.randint(0, 31, (4, 24))
    p = price(model, ids, formats=("e4m3",), families=("stored", "operand", "cast"))
    up = "layers.0.up_proj:linear#{}.w"
    uses = [p.kl[p.index(up.format(i)), 0].item() for i in (0, 1)]
    together = p.kl[p.index("weight:layers.0.up_proj.weight"), 0].item()
    assert uses[0] != uses[1]
    assert 0.3 * sum(uses) < together < 3 * sum(uses)


@pytest.mark.slow
def test_cost_of_pricing():
    """A14: at most 12 forward passes for one probe and four formats, on one core."""
    import time

    from halfulp.train.config import ModelConfig
    from halfulp.train.model import build_model

    config = ModelConfig(preset="gpt2-3m", hidden=512, layers=6)
    model = build_model(config, vocab=257, length=128, seed=0).model.eval()
    model.config._attn_implementation = "eager"
    ids = trained("gpt2").batch(4)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names = trace(model, ids, "bf16").names

        def seconds(work, repeats=3):
            spent = []
            for _ in range(repeats):
                start = time.perf_counter()
                work()
                spent.append(time.perf_counter() - start)
            return min(spent)

        with torch.no_grad():
            forward = seconds(lambda: model(ids, use_cache=False), 5)
        formats = ("bf16", "fp16", "e4m3", "e5m2")
        asked = {"formats": formats, "sites": names, "probes": 1, "margins": False}
        assert seconds(lambda: price(model, ids, **asked)) / forward <= 12
    finally:
        torch.set_num_threads(threads)
