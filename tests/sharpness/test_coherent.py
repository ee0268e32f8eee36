"""The quadratic form of the Gauss-Newton matrix along a direction, against the dense matrix."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from halfulp.pieces import pieces
from halfulp.sharpness.coherent import quadratic_form
from halfulp.sharpness.weights import Weights, weight_quantizer
from tests.check.toys import Words


def jacobian(model: nn.Module, ids: Tensor, names: list[str]) -> tuple[dict[str, Tensor], Tensor]:
    """(Jacobian [N, V, …] of the logits for each name, their softmax [N, V]), in float64."""
    model = copy.deepcopy(model).double()
    named = {n: p.detach() for n, p in model.named_parameters()}

    def logits(part: dict[str, Tensor]) -> Tensor:
        return functional_call(model, named | part, (ids,))[:, :-1].flatten(0, 1)

    moved = {n: named[n] for n in names}
    return jacrev(logits)(moved), logits(moved).softmax(-1)


def dense(jacobian: dict[str, Tensor], p_NV: Tensor, direction: dict[str, Tensor]) -> float:
    """½ δᵀGδ with G = mean over positions of Jᵀ (diag p − p pᵀ) J."""
    changes = [(jacobian[n] * delta.double()).flatten(2).sum(2) for n, delta in direction.items()]
    change_NV = torch.stack(changes).sum(0)
    middle = torch.diag_embed(p_NV) - p_NV[:, :, None] * p_NV[:, None, :]
    return (torch.einsum("nv,nvw,nw->", change_NV, middle, change_NV) / 2 / len(p_NV)).item()


@pytest.mark.parametrize("kind", ["norm", "bias", "qk"])
def test_quadratic_form_is_that_of_the_dense_matrix(kind):
    torch.manual_seed(0)
    model, ids = Words(d=8, layers=1), torch.randint(31, (2, 7))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    names = [p.parameter for p in pieces(model) if p.kind == kind]
    exact = jacobian(model, ids, names)
    for used in (model, copy.deepcopy(model).double()):
        weights = Weights.of(used)
        for word in ("bf16", "e4m3", "e2m1"):
            direction = {n: weights.error(n, weight_quantizer(word)) for n in names}
            found = quadratic_form(used, [ids[:1], ids[1:]], weights, direction)
            assert abs(found / dense(*exact, direction) - 1) < 0.01
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_nothing_moves_nothing():
    model = Words(d=8, layers=1)
    direction = {"norm.bias": torch.zeros(8)}
    assert quadratic_form(model, [torch.zeros(1, 4).long()], Weights.of(model), direction) == 0.0
