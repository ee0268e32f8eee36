import pytest
import torch

from halfulp.run import Run
from halfulp.sharpness.logits import logits_state
from halfulp.train import evaluate as module
from halfulp.train.loop import config_of, train
from halfulp.train.model import next_token_logits, next_token_loss
from tests.train.test_train_loop import from_pretrained, open_data


def last_eval(path):
    return list(Run.open(path, writer=False).events("eval"))[-1]


def test_the_event_holds_the_sharpness_of_the_held_out_logits(make_config):
    path = train(make_config(policy={"recipe": "nvfp4_all"})).path
    event = last_eval(path)
    data = open_data(config_of(path))
    batches = [data.batch("val", i, rows=2, length=32, seed=0) for i in range(2)]
    with torch.no_grad():
        pairs = [next_token_logits(from_pretrained(path, 12), batch) for batch in batches]
    logits, targets = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    state = logits_state(logits, targets)
    found = event["logits_fp32"]
    assert found["positions"] == 128
    assert found["sharpness"] == pytest.approx(state.sharpness, rel=1e-5)
    assert found["sharpness_centered"] == pytest.approx(state.sharpness_centered, rel=1e-5)
    assert found["logz"] == pytest.approx(state.logz, rel=1e-5)
    # Another arithmetic, another number, of the same size.
    assert found["sharpness"] != event["logits"]["sharpness"]
    assert event["logits"]["sharpness"] == pytest.approx(found["sharpness"], rel=0.5)


def test_a_plain_run_has_one_sharpness(make_config):
    event = last_eval(train(make_config()).path)
    assert event["logits"] == event["logits_fp32"]


def test_many_positions_are_sampled_evenly_and_the_losses_stay(make_config, monkeypatch):
    whole = last_eval(train(make_config("whole")).path)
    monkeypatch.setattr(module, "_POSITIONS", 20)
    some = last_eval(train(make_config("some")).path)
    assert some["loss_nats"] == whole["loss_nats"]
    # 128 positions, every 7th of the 64 in each of two batches.
    assert some["logits"]["positions"] == len(range(0, 64, 7)) + len(range(1, 64, 7)) == 19
    assert some["logits"]["sharpness"] != whole["logits"]["sharpness"]
    assert some["logits"]["sharpness"] == pytest.approx(whole["logits"]["sharpness"], rel=0.2)


def test_the_loss_is_that_of_the_logits(make_config):
    path = train(make_config()).path
    model, batch = from_pretrained(path, 12), torch.arange(66).reshape(2, 33)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(*next_token_logits(model, batch))
        assert torch.equal(loss, next_token_loss(model, batch))
