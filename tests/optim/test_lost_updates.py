"""Updates that rounding swallows, in the known case, and stochastic rounding that keeps them."""

import numpy as np
import pytest
import torch

from halfulp.optim import AdamW

N = 1 << 16


def first_step(lr: float, weight_decay: float = 0.0, **options) -> tuple[dict, torch.Tensor]:
    """Counters and weights of one step from N(0, 0.02²); Adam's first update is lr · sign(g)."""
    generator = torch.Generator().manual_seed(0)
    p = torch.nn.Parameter((0.02 * torch.randn(N, generator=generator)).bfloat16().float())
    p.grad = torch.where(torch.rand(N, generator=generator) < 0.5, -1e-3, 1e-3)
    opt = AdamW([("w", p)], lr=lr, weight_decay=weight_decay, weight="bf16", **options)
    opt.count(True)
    opt.step()
    (row,) = opt.counters()
    return row, p.detach()


def weights() -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return (0.02 * torch.randn(N, generator=generator)).bfloat16().double().numpy()


def signs() -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    torch.randn(N, generator=generator)
    return np.where(torch.rand(N, generator=generator).numpy() < 0.5, -1.0, 1.0)


@pytest.mark.parametrize(
    ("lr", "low", "high"), [(1e-4, 0.10, 0.14), (2e-5, 0.67, 0.73), (6e-7, 0.98, 1.0)]
)
def test_share_of_lost_updates_in_bf16(lr, low, high, kernel_name):
    row, w = first_step(lr)
    assert low < row["lost_updates"] < high
    assert row["asked"] == 1
    assert row["lost_updates"] == row["unchanged"] == np.mean(w.double().numpy() == weights())


def test_a_lost_update_is_one_below_half_the_spacing():
    """Independent count: |Δ| against half the distance to the neighbor in its direction."""
    lr, w = 2e-5, weights()
    bits = np.abs(w).astype(np.float32).view(np.uint32)
    outward = (bits + (1 << 16)).view(np.float32).astype(np.float64) - np.abs(w)
    inward = np.abs(w) - (bits - (1 << 16)).view(np.float32).astype(np.float64)
    gap = np.where(-signs() * np.sign(w) > 0, outward, inward)
    assert first_step(lr)[0]["lost_updates"] == pytest.approx(np.mean(lr < gap / 2), abs=1e-3)


@pytest.mark.parametrize(("lr", "low", "high"), [(1e-4, 1, 1), (3e-3, 1, 1), (3e-2, 0.3, 0.9)])
def test_decay_is_lost_up_to_a_large_learning_rate(lr, low, high, kernel_name):
    """Decay 0.1 shrinks by lr / 10; half a bf16 step is 2^-9 to 2^-8 of the weight."""
    row, _ = first_step(lr, weight_decay=0.1)
    assert low <= row["lost_decay"] <= high


def test_nothing_is_lost_in_fp32():
    p = torch.nn.Parameter(torch.from_numpy(weights()).float())
    p.grad = torch.full((N,), 1e-3)
    opt = AdamW([("w", p)], lr=6e-7, weight_decay=0.1)
    opt.count(True)
    opt.step()
    (row,) = opt.counters()
    assert row["lost_updates"] < 0.001
    assert row["lost_decay"] == pytest.approx(0, abs=0.7)  # 1 − 6e-8 is half an fp32 ulp of 1
    assert row["update_rms"] == pytest.approx(6e-7, rel=0.01)


@pytest.mark.parametrize("lr", [1e-4, 2e-5, 6e-7])
def test_stochastic_updates_are_right_in_the_mean(lr, kernel_name):
    """|mean(realized − asked)| < 4 standard errors: fails with probability 6e-5 a case."""
    row, w = first_step(lr, update_rounding="stochastic")
    asked = -lr * signs() / (1 + 1e-8 / 1e-3)
    error = w.double().numpy() - weights() - asked
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(N)
    # Two-sided: along the update nothing is lost, and the noise is that of the rounding.
    along = (error * signs()).mean()
    assert abs(along) < 4 * error.std() / np.sqrt(N)
    assert error.std() > 0.1 * lr
    assert row["lost_updates"] == row["lost_decay"] == 0
    assert row["unchanged"] > 0.1


def test_nearest_updates_are_wrong_in_the_mean():
    """The same test fails by far for round to nearest at a small learning rate."""
    _, w = first_step(6e-7)
    realized = (w.double().numpy() - weights()) * -signs()
    assert realized.mean() < 0.2 * 6e-7 or realized.mean() > 5 * 6e-7


def test_many_small_steps_accumulate_only_stochastically(kernel_name):
    """1 − 300 · 2e-4 = 0.94 in bf16 (spacing 2^-8): nearest stays at 1, stochastic gets there."""
    ends = {}
    for rounding in ("nearest", "stochastic"):
        p = torch.nn.Parameter(torch.ones(512))
        opt = AdamW([("w", p)], lr=2e-4, weight_decay=0.0, weight="bf16", update_rounding=rounding)
        for _ in range(300):
            p.grad = torch.ones(512)
            opt.step()
        ends[rounding] = p.detach().double()
    assert (ends["nearest"] == 1).all()
    mean, std = ends["stochastic"].mean(), ends["stochastic"].std()
    assert abs(mean - 0.94) < 4 * std / 512**0.5
    assert 0.005 < std < 0.03


def test_counters_of_a_stopped_and_a_moving_weight(kernel_name):
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 0.0, 0.001]))
    p.grad = torch.tensor([0.0, 1.0, 1.0, 1.0])
    opt = AdamW([("w", p)], lr=1e-3, weight_decay=0.0, weight="bf16", moment_v="e2m1")
    opt.count(True)
    opt.step()
    (row,) = opt.counters()
    assert (row["parameter"], row["block"], row["weight_format"]) == ("w", "", "bf16")
    assert row["n"] == 4
    assert row["asked"] == 0.75
    assert row["lost_updates"] == pytest.approx(1 / 3)
    assert row["update_rms"] == pytest.approx(1e-3 * 0.75**0.5, rel=1e-5)
    assert row["v_underflow"] == 0.75  # v = 0.05 rounds to 0 in e2m1
    assert row["lost_decay"] == 0
