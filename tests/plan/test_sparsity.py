import math

import pytest
import torch
from torch import Tensor, nn

from halfulp.batch import predict
from halfulp.errors import CheckError, ConfigError
from halfulp.plan.sparsity import ALL, RULES, sparsity
from halfulp.train.config import ModelConfig
from halfulp.train.model import build_model, next_token_loss

VOCAB, LENGTH = 24, 17


def _text(rows: int, seed: int) -> Tensor:
    """A chain in which a token is followed by the next one, most of the time."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.randint(0, VOCAB, (rows, LENGTH), generator=generator)
    steps = torch.where(torch.rand(rows, LENGTH, generator=generator) < 0.8, 1, steps)
    return steps.cumsum(1) % VOCAB


@pytest.fixture(scope="module")
def model() -> nn.Module:
    config = ModelConfig(preset="llama-tiny", hidden=32, layers=1)
    built = build_model(config, vocab=VOCAB, length=LENGTH, seed=0).model
    optimizer = torch.optim.AdamW(built.parameters(), 1e-2)
    for step in range(60):
        next_token_loss(built, _text(16, 100 + step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return built.eval()


@pytest.fixture(scope="module")
def found(model):
    return sparsity(model, _text(32, 0), _text(48, 1), budget_nats=0.02)


@torch.no_grad()
def _window_losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean loss of each window by a loop over them."""
    found = []
    for row in ids:
        p = predict(model, row[None])
        found.append(nn.functional.cross_entropy(p.logits_NV, p.targets_N).double())
    return torch.stack(found)


def test_every_row_is_within_the_budget_and_a_larger_share_is_not(found):
    assert {r.block for r in found.rows} == {"emb", "qk", "vo", "ffn", "norm", "head", ALL}
    for row in found.rows:
        assert row.rise_nats <= 0.02
        assert row.share <= row.above
        if row.above < 1:
            assert row.above - row.share < 0.01 + 1 / row.parameters
    trained = [r for r in found.rows if r.block in ("ffn", ALL)]
    assert all(0.02 < r.share < 0.98 for r in trained)


def test_zeroing_by_hand_gives_the_measured_rise(model, found):
    """The smallest weights of the ffn, on the same windows, in another order of work."""
    row = found.row("ffn", "magnitude")
    named = {n: p for n, p in model.named_parameters() if ".mlp." in n}
    magnitude = torch.cat([p.detach().abs().flatten() for p in named.values()])
    limit = magnitude.sort().values[row.zeroed - 1]
    held_out = _text(48, 1)
    before = _window_losses(model, held_out)
    kept = {n: p.detach().clone() for n, p in named.items()}
    for p in named.values():
        p.detach()[p.detach().abs() <= limit] = 0
    rise = _window_losses(model, held_out) - before
    for n, p in named.items():
        p.detach().copy_(kept[n])
    assert rise.mean().item() == pytest.approx(row.rise_nats, abs=1e-5)
    assert (rise.std() / math.sqrt(48)).item() == pytest.approx(row.rise_se, abs=1e-5)
    assert found.loss_nats == pytest.approx(before.mean().item(), abs=1e-5)
    assert (found.tokens, found.windows) == (48 * 16, 48)


def test_the_model_is_the_same_afterwards(model):
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    sparsity(model, _text(8, 0), _text(8, 1))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_all_together_names_what_each_type_gave(found):
    for rule in RULES:
        row = found.row(ALL, rule)
        assert row.parameters == sum(found.parameters.values())
        assert row.zeroed == sum(row.by_type.values())
        assert all(row.by_type[kind] <= size for kind, size in found.parameters.items())


def test_more_budget_zeroes_more(model, found):
    rows = {r.block: r.share for r in found.rows if r.rule == "magnitude"}
    more = sparsity(model, _text(32, 0), _text(48, 1), budget_nats=0.2)
    for block, share in rows.items():
        assert more.row(block, "magnitude").share >= share
    assert more.row(ALL, "magnitude").share > rows[ALL]


def test_sharpness_finds_large_weights_that_do_nothing_and_magnitude_does_not(model):
    """Half of the channels inside the ffn lead nowhere: their inputs weigh much and do nothing."""
    mlp = model.get_submodule("model.layers.0.mlp")
    kept = {n: p.detach().clone() for n, p in mlp.named_parameters()}
    half = mlp.down_proj.weight.shape[1] // 2
    with torch.no_grad():
        mlp.down_proj.weight[:, :half] = 0
        mlp.gate_proj.weight[:half] *= 6
        mlp.up_proj.weight[:half] *= 6
    found = sparsity(model, _text(32, 0), _text(48, 1), budget_nats=1e-3, draws=256)
    with torch.no_grad():
        for n, p in mlp.named_parameters():
            p.copy_(kept[n])
    sharpness, magnitude = (found.row("ffn", rule).share for rule in ("sharpness", "magnitude"))
    assert sharpness > 0.5 > magnitude
    assert sharpness > magnitude + 0.05
    assert found.zero_before == 32 * half


def test_blocks_of_layers_are_named(model):
    found = sparsity(model, _text(8, 0), _text(8, 1), by="block")
    assert {"layers.0.ffn", "layers.0.qk", "emb", ALL} <= {r.block for r in found.rows}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"budget_nats": 0.0}, ConfigError, "leaves no room"),
        ({"budget_nats": math.nan}, ConfigError, "leaves no room"),
        ({"by": "tensor"}, ConfigError, "does not exist"),
        ({"draws": 1}, ConfigError, "draws"),
        ({"text": torch.zeros(4, dtype=torch.long)}, CheckError, "text is shape"),
        ({"held_out": torch.zeros(1, 8, dtype=torch.long)}, CheckError, "held_out is shape"),
        ({"held_out": "text"}, CheckError, "held_out is str"),
    ],
)
def test_what_cannot_be_measured_is_refused(model, change, error, message):
    given = {"text": _text(4, 0), "held_out": _text(4, 1)} | change
    with pytest.raises(error, match=message):
        sparsity(model, **given)
