import itertools
import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from halfulp.errors import ConfigError
from halfulp.sharpness.logits import logits_sharpness, logits_state, logits_sums, state_of


def logits(rows: int, vocab: int, seed: int = 0, scale: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    y = scale * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    return y, torch.randint(0, vocab, (rows,), generator=generator)


def phi(y, z, t) -> float:
    loss = cross_entropy(y, t)
    return (100 * (cross_entropy(y + z, t) - loss) / (1 + loss)).item()


@pytest.mark.parametrize("eps", [5e-4, 1e-2, 0.5])
def test_no_corner_of_the_box_is_higher(eps):
    """Cross entropy is convex, so its maximum over a box is at a corner: try all of them."""
    y, t = logits(1, 8)
    r = eps * (y.abs() + 1)
    corners = (torch.tensor(signs) for signs in itertools.product((-1.0, 1.0), repeat=8))
    best = max(phi(y, signs * r, t) for signs in corners)
    assert logits_sharpness(y, t, eps=eps) == pytest.approx(best, rel=1e-9)


def searched(y, t, eps: float, iterations: int, factor: float = 1.0) -> float:
    """φ as Keskar et al. find it, by L-BFGS-B; with the loss times `factor` it converges."""
    optimize = pytest.importorskip("scipy.optimize")

    def down(z):
        z = torch.tensor(z, requires_grad=True)
        loss = -factor * cross_entropy((y + z)[None], t[None])
        return loss.item(), torch.autograd.grad(loss, z)[0].numpy()

    found = optimize.minimize(
        down, [0.0] * len(y), jac=True, method="L-BFGS-B",
        bounds=[(-r, r) for r in (eps * (y.abs() + 1)).tolist()],
        options={"maxiter": iterations, "ftol": 0, "gtol": 0},
    )  # fmt: skip
    loss = cross_entropy(y[None], t[None]).item()
    return 100 * (-found.fun / factor - loss) / (1 + loss)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_what_a_long_search_finds(seed):
    vocab = (10, 50, 200, 1000)[seed % 4]
    eps = (5e-4, 1e-2)[seed // 4 % 2]
    y, t = logits(1, vocab, seed=seed, scale=1 + seed % 3)
    found = searched(y[0], t[0], eps, 200, factor=1000)
    assert logits_sharpness(y, t, eps=eps) == pytest.approx(found, rel=1e-9)


def test_the_short_search_of_the_papers_finds_less_in_large_vocabularies():
    y, t = logits(1, 32_000, scale=1.0)
    assert logits_sharpness(y, t, eps=5e-4) >= 1.25 * searched(y[0], t[0], 5e-4, 10)


def test_random_points_of_the_box_are_lower_and_the_corner_is_reached():
    y, t = logits(6, 300, seed=2)
    r = 1e-2 * (y.abs() + 1)
    exact = logits_sharpness(y, t, eps=1e-2)
    generator = torch.Generator().manual_seed(3)
    for _ in range(50):
        z = r * (2 * torch.rand(r.shape, generator=generator, dtype=r.dtype) - 1)
        assert phi(y, z, t) < exact
    corner = r.scatter(-1, t[:, None], -r.gather(-1, t[:, None]))
    assert phi(y, corner, t) == pytest.approx(exact, rel=1e-9)


def test_a_constant_in_the_logits_moves_it_and_not_the_centered_one():
    y, t = logits(64, 100)
    still, moved = logits_state(y, t), logits_state(y + 20, t)
    assert moved.sharpness_centered == pytest.approx(still.sharpness_centered, rel=1e-9)
    assert moved.sharpness > 4 * still.sharpness
    assert moved.logz == pytest.approx(still.logz + 20, rel=1e-12)
    assert moved.loss_nats == pytest.approx(cross_entropy(y, t).item(), rel=1e-12)


def test_fp32_is_as_good_as_fp64():
    y, t = logits(200, 2000, seed=4)
    single, double = logits_state(y.float(), t), logits_state(y, t)
    for name in ("sharpness", "sharpness_centered", "logz", "loss_nats"):
        assert getattr(single, name) == pytest.approx(getattr(double, name), rel=2e-6)
    half = logits_sharpness(y.bfloat16(), t)
    assert half == pytest.approx(double.sharpness, rel=0.02)


def test_the_last_position_of_each_sequence_is_the_one_of_the_paper():
    y, t = logits(24, 40)
    y, t = y.view(4, 6, 40), t.view(4, 6)
    last = logits_sharpness(y, t, tokens="last")
    assert last == pytest.approx(logits_sharpness(y[:, -1], t[:, -1]), rel=1e-12)
    assert last != pytest.approx(logits_sharpness(y, t), rel=1e-3)
    centered = logits_sharpness(y, t, center=True)
    assert centered == pytest.approx(logits_state(y, t).sharpness_centered, rel=1e-12)


def test_sums_add_over_parts_and_long_lists_are_cut():
    y, t = logits(30, 100_000, seed=5)  # fp64: the order of fp32 sums depends on the threads
    whole = logits_state(y, t)
    parts = state_of(logits_sums(y[:7], t[:7]) + logits_sums(y[7:], t[7:]))
    assert whole.positions == parts.positions == 30
    assert parts.sharpness == pytest.approx(whole.sharpness, rel=1e-12)
    assert math.isfinite(whole.sharpness)


def test_inputs_are_left_alone_and_logits_need_no_gradient():
    y, t = logits(5, 10)
    y = y.float().requires_grad_()
    before = y.detach().clone()
    logits_state(y, t)
    assert torch.equal(y.detach(), before)


@pytest.mark.parametrize(
    ("shape", "target", "options", "said"),
    [
        ((4, 9), (4,), {"tokens": "first"}, "tokens = 'first' does not exist"),
        ((4, 9), (4,), {"tokens": "last"}, "needs logits .sequences, positions, V."),
        ((4, 9), (3,), {}, "do not fit"),
        ((0, 9), (0,), {}, "do not fit"),
        ((4, 9), (4,), {"eps": 0.0}, "eps = 0.0 do not fit"),
    ],
)
def test_what_cannot_be_measured_is_said(shape, target, options, said):
    with pytest.raises(ConfigError, match=said):
        logits_sharpness(torch.zeros(shape), torch.zeros(target, dtype=torch.long), **options)
