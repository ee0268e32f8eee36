import pytest
import torch
from own_loops import Tiny, act_early, batches, llama, model_trained, noise
from torch import nn

import halfulp
from halfulp.errors import ConfigError, StoppedError

pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def _early(monkeypatch):
    act_early(monkeypatch)


def train(folder, data, *, guarded, policy=None, make=model_trained, accumulate=1, **options):
    """The model, guard and Trainer after one pass over `data`, in its order."""
    from transformers import Trainer, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    model = make()
    guard = halfulp.Guard(model, policy=policy, log=lambda row: None) if guarded else None
    if policy and not guarded:
        halfulp.quantize(model, policy)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, gradient_accumulation_steps=accumulate,
        num_train_epochs=1, lr_scheduler_type="constant", learning_rate=1e-3, report_to=[],
        save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True,
        **{"max_grad_norm": 0.5, **options},
    )  # fmt: skip
    rows = [{"input_ids": row, "labels": row} for batch in data for row in batch]
    callbacks = [guard.hf()] if guard else []
    trainer = InOrder(model, arguments, train_dataset=rows, callbacks=callbacks)
    return model, guard, trainer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize(
    ("make", "policy", "accumulate"),
    [(model_trained, None, 1), (model_trained, "te_delayed", 2), (llama, None, 2)],
)
def test_a_healthy_trainer_is_bit_identical_with_the_guard(tmp_path, make, policy, accumulate):
    """llama sums over micro-batches (num_items_in_batch), the other one averages."""
    models = []
    for guarded in (False, True):
        model, guard, trainer = train(
            tmp_path, batches(7), guarded=guarded, make=make, policy=policy, accumulate=accumulate
        )
        trainer.train()
        models.append(model)
    assert same(*models)
    assert not guard.incidents
    assert trainer.args.max_grad_norm == 0.5


def test_an_update_is_really_not_made_and_moments_stay(tmp_path):
    data = batches(32)
    plain, _, first = train(tmp_path, data, guarded=False)
    watched, guard, second = train(tmp_path, [*data[:28], noise(), *data[28:]], guarded=True)
    first.train()
    second.train()
    (incident,) = guard.incidents
    assert (incident.action, incident.verdict.kind) == ("skip", "data")
    assert same(plain, watched)
    states = [t.optimizer.optimizer.state[p] for t, m in ((first, plain), (second, watched))
              for p in (m.lm_head.weight,)]  # fmt: skip
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_it_rolls_back_while_the_trainers_data_goes_on(tmp_path):
    from transformers import TrainerCallback

    class Damage(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **_):
            if state.global_step == 29:
                with torch.no_grad():
                    model.lm_head.weight.mul_(8)

    watched, guard, trainer = train(tmp_path, batches(30), guarded=True)
    trainer.add_callback(Damage())
    trainer.train()
    (incident,) = guard.incidents
    assert (incident.trigger.step, incident.action, incident.step) == (30, "roll back", 0)
    assert "the data goes on" in incident.done[-1]
    assert same(watched, model_trained())
    assert trainer.state.global_step == 30


def test_it_raises_a_block_in_a_trainer(tmp_path):
    from transformers import TrainerCallback

    class Outgrown(TrainerCallback):
        def on_step_begin(self, args, state, control, *, model, **_):
            history = model.halfulp.sites["layers.1.ffn.down_proj"].histories.get("fprop_x")
            if history is not None:
                history.scale = history.scale * 16

    _, guard, trainer = train(tmp_path, batches(7), guarded=True, policy="te_delayed")
    guard._keeper.budget = halfulp.Budget(raised=0.5)
    trainer.add_callback(Outgrown())
    trainer.train()
    assert [b for b, recipe in guard.map().items() if recipe != "te_delayed"] == ["layers.1.ffn"]


def test_a_run_that_cannot_be_saved_ends_the_training(tmp_path):
    model, guard, trainer = train(tmp_path, batches(3), guarded=True)
    guard._keeper.budget = halfulp.Budget(rollbacks=1)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(StoppedError):
        trainer.train()


def test_what_cannot_be_guarded_is_told(tmp_path):
    _, guard, trainer = train(tmp_path, batches(3), guarded=True)
    trainer.model = trainer.model_wrapped = Tiny()
    with pytest.raises(ConfigError, match="another model"):
        trainer.train()
    _, guard, trainer = train(tmp_path, batches(3), guarded=True)
    trainer.args.fp16 = True
    with pytest.raises(ConfigError, match="fp16"):
        guard.hf().on_train_begin(trainer.args, None, None, model=guard.model, optimizer=None)
