"""Quantized modules take what torch's own take: empty batches, reused buffers, inference mode."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from halfulp.errors import ConfigError, PolicyError
from halfulp.policy import Policy
from halfulp.quantization import quantize

OPERANDS = ("fprop_x", "fprop_w", "dgrad_g", "dgrad_w", "wgrad_g", "wgrad_x")


class Two(nn.Module):
    """Two linears of one input that the block map places in ffn."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ffn = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn[0](x) + self.ffn[1](x)


def quantized(quantizer: str, *, carrier: str = "fp32", **linear: str):
    """The model and its handle, with every operand of every GEMM as `quantizer` says."""
    recipe = {"extends": "fp32", "linear": dict.fromkeys(OPERANDS, quantizer) | linear}
    policy = {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
    model = Two()
    hints = {"ffn*": "ffn"}
    return model, quantize(model, Policy.from_table(policy), hints=hints, carrier=carrier)


@pytest.mark.parametrize("shape", [(0, 32), (2, 0, 32)])
@pytest.mark.parametrize(
    ("quantizer", "carrier", "accumulate"),
    [
        ("e4m3@tensor", "fp32", "split"),
        ("e4m3@tensor:delayed(2)", "fp32", "fp32"),
        ("e4m3@1x32:e8m0_up", "fp32", "fast"),
        ("int8@tensor", "exact", "fp32"),
        ("int8@row", "exact", "fp32"),
    ],
)
def test_an_empty_batch_has_an_empty_result_and_zero_gradients(
    shape, quantizer, carrier, accumulate
) -> None:
    model, handle = quantized(quantizer, carrier=carrier, accumulate=accumulate)
    y = model(torch.zeros(shape))
    assert y.shape == shape
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())
    handle.end_step()


def test_a_buffer_that_is_filled_anew_is_quantized_anew() -> None:
    model, _ = quantized("e4m3@tensor")
    memory = np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)
    x = torch.from_numpy(memory)
    before = model(x)
    memory *= 3  # behind torch's back
    after = model(x)
    assert torch.equal(after, model(x.clone()))
    assert not torch.equal(after, before)


def test_inference_mode_computes_the_same() -> None:
    model, _ = quantized("e4m3@tensor")
    x = torch.randn(8, 32)
    expected = model.eval()(x)
    with torch.inference_mode():
        inside = x.clone()
        assert torch.equal(model(inside), expected)
        inside.mul_(2)
        assert torch.equal(model(inside), model.eval()(inside.clone()))
    assert torch.equal(model(inside), model(x * 2))


def test_a_second_derivative_is_refused() -> None:
    """Without the error, torch would leave the rounded GEMMs out of it."""
    model, handle = quantized("e4m3@tensor")
    x = torch.randn(8, 32, requires_grad=True)
    with pytest.raises(ConfigError, match=r"no second derivative.*handle\.off"):
        torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with handle.off():
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(gradient.square().sum(), x)
    assert second.norm() > 0


def test_a_step_with_nan_leaves_the_delayed_scale() -> None:
    model, handle = quantized("e4m3@tensor:delayed(1)")
    history = handle.sites["layers.0.ffn.ffn.0"].histories["fprop_x"]
    scales = []
    for step, size in enumerate((4.0, math.nan, math.inf, 2.0), 1):
        handle.set_step(step)
        model(torch.full((1, 32), size))
        handle.end_step()
        scales.append(history.scale.item())
    assert scales == [112.0, 112.0, 112.0, 224.0]


def test_histories_of_another_length_are_refused() -> None:
    _, longer = quantized("e4m3@tensor:delayed(16)")
    _, handle = quantized("e4m3@tensor:delayed(4)")
    with pytest.raises(PolicyError, match=r"do not fit this policy; differing: .*ffn\.0/"):
        handle.load_state_dict(longer.state_dict())
    handle.load_state_dict(handle.state_dict())


def test_the_exact_carrier_keeps_delayed_scales_and_nan() -> None:
    results = []
    for carrier in ("fp32", "exact"):
        model, handle = quantized("int8@tensor:delayed(2)", carrier=carrier)
        for step, size in enumerate((9.0, 1.0), 1):
            handle.set_step(step)
            x = torch.linspace(-size, size, 4 * 32).view(4, 32)
            y = model(x)
            handle.end_step()
        x[0, 0] = math.nan
        results.append((y, model(x)[:, 0]))
    (y, nan), (y_exact, nan_exact) = results
    assert (y - y_exact).norm() <= 1e-6 * y.norm()
    assert nan.isnan().tolist() == nan_exact.isnan().tolist() == [True, False, False, False]


@pytest.mark.parametrize("quantizer", ["e4m3@1x32:e8m0_up", "bf16"])
def test_the_exact_carrier_adds_the_bias_before_it_rounds(quantizer: str) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    models = [quantized(quantizer, carrier=c, fprop_out="bf16")[0] for c in ("fp32", "exact")]
    fp32, exact = (model.ffn[0](x) for model in models)
    assert torch.equal(exact, exact.bfloat16().float())
    assert (fp32 != exact).float().mean() < 0.01  # the order of an fp32 sum decides a tie


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_a_traced_int8_carrier_draws_as_an_eager_one() -> None:
    x = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    results = []
    for traced in (False, True):
        torch._dynamo.reset()
        model, handle = quantized("int8@row:stochastic", carrier="exact")
        run = torch.compile(model, backend="aot_eager", fullgraph=True) if traced else model
        handle.set_step(3)
        y = run(x)
        y.square().sum().backward()
        results.append((y, model.ffn[1].weight.grad))
    (y, gradient), (y_traced, gradient_traced) = results
    assert torch.equal(y, y_traced)
    assert torch.equal(gradient, gradient_traced)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
def test_a_traced_stochastic_table_draws_as_an_eager_one() -> None:
    recipe = {"extends": "fp32", "embed": "e2m1@1x32:stochastic"}
    policy = {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
    results = []
    for traced in (False, True):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 16))
        quantize(model, Policy.from_table(policy), hints={"0.*": "emb", "1.*": "head"})
        run = torch.compile(model, backend="aot_eager") if traced else model
        results.append([run(torch.arange(16)) for _ in range(3)])
    eager, compiled = results
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert not torch.equal(eager[0], eager[1])
