"""The round-off claims of reproduce/, on small models: invariance, growth, and a few scores."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from reproduce import roundoff, roundoff_models
from reproduce.common import REFUTED, REPRODUCED
from reproduce.streams import few_scores, random_scores, residual
from reproduce.toy import untrained

IDS = torch.randint(0, 257, (2, 48), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
def test_claims_about_random_decoders_norms_and_softmax():
    results = list(roundoff.claims(count=400))
    assert len(results) == 6
    for result in results:
        assert result.verdict == REPRODUCED, result


def test_equal_weights_do_not_grow_faster():
    plain = roundoff.decoders.run(1.0, count=80)
    assert roundoff._growth(plain, plain).verdict == REFUTED
    assert roundoff._query_key(plain, plain).verdict == REFUTED


def test_scaled_residual_stream_keeps_its_relative_error():
    model = untrained("gpt2", layers=3)
    runs = {s: roundoff_models.compare(model, IDS, scale=s) for s in (1.0, 8.0, 64.0)}
    errors = [run.linf[-1] for run in runs.values()]
    assert max(errors) / min(errors) < 2.5
    assert runs[64.0].norm > 30 * runs[1.0].norm


def test_stored_stream_is_on_the_grid_and_costs_what_it_should():
    model = untrained("llama", layers=3)
    seen = []
    with residual(model, store=lambda x: x.bfloat16().float()), torch.no_grad():
        for layer in model.model.layers:
            layer.register_forward_hook(lambda m, a, y: seen.append(y))
        model(IDS)
    assert len(seen) == 3
    assert all(torch.equal(x, x.bfloat16().float()) for x in seen)
    model = untrained("llama", layers=3)
    low, wide = (roundoff_models.compare(model, IDS, bf16=b).linf[-1] for b in (True, False))
    assert 0.3 * 2**-8 < low < 3 * 2**-8
    assert wide < low / 1000


@pytest.mark.parametrize("tau", [0.05, 0.3])
def test_recomputed_scores_leave_at_most_tau(tau):
    p = (3 * torch.randn(2, 3, 16, 40, generator=torch.Generator().manual_seed(0))).softmax(-1)
    keep = few_scores(tau)(p)
    left = (p * (1 - p) * ~keep).sum(-1)
    assert (left <= tau + 1e-6).all()
    smallest = torch.where(keep, p * (1 - p), 9.0).amin(-1)  # one fewer would not do
    assert (left + smallest > tau - 1e-6)[keep.any(-1)].all()
    random = random_scores(tau, torch.Generator().manual_seed(1))(p)
    assert torch.equal(random.sum(-1), keep.sum(-1))
    assert not torch.equal(random, keep)


@pytest.mark.slow
def test_claims_on_trained_models():
    for result in roundoff_models.claims("full"):
        assert result.verdict == REPRODUCED, result
