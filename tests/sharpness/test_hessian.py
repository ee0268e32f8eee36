"""Double backward where it is hard: fused attention, compiled models, hand-written backward."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import halfulp
from halfulp.errors import CheckError
from tests.sharpness.oracles import causal_lm, ids, tiny

SHAPE = {"n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 16}


def gpt2(**more) -> nn.Module:
    return causal_lm("gpt2", **SHAPE, **more)


def hutchinson(model, **more):
    return halfulp.sharpness(model, ids(), estimator="hutchinson", draws=2, **more)


def test_every_attention_path_gives_the_same_traces():
    eager, fused = hutchinson(gpt2(attention="eager")), hutchinson(gpt2())
    assert torch.allclose(eager.traces, fused.traces, rtol=1e-3, atol=1e-4)
    assert "Attention ran as the model's own operations (eager)." in eager.notes
    assert any("(sdpa) ran as its MATH kernel" in note for note in fused.notes)


def wrapped(model):
    return torch.compile(model, backend="aot_eager")


def in_place(model):
    model.compile(backend="aot_eager")
    return model


def one_layer(model):
    model.transformer.h[0].compile(backend="aot_eager")
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "compiled", [wrapped, *(pytest.param(f, marks=pytest.mark.slow) for f in (in_place, one_layer))]
)
def test_compiled_models_are_measured_eagerly(compiled):
    plain, found = hutchinson(gpt2()), hutchinson(compiled(gpt2()))
    assert torch.allclose(found.traces, plain.traces, rtol=1e-3, atol=1e-4)
    assert "The model is compiled; its eager modules were measured." in found.notes
    assert not any("compiled" in note for note in plain.notes)
    assert found.model == "GPT2LMHeadModel"
    assert [p.name for p in found.pieces] == [p.name for p in plain.pieces]


def test_gnb_runs_on_the_compiled_model():
    plain = halfulp.sharpness(gpt2(), ids(), draws=2)
    found = halfulp.sharpness(torch.compile(gpt2(), backend="aot_eager"), ids(), draws=2)
    assert torch.allclose(found.traces, plain.traces, rtol=1e-3)
    assert found.notes == plain.notes


class Kernel(torch.autograd.Function):
    """A kernel like those of fused attention: its backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Hidden(torch.autograd.Function):
    """A backward pass whose dependence on the input autograd cannot see."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x.detach()
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.x * g


class WithFunction(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up_proj, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.lm_head = nn.Linear(16, 20)
        self.function = function

    def forward(self, x):
        return self.lm_head(self.norm(self.function(self.up_proj(self.embed(x)))))


@pytest.mark.parametrize("estimator", ["hutchinson", "lanczos"])
@pytest.mark.parametrize("function", [Kernel.apply, Hidden.apply])
def test_backward_passes_of_ones_own(estimator, function):
    """torch finds nothing wrong with either; a difference of gradients does."""
    torch.manual_seed(0)
    says = r"cannot be differentiated twice: a Hessian-vector product is \d+% off"
    model = WithFunction(function)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckError, match=says) as error:
        halfulp.sharpness(model, ids(), estimator=estimator)
    assert 'the estimator "gnb"' in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    plain = WithFunction(torch.square)
    plain.load_state_dict(before)
    halfulp.sharpness(plain, ids(), estimator=estimator, draws=2)


class Flash(nn.Module):
    """A model that chooses its attention kernel itself."""

    def __init__(self, model):
        super().__init__()
        self.model, self.config = model, model.config

    def forward(self, x):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return self.model(x)


def test_a_fused_kernel_is_named_with_what_to_do():
    model = Flash(gpt2())
    with pytest.raises(CheckError) as error:
        hutchinson(model)
    text = str(error.value)
    assert "Flash (its attention: sdpa) cannot be differentiated twice" in text
    assert "flash_attention" in text
    assert 'model.set_attn_implementation("eager")' in text
    assert halfulp.sharpness(model, ids(), draws=2).traces.isfinite().all()


@pytest.mark.parametrize("estimator", ["hutchinson", "lanczos"])
def test_half_precision_is_refused(estimator):
    model = gpt2().bfloat16()
    with pytest.raises(CheckError, match=r"is torch\.bfloat16, too coarse.*copy\.deepcopy"):
        halfulp.sharpness(model, ids(), estimator=estimator)
    halfulp.sharpness(model, ids(), draws=2)


def test_autocast_is_left_out():
    plain = hutchinson(gpt2())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = hutchinson(gpt2())
    assert torch.allclose(found.traces, plain.traces, rtol=1e-5)
    assert any("Autocast was left out" in note for note in found.notes)


def test_gnb_keeps_autocast_and_is_within_two_percent():
    """The same labels: those that bf16 logits sample differ in few places of 10⁴ (A4)."""
    model, batch = gpt2(), ids(8)
    plain = halfulp.sharpness(model, batch, estimator="fisher")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = halfulp.sharpness(model, batch, estimator="fisher")
    for row, other in zip(plain.rows(), found.rows(), strict=True):
        assert row.trace != other.trace
        assert other.trace == pytest.approx(row.trace, rel=0.02)


def test_a_quantized_model_is_measured_in_its_own_precision():
    policy = halfulp.Policy.from_recipe("te_current")
    plain, model = hutchinson(gpt2()), gpt2()
    halfulp.quantize(model, policy)
    found = hutchinson(model)
    assert torch.allclose(found.traces, plain.traces, rtol=1e-3, atol=1e-4)
    assert any("quantized" in note for note in found.notes)


def test_the_parameters_return_to_the_same_bits():
    model = tiny("gpt2")
    before = [p.detach().clone() for p in model.parameters()]
    hutchinson(model)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
