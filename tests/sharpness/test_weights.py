"""Rounded weights: equal to torch's casts, scaled along the reduction, exact moments, restored."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfulp.errors import CheckError, FormatError, NonFiniteError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import Quantizer, parse_quantizer
from halfulp.numerics.random import Key
from halfulp.pieces import pieces
from halfulp.sharpness.weights import Weights, in_place, stochastic_moments, weight_quantizer
from tests.check.toys import Words, untrained
from tests.oracles.grids import values


def bits(x: Tensor) -> Tensor:
    return x.detach().clone().view(torch.int32)


@pytest.mark.parametrize(
    ("word", "dtype", "largest"),
    [
        ("e4m3@tensor:static(1)", torch.float8_e4m3fn, 448.0),
        ("e5m2@tensor:static(1)", torch.float8_e5m2, 57344.0),
        ("bf16", torch.bfloat16, 1e30),
        ("fp16", torch.float16, 65504.0),
    ],
)
def test_formats_without_scales_are_the_casts_of_torch(word, dtype, largest):
    model = Words(d=16, layers=1)
    w = model.layers[0].up_proj.weight
    exponents = torch.linspace(-30, np.log2(largest) - 0.01, w.numel()).reshape(w.shape)
    with torch.no_grad():
        w.copy_(torch.randn_like(w).sign() * torch.exp2(exponents))
        w[0, 0] = -0.0
    rounded = Weights.of(model).rounded("layers.0.up_proj.weight", weight_quantizer(word))
    assert torch.equal(bits(rounded), bits(w.to(dtype).float()))
    assert not torch.equal(rounded, w)


@pytest.mark.parametrize("word", ["int8@row:current", "int4@1x32:current", "mxfp8", "nvfp4"])
def test_scales_run_along_the_reduction_in_either_layout(word):
    gpt, plain = untrained("gpt2", layers=1), Words(d=128, layers=1)
    theirs = gpt.get_submodule("transformer.h.0.mlp.c_fc")
    ours = plain.layers[0].up_proj
    assert isinstance(theirs, Conv1D)
    assert isinstance(ours, nn.Linear)
    with torch.no_grad():
        sizes = torch.logspace(-4, 4, theirs.weight.shape[1])[torch.randperm(512)]
        theirs.weight.mul_(sizes)  # rows of very different sizes
        ours.weight.copy_(theirs.weight.T)
    q = weight_quantizer(word)
    conv = Weights.of(gpt).rounded("transformer.h.0.mlp.c_fc.weight", q)
    linear = Weights.of(plain).rounded("layers.0.up_proj.weight", q)
    assert torch.equal(conv, linear.T)
    assert not torch.equal(conv, apply_quantizer(theirs.weight.detach(), q))
    mean, square = Weights.of(gpt).moments("transformer.h.0.mlp.c_fc.weight", q)
    assert square.shape == mean.shape == theirs.weight.shape
    assert torch.equal(square.T, Weights.of(plain).moments("layers.0.up_proj.weight", q)[1])


@pytest.mark.parametrize("name", ["e2m1", "e4m3", "e5m2", "e3m2", "int4", "int8"])
def test_moments_are_those_of_the_two_neighbors(name):
    """Against every value of the format, enumerated by code; in exact rationals."""
    grid = np.unique(values(name))
    grid = grid[grid <= {"e5m2": 57344.0, "e4m3": 448.0}.get(name, np.inf)]
    rng = np.random.default_rng(0)
    inside = rng.uniform(grid[0], grid[-1], 100) * rng.choice([-1, 1], 100)
    fine = rng.uniform(0, grid[min(len(grid) - 1, 9)], 50)
    beyond = np.array([grid[-1] * 1.25, -grid[-1] * 3])
    x = np.concatenate([inside, fine, grid[:20], -grid[-3:], beyond]).astype(np.float32)
    mean, square = stochastic_moments(
        torch.from_numpy(x), parse_quantizer(f"{name}@tensor:static(1)")
    )
    for value, m, s in zip(x, mean.tolist(), square.tolist(), strict=True):
        a, sign = Fraction(abs(float(value))), 1 if value > 0 else -1
        low = Fraction(float(grid[grid <= abs(value)].max()))
        above = grid[grid >= abs(value)]
        high = Fraction(float(above.min())) if len(above) else low
        beyond_by = low - a if not len(above) else Fraction(0)
        variance = (a - low) * (high - a) if len(above) else beyond_by**2
        assert m == pytest.approx(float(sign * beyond_by), rel=1e-6, abs=0)
        assert s == pytest.approx(float(variance), rel=1e-6, abs=0)


@pytest.mark.parametrize("word", ["bf16", "e4m3", "nvfp4", "int4@1x32:current", "int8@row:current"])
def test_moments_are_those_of_the_rounding_itself(word):
    """Σ e and Σ e² over 64 keys within 5 standard errors: fails by chance once in 10^5."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(3))
    q = weight_quantizer(word)
    mean, square = stochastic_moments(x, q)
    stochastic = parse_quantizer(f"{q}:stochastic")
    e = torch.stack(
        [apply_quantizer(x, stochastic, key=Key.of(0, "x").fold(n)) - x for n in range(64)]
    ).double()
    for sample, expected in ((e, mean), (e.square(), square)):
        sums = sample.sum((1, 2))
        assert abs(sums.mean() - expected.double().sum()) < 5 * sums.std() / 8
    nearest = (apply_quantizer(x, q) - x).double().square().sum()
    assert 1.7 < (square.sum() / nearest).item() < 2.3  # uniform positions: exactly 2


