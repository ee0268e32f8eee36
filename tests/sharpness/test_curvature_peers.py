"""The oracle beside curvlinops, where that is installed: pip install curvlinops-for-pytorch."""

import pytest
import torch
from torch import nn

from tests.sharpness.oracles import TINY, Curvature, curvature

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


class Flat(nn.Module):
    """Logits of the positions that predict something."""

    def __init__(self, c: Curvature):
        super().__init__()
        self.model = c.model

    def forward(self, ids):
        return self.model(ids).logits[:, :-1].flatten(0, 1)


@pytest.mark.parametrize("family", TINY)
def test_the_gauss_newton_matrix_of_curvlinops_has_our_diagonal(family):
    curvlinops = pytest.importorskip("curvlinops")
    c = Curvature(curvature(family).model, curvature(family).batch)
    c.model.set_attn_implementation("eager")  # forward mode has no fused attention
    try:
        targets = c.batch[:, 1:].flatten()
        name, parameter = next(iter(c.model.named_parameters()))
        operator = curvlinops.GGNLinearOperator(
            Flat(c), nn.CrossEntropyLoss(), [parameter], [(c.batch, targets)],
            check_deterministic=False, num_data=len(targets), batch_size_fn=lambda _: len(targets),
        )  # fmt: skip
        found = operator @ torch.eye(parameter.numel(), dtype=torch.float64)
    finally:
        c.model.set_attn_implementation("sdpa")
    assert name.endswith(("wte.weight", "embed_tokens.weight"))
    ours = c.gauss_newton_diagonal()[: parameter.numel()]
    # Eager attention of Llama rounds its softmax to fp32.
    assert torch.allclose(found.diagonal(), ours, rtol=1e-5, atol=1e-8)
    assert ours.max() > 1e-3
