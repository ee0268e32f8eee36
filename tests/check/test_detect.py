"""Detectors and guards: what a prediction cannot know is named, and nothing else is (A12, A13)."""

import pytest
import torch

from halfulp.batch import run
from halfulp.check.detect import beyond_linear, detect, guard, half_precision, trusted
from halfulp.check.measure import measure, measure_target, program, reference, uniform
from halfulp.check.prices import price
from halfulp.check.survey import first_difference, rope_angle_errors, survey
from halfulp.check.trace import trace
from halfulp.errors import CheckError
from tests.check.toys import Words, trained, untrained

IDS = torch.randint(0, 257, (2, 64), generator=torch.Generator().manual_seed(0))


def kinds(findings, kind):
    return {f.site for f in findings if f.kind == kind}


# A13


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_truncation_is_biased_and_nearest_is_not(family):
    toy = trained(family)
    ids = toy.batch(8)
    names = trace(toy.model, ids, "bf16").names
    p = price(toy.model, ids, formats=("bf16:truncate", "bf16"), sites=names, margins=False)
    found = detect(p)
    biased = [{f.site for f in found if f.kind == "bias" and f.format == w} for w in p.formats]
    assert len(biased[0]) / len(p.sites) >= 0.05
    assert len(biased[1]) / len(p.sites) <= 0.01


def test_fp4_shrinks_activations_and_bf16_does_not():
    toy = trained("gpt2")
    ids = toy.batch(4)
    p = price(toy.model, ids, formats=("e2m1", "bf16"), margins=False)
    found = detect(p)
    shrunk = {(f.site, f.format) for f in found if f.kind == "shrinkage"}
    acts = {s.name for s in p.sites if s.kind in ("act", "probs")}
    assert any(site in acts and fmt == "e2m1" for site, fmt in shrunk)
    assert not any(fmt == "bf16" for _, fmt in shrunk)
    flushed = {f.site for f in found if f.kind == "flushed" and f.format == "e2m1"}
    assert flushed & acts
    assert not any(f.format == "bf16" for f in found)


def test_beyond_the_linear_range_only_measurements_count():
    toy = trained("gpt2")
    ids = toy.batch(4)
    names = trace(toy.model, ids, "bf16").names
    p = price(toy.model, ids, formats=("bf16", "e2m1"), sites=names, margins=False)
    assert p.total("e2m1") > 0.1
    finding = beyond_linear(p, uniform(names, "e2m1"))
    assert finding is not None
    assert "only the measured value" in finding.text
    assert beyond_linear(p, uniform(names, "bf16")) is None
    assert trusted(p, uniform(names, "bf16"))
    assert not trusted(p, uniform(names, "e2m1"))


# A12


def loud_llama():
    """A product of the two branches of the MLP that fp16 cannot hold."""
    model = untrained("llama")
    mlp = model.model.layers[1].mlp
    for p in (mlp.gate_proj.weight, mlp.up_proj.weight):
        p.data.mul_(900.0)
    mlp.down_proj.weight.data.div_(1e5)
    return model


def test_a_product_beyond_fp16_is_named():
    model = loud_llama()
    product = "model.layers.1.mlp:mul#0"
    p = price(model, IDS, formats=("fp16", "bf16", "e4m3"), margins=False)
    overflow = [f for f in detect(p) if f.kind == "overflow"]
    assert {(f.site, f.format) for f in overflow} == {(product, "fp16")}
    assert p.kl[p.index(product), 0] == float("inf")
    assert torch.isfinite(p.kl[p.index(product), 1:]).all()
    assert p.total("fp16") == float("inf")
    assert product in kinds(guard(model, survey(model, IDS), targets=("fp16",)), "overflow")
    assert not kinds(guard(model, survey(model, IDS), targets=("bf16",)), "overflow")
    ref = reference(model, IDS)
    simulated = measure(model, IDS, {product: "fp16"}, ref)
    assert simulated.kl == float("inf")
    assert simulated.overflowed.keys() == {product}
    assert measure_target(model, IDS, "fp16", ref).kl == float("inf")
    assert measure_target(model, IDS, "bf16", ref).kl < 0.1


