"""Which logits predict which labels, for every kind of batch."""

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from halfulp.batch import describe, predict, run
from halfulp.errors import CheckError

V = 7


class Echo(nn.Module):
    """Logits that tell where they come from: entry v of position t of row b is 100 b + 10 t + v."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, input_ids=None, attention_mask=None, **more):
        self.seen = more
        rows, length = input_ids.shape
        at = 100 * torch.arange(rows).view(-1, 1, 1) + 10 * torch.arange(length).view(1, -1, 1)
        return CausalLMOutput(logits=(at + torch.arange(V)).float())


class Rows(nn.Module):
    """One row of logits per row of features."""

    def forward(self, x):
        return x @ torch.ones(3, V)


def positions(logits: Tensor) -> list[int]:
    return logits[:, 0].int().tolist()


def test_each_position_predicts_the_next_token():
    ids = torch.tensor([[3, 1, 4], [1, 5, 2]])
    found = predict(Echo(), ids)
    assert positions(found.logits_NV) == [0, 10, 100, 110]
    assert found.targets_N.tolist() == [1, 4, 5, 2]
    again = predict(Echo(), {"input_ids": ids})
    assert torch.equal(again.logits_NV, found.logits_NV)


def test_labels_are_shifted_and_kept_from_the_model():
    ids = torch.tensor([[3, 1, 4, 1]])
    model = Echo()
    found = predict(model, {"input_ids": ids, "labels": torch.tensor([[6, -100, 5, 2]])})
    assert model.seen == {}
    # Position 0 would predict the label at 1, which does not count.
    assert positions(found.logits_NV) == [10, 20]
    assert found.targets_N.tolist() == [5, 2]


@pytest.mark.parametrize(
    ("mask", "where"), [([0, 1, 1, 1], [10, 20]), ([1, 1, 1, 0], [0, 10]), ([1, 0, 1, 1], [10, 20])]
)
def test_masked_tokens_are_not_predicted(mask, where):
    """A position whose own token is masked may predict: packing and padding mask targets."""
    ids = torch.tensor([[3, 1, 4, 5]])
    found = predict(Echo(), {"input_ids": ids, "attention_mask": torch.tensor([mask])})
    kept = [t for t in range(3) if mask[t + 1]]
    assert found.targets_N.tolist() == [ids[0, t + 1].item() for t in kept]
    assert positions(found.logits_NV) == [10 * t for t in kept]


def test_one_label_per_row_of_logits():
    batch = {"x": torch.ones(4, 3), "labels": torch.tensor([0, 1, -100, 3])}
    found = predict(Rows(), batch)
    assert found.logits_NV.shape == (3, V)
    assert found.targets_N.tolist() == [0, 1, 3]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        (
            {"input_ids": torch.ones(2, 4, dtype=torch.int64), "labels": torch.ones(2, 3).long()},
            r"labels of shape \(2, 3\) do not fit logits of shape \(2, 4, 7\)",
        ),
        (torch.ones(2, 1, dtype=torch.int64), "no label that counts"),
        (
            {"input_ids": torch.ones(1, 3).long(), "labels": torch.full((1, 3), -100)},
            "no label that counts",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.zeros(1, 3).long()},
            "no label that counts",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "labels": torch.full((1, 3), V)},
            f"labels reach from {V} to {V}, and the model predicts {V} tokens",
        ),
        (
            {"input_ids": torch.ones(1, 3).long(), "labels": torch.full((1, 3), -1)},
            "labels reach from -1 to -1",
        ),
        (torch.ones(3, dtype=torch.int64), "cannot run on int64"),
        ("text", "cannot run on str"),
    ],
)  # fmt: skip
def test_batches_that_predict_nothing(batch, says):
    with pytest.raises(CheckError, match=says):
        predict(Echo(), batch)


def test_rows_without_labels():
    with pytest.raises(CheckError, match="has no labels"):
        predict(Rows(), {"x": torch.ones(4, 3)})
    with pytest.raises(CheckError, match="has no labels"):
        predict(Rows(), torch.ones(4, 3))


def test_models_that_return_no_logits():
    with pytest.raises(CheckError, match=r"must return logits .* found Tensor of shape \(\)"):
        run(nn.MSELoss(reduction="sum"), {"input": torch.ones(2), "target": torch.ones(2)})


def test_describe_says_types_and_shapes():
    batch = {"input_ids": torch.ones(2, 3).long(), "n": 1}
    assert describe(batch) == "{input_ids: int64 (2, 3), n: int}"
