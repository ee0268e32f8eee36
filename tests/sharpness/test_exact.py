"""Every estimator against dense matrices in float64, on models of 3,000 parameters (A1).

Stochastic estimates are judged by their own standard errors, at 4.5 of them: a correct estimator
fails one of some 40 comparisons for one seed in 3,000. The errors themselves are bounded on both
sides.
"""

import pytest
import torch

import halfulp
from halfulp.pieces import pieces
from halfulp.sharpness import hutchinson
from halfulp.sharpness.hessian import Hessian, twice_differentiable
from halfulp.sharpness.lanczos import eigenvalues, largest_eigenvalue
from tests.sharpness.oracles import TINY, curvature, dense_hessian

FAMILIES = tuple(TINY)
SIGMAS = 4.5


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_gnb_is_the_gauss_newton_trace(family):
    c = curvature(family)
    diagonal = c.gauss_newton_diagonal()
    report = halfulp.sharpness(c.model, c.batch, draws=250)
    for kind, at in c.by_type().items():
        row, exact = report.by_type[kind], diagonal[at].sum().item()
        assert abs(row.trace / exact - 1) < min(SIGMAS * row.rel_se, 0.15)
        assert 0.002 < row.rel_se < 0.08
        assert row.parameters == len(at)
        assert row.sharpness == pytest.approx(row.trace / len(at))
    for row in report.rows("tensor"):
        at = c.indices([p for p in report.pieces if p.name == row.name])
        # Gradients of one vector's few elements have heavy tails; a tenth more room.
        assert abs(row.trace - diagonal[at].sum().item()) < 1.1 * SIGMAS * row.trace * row.rel_se


def test_true_labels_are_another_matrix():
    """The power of the test above: with the labels of the data it would fail."""
    c = curvature("gpt2")
    diagonal = c.gauss_newton_diagonal()
    report = halfulp.sharpness(c.model, c.batch, estimator="fisher")
    ratios = [report.by_type[k].trace / diagonal[at].sum() for k, at in c.by_type().items()]
    assert max(ratios) > 1.5


@pytest.mark.parametrize("family", FAMILIES)
def test_products_are_those_of_the_dense_hessian(family):
    c, dense = curvature(family), dense_hessian(family)
    assert torch.allclose(dense, dense.T, atol=1e-12)
    parts = pieces(c.model)
    with twice_differentiable(c.model):
        hessian = Hessian(c.model, c.batch, parts)
        hessian.check(generator())
        for kind in (None, *c.by_type()):
            members = [i for i, p in enumerate(parts) if kind in (None, p.kind)]
            at = c.indices([parts[i] for i in members])
            v = torch.randn(len(at), generator=generator(), dtype=torch.float64)
            views = [parts[i].of(hessian.parameters[parts[i].parameter]) for i in members]
            split = v.split([p.numel() for p in views])
            vectors = [part.view(p.shape) for part, p in zip(split, views, strict=True)]
            found = torch.cat([h.flatten() for h in hessian.product(members, vectors)])
            assert torch.allclose(found, dense[at][:, at] @ v, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("family", "small", "groups"),
    [("gpt2", 0.0, 1), ("gpt2", 0.05, 3), ("llama", 0.2, 6)],
)
def test_probes_have_the_mean_and_the_variance_of_the_dense_hessian(
    family, small, groups, monkeypatch
):
    c, dense, parts = curvature(family), dense_hessian(family), pieces(curvature(family).model)
    monkeypatch.setattr(hutchinson, "SMALL", small)
    probed = hutchinson.probe_groups(parts)
    assert sorted(i for group in probed for i in group) == list(range(len(parts)))
    assert len(probed) == groups
    report = halfulp.sharpness(c.model, c.batch, estimator="hutchinson", draws=70)
    off = dense - dense.diagonal().diag()
    for group in probed:
        together = c.indices([parts[i] for i in group])
        for kind in {parts[i].kind for i in group}:
            at, row = c.by_type()[kind], report.by_type[kind]
            # Var vᵀ_b (H v)_b: entries within the type count twice, those to its group once.
            within, beside = off[at][:, at].square().sum(), off[at][:, together].square().sum()
            deviation = (within + beside).sqrt().item()
            assert abs(row.trace - dense.diagonal()[at].sum()) < SIGMAS * deviation / 70**0.5
            # A deviation of 70 nearly normal numbers is within 9 % of the truth in one sigma.
            assert 0.62 < abs(row.trace) * row.rel_std / deviation < 1.4


def test_small_types_have_probes_of_their_own(monkeypatch):
    dense, at = dense_hessian("gpt2"), curvature("gpt2").by_type()["norm"]
    off = dense - dense.diagonal().diag()
    assert off[at][:, at].square().sum() < 0.1 * off[at].square().sum()  # it would drown
    parts = pieces(curvature("gpt2").model)
    monkeypatch.setattr(hutchinson, "SMALL", 0.05)
    kinds = [sorted({parts[i].kind for i in group}) for group in hutchinson.probe_groups(parts)]
    assert sorted(kinds) == [["bias", "emb", "ffn", "qk", "vo"], ["norm"], ["pos"]]


@pytest.mark.parametrize("family", FAMILIES)
def test_lanczos_finds_the_largest_eigenvalue(family):
    c, dense = curvature(family), dense_hessian(family)
    with twice_differentiable(c.model):
        hessian = Hessian(c.model, c.batch, pieces(c.model))
        tight = eigenvalues(hessian, generator=generator(), steps=200, tolerance=1e-7)
        usual = eigenvalues(hessian, generator=generator())
    for kind, at in c.by_type().items():
        exact = torch.linalg.eigvalsh(dense[at][:, at])[-1].item()
        assert tight[kind].value == pytest.approx(exact, rel=1e-11)
        assert tight[kind].residual <= 1e-7 * exact
        found = usual[kind]
        assert found.value <= exact * (1 + 1e-12)
        assert found.steps <= 32
        if found.converged:
            assert found.value == pytest.approx(exact, rel=2e-3)


def test_lanczos_of_matrices_that_end_early():
    identity = largest_eigenvalue(lambda v: 3.0 * v, torch.ones(5, dtype=torch.float64))
    assert identity.value == pytest.approx(3.0)
    assert identity.steps == 1
    zero = largest_eigenvalue(lambda v: 0.0 * v, torch.ones(5, dtype=torch.float64))
    assert (zero.value, zero.converged) == (0.0, True)
    negative = torch.diag(torch.tensor([-4.0, -2.0, -1.0], dtype=torch.float64))
    found = largest_eigenvalue(lambda v: negative @ v, torch.ones(3, dtype=torch.float64))
    assert found.value == pytest.approx(-1.0)  # the largest, not the largest in size
    assert found.converged


def test_eigenvalues_stand_beside_gauss_newton_traces():
    c, dense = curvature("gpt2"), dense_hessian("gpt2")
    report = halfulp.sharpness(c.model, c.batch, estimator="lanczos", draws=4)
    plain = halfulp.sharpness(c.model, c.batch, estimator="gnb", draws=4)
    assert torch.equal(report.traces, plain.traces)
    at = c.by_type()["vo"]
    exact = torch.linalg.eigvalsh(dense[at][:, at])[-1].item()
    assert report.eigenvalues["vo"] == pytest.approx(exact, rel=2e-3)
    assert report.eigenvalues.keys() == c.by_type().keys()
    assert "MATH kernel" in " ".join(report.notes)
    assert "first batch, 14 positions" in " ".join(report.notes)