def test_rope_frequencies_in_bf16_are_named():
    model = untrained("llama")
    fine = guard(model, survey(model, IDS))
    assert not kinds(fine, "rope")
    asked = guard(model, survey(model, IDS), targets=("bf16",), length=1024)
    assert kinds(asked, "rope") == {"model.rotary_emb.inv_freq"}
    assert not kinds(guard(model, survey(model, IDS), targets=("autocast-bf16",)), "rope")
    errors = rope_angle_errors(model, 1024, torch.bfloat16)
    assert 0.05 < errors["model.rotary_emb.inv_freq"] < 4.0  # u · 1023 radians at most
    rotary = model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16()
    with program(model.float(), "bf16") as low:
        assert low.model.rotary_emb.inv_freq.dtype == torch.float32
    with program(model, "bf16", buffers=True) as low:
        assert low.model.rotary_emb.inv_freq.dtype == torch.bfloat16
        assert kinds(guard(low, survey_of(low)), "rope") == {"model.rotary_emb.inv_freq"}


def survey_of(low):
    """A survey of nothing: the guard of RoPE looks at buffers only."""
    from halfulp.check.survey import Survey

    return Survey(sites=(), masked=())


def test_masks_stay_out_of_scales_and_errors():
    model = untrained("gpt2")
    seen = survey(model, IDS)
    assert "mask" in {f.kind for f in guard(model, seen)}
    p = price(model, IDS, formats=("e4m3", "int8"), margins=False)
    scores = [i for i, s in enumerate(p.sites) if s.kind == "scores"]
    assert len(scores) == 4
    assert torch.all(p.kl[scores] < 1e-3)
    assert torch.all(p.kl[scores] > 0)
    # A padded batch brings a mask of its own, and its padding does not count.
    padded = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    padded["attention_mask"][1, 40:] = 0
    p = price(model, padded, formats=("e4m3",))
    assert p.reference.tokens == 64 + 40
    plan = uniform([s.name for s in p.sites if s.kind == "scores"], "e4m3")
    assert 0 < measure(model, padded, plan, p.reference).kl < 1e-3


def test_masks_that_arrive_inside_a_site_are_left_out():
    """Words masks by `masked_fill`; a bias added there makes a site that holds −3.4e38."""

    class Biased(Words):
        def forward(self, ids):
            logits = super().forward(ids)
            logits = logits + logits.detach().mean() * 0.01
            low = torch.zeros(31)
            low[3:5] = torch.finfo(torch.float32).min
            return logits + low

    torch.manual_seed(0)
    model = Biased().eval()
    ids = torch.randint(0, 31, (4, 24))
    p = price(model, ids, formats=("e4m3", "bf16"))
    last = p.index(":add#1")
    clean = p.index(":add#0")
    assert torch.allclose(p.kl[last], p.kl[clean], rtol=0.5)
    assert measure(model, ids, {":add#1": "e4m3"}, p.reference).kl < 1e-2


def test_zero_tensors_and_nan_weights_are_named():
    model = untrained("gpt2")
    model.transformer.h[0].mlp.c_proj.weight.data.zero_()
    zeros = kinds(guard(model, survey(model, IDS)), "zero")
    assert "weight:transformer.h.0.mlp.c_proj.weight" in zeros
    assert "transformer.h.0.mlp.c_proj:addmm#0" in zeros
    p = price(model, IDS, formats=("e4m3", "nvfp4", "mxfp8"))
    row = p.kl[p.index("weight:transformer.h.0.mlp.c_proj.weight")]
    assert torch.all(row == 0)
    assert torch.isfinite(p.kl).all()
    model.transformer.h[1].attn.c_proj.weight.data[3, 5] = float("nan")
    name = "weight:transformer.h.1.attn.c_proj.weight"
    assert kinds(guard(model, survey(model, IDS)), "nonfinite") == {name}
    for ask in (lambda: price(model, IDS), lambda: reference(model, IDS)):
        with pytest.raises(
            CheckError, match=r"first tensor with NaN or inf is weight:.*h\.1\.attn"
        ):
            ask()


def test_a_run_that_does_not_repeat_is_found():
    class Noisy(Words):
        def forward(self, ids):
            return super().forward(ids) + torch.rand(()) * self.lm_head.weight.sum()

    torch.manual_seed(0)
    ids = torch.randint(0, 31, (2, 8))
    assert first_difference(Words().eval(), ids) is None
    assert first_difference(Noisy().eval(), ids) == ":mul#0"


def test_a_checkpoint_in_half_precision_is_noticed():
    model = untrained("llama")
    assert half_precision(model) is None
    assert half_precision(model.bfloat16()) == torch.bfloat16
    rounded = model.float()
    p = price(rounded, IDS, formats=("bf16", "e4m3"), margins=False)
    weights = [i for i, s in enumerate(p.sites) if s.op == "parameter"]
    assert torch.all(p.kl[weights, 0] == 0)  # the checkpoint lies on the grid already
    assert torch.any(p.kl[weights, 1] > 0)
    with torch.no_grad():
        assert run(rounded, IDS).dtype == torch.float32