@pytest.fixture
def model() -> nn.Module:
    return untrained("gpt2", layers=1)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: bits(p) for name, p in model.named_parameters()}


def same(model: nn.Module, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(bits(p), before[name]) for name, p in model.named_parameters())


def test_only_the_asked_elements_are_rounded_and_all_come_back(model):
    q = weight_quantizer("e2m1")
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.weight")[0] = -0.0
    before, weights = snapshot(model), Weights.of(model)
    qk = [p for p in pieces(model) if p.kind == "qk"]
    (fused,) = qk
    assert fused.groups == 1
    with in_place(weights, qk, q) as kept:
        changed = {n for n, p in model.named_parameters() if not torch.equal(bits(p), before[n])}
        assert changed == {fused.parameter} == set(kept)
        now = model.get_parameter(fused.parameter)
        assert torch.equal(fused.of(now), fused.of(weights_of(kept, fused.parameter, q)))
        assert torch.equal(now[:, 256:], kept[fused.parameter][:, 256:])
    assert same(model, before)


def weights_of(kept, name: str, q: Quantizer) -> Tensor:
    return apply_quantizer(kept[name].T.contiguous(), q).T


def test_weights_come_back_after_an_exception_too(model):
    before, weights = snapshot(model), Weights.of(model)

    def fail() -> None:
        with in_place(weights, pieces(model), weight_quantizer("e4m3"), key=Key.of(0, "a")):
            assert not same(model, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert same(model, before)
    # One parameter cannot be rounded: those before it are put back.
    late = dict.fromkeys(before, weight_quantizer("e4m3"))
    last = list(before)[-1]
    late[last] = parse_quantizer("fp16")
    with torch.no_grad():
        model.get_parameter(last).fill_(1e6)
    before = snapshot(model)
    with (
        pytest.raises(NonFiniteError, match=r"ln_f.*beyond fp16"),
        in_place(weights, pieces(model), late),
    ):
        raise AssertionError("unreachable")
    assert same(model, before)


def test_stochastic_keys_choose_the_rounding(model):
    weights, q = Weights.of(model), weight_quantizer("int4@1x32:current")
    name = "transformer.h.0.mlp.c_fc.weight"
    one, again, other = (weights.rounded(name, q, Key.of(s, "w")) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert 0.05 < (one != other).double().mean().item() < 0.95


def test_what_cannot_be_rounded_says_so(model):
    for word in ("e4m3@tensor:delayed(4)", "e4m3@1x32:e8m0_up:hadamard(32)", "bf16:stochastic"):
        with pytest.raises(FormatError, match="current scale"):
            weight_quantizer(word)
    with pytest.raises(FormatError, match="mxfp8"):
        weight_quantizer("mxfp9")
    with pytest.raises(CheckError, match=r"bfloat16.*model\.float"):
        Weights.of(untrained("gpt2", layers=1).bfloat16())
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.weight")[3] = torch.nan
    with pytest.raises(NonFiniteError, match="holds inf or NaN"):
        Weights.of(model)
