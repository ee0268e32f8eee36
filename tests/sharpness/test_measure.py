"""What a measurement leaves alone, what it counts, and what it answers to bad input."""

import math

import pytest
import torch
from torch import nn

import halfulp
from halfulp.errors import CheckError, ConfigError, NonFiniteError, PolicyError
from halfulp.sharpness.measure import ESTIMATORS
from halfulp.sharpness.report import PAPER_TYPES, SharpnessReport
from tests.check.toys import trained
from tests.sharpness.oracles import causal_lm, ids, tiny

SHAPE = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 16}


def gpt2(**more) -> nn.Module:
    return causal_lm("gpt2", **SHAPE, **more)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_training_step_after_a_measurement_is_the_same_to_the_bit(estimator):
    """Parameters, gradients, modes, random state: with dropout, so that all of them matter (A5)."""

    def step(measured: bool):
        model = gpt2(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
        model.transformer.h[0].train()
        torch.manual_seed(3)
        model(ids(), labels=ids()).loss.backward()
        modes = [m.training for m in model.modules()]
        if measured:
            halfulp.sharpness(model, ids(seed=4), estimator=estimator, draws=2)
        assert modes == [m.training for m in model.modules()]
        model(ids(), labels=ids()).loss.backward()
        optimizer = torch.optim.AdamW(model.parameters())
        optimizer.step()
        return [*model.parameters(), *(p.grad for p in model.parameters())], torch.rand(1)

    (plain, number), (found, other) = step(False), step(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    assert torch.equal(number, other)


def test_modes_return_after_an_error():
    model = gpt2().train()
    with pytest.raises(CheckError):
        halfulp.sharpness(model, torch.ones(2, 1, dtype=torch.int64))
    assert all(m.training for m in model.modules())


def test_fisher_is_the_squared_gradient_times_positions():
    model, batch = gpt2(), ids()
    report = halfulp.sharpness(model, batch, estimator="fisher")
    model(batch, labels=batch).loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    for i, piece in enumerate(report.pieces):
        expected = 14 * piece.of(grads[piece.parameter]).double().square().sum().item()
        assert report.traces[0, i].item() == pytest.approx(expected, rel=1e-5)
    assert report.positions == 14
    assert report.loss_nats == pytest.approx(model(batch, labels=batch).loss.item(), rel=1e-6)


def test_fisher_is_not_random_and_says_so():
    one = halfulp.sharpness(gpt2(), ids(), estimator="fisher", draws=16)
    assert one.draws == 1
    assert math.isnan(one.by_type["ffn"].rel_se)
    assert any("not invariant" in note for note in one.notes)
    batches = [ids(seed=s) for s in range(3)]
    three = halfulp.sharpness(gpt2(), batches, estimator="fisher", draws=16, rel_se=0.001)
    assert three.draws == 3
    assert three.by_type["ffn"].rel_se > 0.01
    assert any("3 draws did not reach the relative error 0.001" in note for note in three.notes)


def test_masked_positions_do_not_count():
    model, batch = gpt2(), ids(2)
    mask = torch.ones_like(batch)
    mask[1, 5:] = 0
    report = halfulp.sharpness(model, {"input_ids": batch, "attention_mask": mask}, draws=2)
    assert report.positions == 7 + 4


@pytest.mark.parametrize("estimator", ["gnb", "hutchinson"])
def test_seeds_decide(estimator):
    model = tiny("gpt2")
    one, same, other = (
        halfulp.sharpness(model, ids(), estimator=estimator, draws=2, seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(one.traces, same.traces)
    assert not torch.equal(one.traces, other.traces)


def test_draws_take_the_batches_in_turns():
    model, batches = tiny("gpt2"), [ids(seed=1), ids(4, seed=2)]
    both = halfulp.sharpness(model, batches, estimator="fisher")
    alone = [halfulp.sharpness(model, b, estimator="fisher").traces[0] for b in batches]
    assert torch.allclose(both.traces, torch.stack(alone))
    few = halfulp.sharpness(model, [*batches, ids(seed=3)], draws=2)
    assert "Draws used 2 of the 3 batches." in few.notes
    assert both.positions == round((7 * len(batches[0]) + 7 * len(batches[1])) / 2)


@pytest.mark.parametrize("estimator", ["fisher", "gnb", "hutchinson"])
def test_draws_for_a_wanted_error_go_on_with_the_next_batches(estimator, monkeypatch):
    """Else draws of the same batch would pass for independent ones, and the error look small."""
    monkeypatch.setattr("halfulp.sharpness.measure.MOST_DRAWS", 16)
    model = tiny("gpt2")
    batches = [ids(rows, seed=rows) for rows in (1, 2, 3, 4)]
    report = halfulp.sharpness(model, batches, estimator=estimator, draws=2, rel_se=1e-9)
    if estimator == "fisher":
        whole = halfulp.sharpness(model, batches, estimator=estimator, draws=4)
        assert torch.equal(report.traces, whole.traces)
    assert report.positions == round(7 * (1 + 2 + 3 + 4) / 4)
    assert not any("Draws used" in note for note in report.notes)


def test_few_draws_say_how_rough_their_errors_are():
    two, eight = (halfulp.sharpness(gpt2(), ids(), draws=n).notes for n in (2, 8))
    assert any("With 2 draws the standard errors are themselves ± 71%" in note for note in two)
    assert not any("standard errors" in note for note in eight)
    fisher = halfulp.sharpness(gpt2(), ids(), estimator="fisher")
    assert any("one draw there is no standard error" in note for note in fisher.notes)


def test_more_draws_until_the_error_is_small():
    report = halfulp.sharpness(gpt2(), ids(), draws=4, rel_se=0.08)
    rows = [report.by_type[kind] for kind in ("emb", "qk", "ffn", "vo", "norm")]
    assert all(row.rel_se <= 0.08 for row in rows)
    assert report.draws in (8, 16, 32, 64, 128, 256, 512, 1024)
    for row in rows:
        # The draws it says are needed for the error that it has are those that were made.
        assert row.draws_for(row.rel_se) in (report.draws, report.draws + 1)


def test_a_report_is_the_same_after_a_file(tmp_path):
    report = halfulp.sharpness(tiny("llama"), ids(), estimator="lanczos", draws=3)
    report.save(tmp_path / "report.json")
    loaded = SharpnessReport.load(tmp_path / "report.json")
    assert torch.equal(loaded.traces, report.traces)
    assert loaded.rows("tensor") == report.rows("tensor")
    assert loaded.eigenvalues == report.eigenvalues
    assert loaded.notes == report.notes
    assert loaded.cost_steps == report.cost_steps > 1


# Bad input.


def frozen(model):
    model.transformer.h[0].ln_1.weight.requires_grad_(False)
    return model


def broken(model):
    with torch.no_grad():
        model.transformer.wte.weight[3] = torch.nan
    return model


@pytest.mark.parametrize(
    ("more", "error", "says"),
    [
        ({"estimator": "sophia"}, ConfigError, "'sophia' does not exist. Give one of gnb, fisher"),
        ({"draws": 1}, ConfigError, "draws = 1 gives no standard error. Give a whole number from"),
        ({"draws": 2.5}, ConfigError, "draws = 2.5 gives no standard error"),
        ({"seed": 1 << 70}, ConfigError, "seed = .* cannot be used. Give a whole number"),
        ({"rel_se": "x"}, ConfigError, "rel_se = 'x' is no relative error"),
        ({"batches": 5}, CheckError, "int is no batch"),
        ({"model": "gpt2"}, CheckError, "str is no model"),
        ({"model": gpt2().to("meta")}, CheckError, "is on the meta device"),
        ({"model": broken(gpt2())}, NonFiniteError, "wte.weight holds inf or NaN"),
        ({"rel_se": 5.0}, ConfigError, r"rel_se = 5.0 is no relative error"),
        ({"batches": []}, CheckError, "no batch to measure on"),
        ({"batches": torch.ones(3, 1).long()}, CheckError, "no label that counts"),
        ({"batches": torch.full((2, 8), 77)}, CheckError, "cannot run on int64"),
        ({"model": frozen(gpt2())}, CheckError, r"1 parameters are frozen, the first is .*ln_1"),
        ({"model": nn.ReLU()}, CheckError, "ReLU has no parameter"),
        (
            {"model": nn.Sequential(nn.Embedding(20, 4), nn.Linear(4, 20))},
            PolicyError,
            r"(?s)cannot place .* hints=",
        ),
        ({"hints": {"nothing": "ffn"}}, PolicyError, "hint 'nothing' decides no parameter"),
    ],
)
def test_bad_input_is_answered(more, error, says):
    asked = {"model": gpt2(), "batches": ids()} | more
    model, batches = asked.pop("model"), asked.pop("batches")
    with pytest.raises(error, match=says):
        halfulp.sharpness(model, batches, **asked)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loss_that_is_not_finite(estimator):
    def spoil(_module, _inputs, out):
        out.logits = out.logits * torch.nan
        return out

    model = gpt2()
    model.register_forward_hook(spoil)
    with pytest.raises(NonFiniteError, match=r"the loss of a batch of 14 positions is nan.*check"):
        halfulp.sharpness(model, ids(), estimator=estimator)


def test_a_gradient_that_is_not_finite():
    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.inf

    model = gpt2()
    model.transformer.h[0].mlp.register_forward_hook(lambda *args: Overflow.apply(args[2]))
    with pytest.raises(NonFiniteError, match=r"tensors is not finite, the first is .*Measure in"):
        halfulp.sharpness(model, ids(), draws=2)


def test_inference_mode_is_refused_and_no_grad_is_not():
    with torch.inference_mode(), pytest.raises(CheckError, match=r"Leave torch\.inference_mode"):
        halfulp.sharpness(gpt2(), ids())
    with torch.no_grad():
        assert halfulp.sharpness(gpt2(), ids(), draws=2).traces.isfinite().all()


# On a trained model (A2).


def rows_of(estimator: str, toy, rows: int, *, of: int, draws: int):
    """Rows of the block types, from `of` rows of 128 tokens, `rows` to a batch."""
    batches = list(toy.batch(of).split(rows))
    report = halfulp.sharpness(toy.model, batches, estimator=estimator, draws=draws)
    return {row.name: row for row in report.rows() if row.kind in PAPER_TYPES}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_gnb_does_not_depend_on_the_batch_and_the_empirical_fisher_does(family):
    """127 to 4064 and 8128 predictions per draw; 3.5 combined errors, 1 in 200 per family."""
    toy = trained(family)
    small = rows_of("gnb", toy, 1, of=32, draws=256)
    large = rows_of("gnb", toy, 32, of=32, draws=32)
    for kind, row in small.items():
        error = math.hypot(row.rel_se, large[kind].rel_se)
        assert error < 0.15
        assert large[kind].trace == pytest.approx(row.trace, rel=max(0.1, 3.5 * error))
    small, large = (rows_of("fisher", toy, n, of=64, draws=64) for n in (1, 64))
    ratios = {kind: large[kind].trace / small[kind].trace for kind in small}
    assert ratios["norm"] > 2
    assert min(ratios.values()) > 1.5
