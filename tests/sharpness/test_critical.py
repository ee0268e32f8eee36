import math

import pytest
import torch
from torch import nn

from halfulp.errors import CheckError, NonFiniteError
from halfulp.sharpness.critical import critical_sharpness


class Quadratic(nn.Module):
    """L(w) = ½ Σ h w²."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.5], dtype=torch.float64))
        self.h = torch.tensor([1.0, 10.0, 3.0, 0.1], dtype=torch.float64)

    def loss(self) -> float:
        return (0.5 * (self.h * self.w**2).sum()).item()


@pytest.mark.parametrize("start", [1e-3, 0.1, 5.0])
def test_on_a_quadratic_it_is_the_curvature_along_the_gradient(start):
    """gᵀHg / ‖g‖² = 2 / η_c; after the search the bracket holds it, from below and above."""
    model = Quadratic()
    g = (model.h * model.w).detach()
    curvature = ((g * model.h * g).sum() / (g * g).sum()).item()
    before = model.w.detach().clone()
    found = critical_sharpness(
        model, {"w": -g}, torch.empty(0), start=start, forwards=24, loss=model.loss
    )
    low, high = found.bracket
    assert low <= 2 / curvature <= high
    assert high / low < 1.01
    assert found.sharpness == pytest.approx(curvature, rel=0.01)
    assert torch.equal(model.w, before)
    assert found.loss_nats == pytest.approx(model.loss(), rel=1e-12)


def test_six_forwards_from_the_right_size_give_it_within_a_fifth():
    model, calls = Quadratic(), []
    g = (model.h * model.w).detach()
    curvature = ((g * model.h * g).sum() / (g * g).sum()).item()

    def loss() -> float:
        calls.append(1)
        return model.loss()

    found = critical_sharpness(model, {"w": -g}, torch.empty(0), start=0.3, forwards=6, loss=loss)
    assert len(calls) == found.forwards == 6
    assert found.sharpness == pytest.approx(curvature, rel=0.2)


def test_uphill_and_endless_directions_are_told_apart():
    model = Quadratic()
    g = (model.h * model.w).detach()
    up = critical_sharpness(model, {"w": g}, torch.empty(0), start=0.1, loss=model.loss)
    assert (up.step, up.sharpness, up.bracket[0]) == (0.0, math.inf, 0.0)
    model.h.zero_()
    flat = critical_sharpness(model, {"w": g}, torch.empty(0), start=0.1, loss=lambda: -model.w[0])
    assert (flat.step, flat.sharpness, flat.bracket[1]) == (math.inf, 0.0, math.inf)


def test_a_language_model_keeps_its_bits_and_its_modes():
    from halfulp.train.config import ModelConfig
    from halfulp.train.model import build_model

    model = build_model(ModelConfig(preset="gpt2-tiny"), vocab=64, length=16, seed=0).model
    model.half().float()
    batch = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    loss = model(batch, labels=batch).loss
    grads = torch.autograd.grad(loss, list(model.parameters()))
    direction = {n: -g.sign() for (n, _), g in zip(model.named_parameters(), grads, strict=True)}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = critical_sharpness(model, direction, batch, start=1e-3, forwards=10)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert found.loss_nats == pytest.approx(loss.item(), rel=1e-5)

    def at(eta: float) -> float:
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(before[n] + eta * direction[n])
            return model.eval()(batch, labels=batch).loss.item()

    low, high = found.bracket
    assert at(low) <= at(0.0) < at(high)


def test_what_cannot_be_searched_is_said():
    model = Quadratic()
    g = torch.ones(4, dtype=torch.float64)
    with pytest.raises(CheckError, match="has 1 tensors that fit no parameter, v"):
        critical_sharpness(model, {"v": g}, torch.empty(0), start=0.1, loss=model.loss)
    with pytest.raises(CheckError, match="and none that does"):
        critical_sharpness(model, {}, torch.empty(0), start=0.1, loss=model.loss)
    with pytest.raises(CheckError, match="start = 0 give no bracket"):
        critical_sharpness(model, {"w": g}, torch.empty(0), start=0, loss=model.loss)
    with pytest.raises(CheckError, match="has 1 tensors that fit no parameter, w"):
        critical_sharpness(model, {"w": 3}, torch.empty(0), start=0.1, loss=model.loss)  # pyright: ignore[reportArgumentType]
    with pytest.raises(NonFiniteError, match="the direction of w holds inf or NaN"):
        critical_sharpness(model, {"w": g * math.nan}, torch.empty(0), start=1, loss=model.loss)
    with pytest.raises(NonFiniteError, match="the loss is nan before any step"):
        critical_sharpness(model, {"w": g}, torch.empty(0), start=1, loss=lambda: math.nan)
