"""Labels have the distribution of the model: a chi-square per vocabulary size."""

import pytest
import torch

from halfulp.sharpness.first_order import sampled_labels
from halfulp.sharpness.sampling import LabelSampler

ROWS = 60_000


def chi_square(labels, p) -> float:
    counts = torch.bincount(labels, minlength=len(p)).double()
    return ((counts - len(labels) * p).square() / (len(labels) * p)).sum().item()


@pytest.mark.parametrize("vocab", [2, 63, 64, 65, 130, 192])
def test_labels_follow_the_distribution(vocab):
    """Within 5 deviations of its mean, √2(V−1) each: 1 in 3,000 per size, by its heavier tail."""
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    sampler = LabelSampler(logits.log_softmax(-1).expand(ROWS, vocab))
    p = logits[0].double().softmax(-1)
    generator = torch.Generator().manual_seed(0)
    first, second = sampler.draw(generator), sampler.draw(generator)
    bound = vocab - 1 + 5 * (2 * (vocab - 1)) ** 0.5
    assert chi_square(first, p) < bound
    assert chi_square(second, p) < bound
    assert chi_square(first, p.roll(1)) > 10 * bound  # what a shifted index would give
    # Two draws agree as often as independent ones do, Σ p².
    agree, same = (first == second).double().mean().item(), p.square().sum().item()
    assert abs(agree - same) < 5 * (same * (1 - same) / ROWS) ** 0.5


def test_impossible_labels_are_never_drawn():
    logits = torch.zeros(20_000, 200)
    logits[:, 130:] = -torch.inf
    logits[:, 3:128] = -torch.inf
    labels = sampled_labels(logits, torch.Generator().manual_seed(0))
    assert set(labels.tolist()) == {0, 1, 2, 128, 129}


def test_rows_have_distributions_of_their_own():
    wanted = torch.randint(0, 1000, (5000,), generator=torch.Generator().manual_seed(1))
    logits = torch.nn.functional.one_hot(wanted, 1000).float() * 100
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        labels = sampled_labels(logits.to(dtype), torch.Generator().manual_seed(2))
        assert torch.equal(labels, wanted)


def test_the_same_generator_gives_the_same_labels():
    logits = torch.randn(100, 70, generator=torch.Generator().manual_seed(1))
    one, same, other = (
        sampled_labels(logits, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_rows_that_are_not_finite_have_labels_within_the_vocabulary():
    labels = sampled_labels(torch.full((3, 31), torch.nan), torch.Generator().manual_seed(0))
    assert bool(((labels >= 0) & (labels < 31)).all())
