import warnings

import pytest
import torch
from own_loops import act_early, batches, loss_of, model_trained, noise
from torch import Tensor, nn

import halfulp
from halfulp.errors import ConfigError, MissingExtraError

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning.pytorch as pl
except ImportError:
    pl = None

needs_lightning = pytest.mark.skipif(pl is None, reason="Lightning is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own


@pytest.fixture(autouse=True)
def _early(monkeypatch):
    act_early(monkeypatch)


def train(data, *, guarded, policy=None, accumulate=1, before=lambda step, net: None, fit=True):
    class Module(pl.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            before(index + 1, self.net)
            return loss_of(self.net, batch)

        def configure_optimizers(self):
            return torch.optim.AdamW(self.net.parameters(), lr=1e-3)

    net = model_trained()
    guard = halfulp.Guard(net, policy=policy, log=lambda row: None) if guarded else None
    if policy and not guarded:
        halfulp.quantize(net, policy)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=0.5,
        accumulate_grad_batches=accumulate, callbacks=[guard.lightning()] if guard else [],
    )  # fmt: skip
    module = Module(net)
    if fit:
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    return module, guard, trainer


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@needs_lightning
@pytest.mark.parametrize(("policy", "accumulate"), [(None, 1), ("te_delayed", 2)])
def test_a_healthy_run_is_bit_identical_with_the_guard(policy, accumulate):
    plain, _, _ = train(batches(8), guarded=False, policy=policy, accumulate=accumulate)
    watched, guard, _ = train(batches(8), guarded=True, policy=policy, accumulate=accumulate)
    assert same(plain, watched)
    assert not guard.incidents


@needs_lightning
def test_an_update_is_really_not_made_and_moments_stay():
    data = batches(32)
    plain, _, first = train(data, guarded=False)
    watched, guard, second = train([*data[:28], noise(), *data[28:]], guarded=True)
    (incident,) = guard.incidents
    assert (incident.action, incident.verdict.kind) == ("skip", "data")
    assert same(plain, watched)
    states = [t.optimizers[0].state[m.net.lm_head.weight]
              for t, m in ((first, plain), (second, watched))]  # fmt: skip
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@needs_lightning
def test_it_rolls_back_and_its_state_is_in_the_checkpoint(tmp_path):
    def damage(step: int, net: nn.Module) -> None:
        if step == 30:
            with torch.no_grad():
                net.lm_head.weight.mul_(8)

    watched, guard, trainer = train(batches(30), guarded=True, before=damage)
    (incident,) = guard.incidents
    assert (incident.trigger.step, incident.action, incident.step) == (30, "roll back", 0)
    assert same(watched.net, model_trained())
    trainer.save_checkpoint(tmp_path / "all.ckpt")
    saved = torch.load(tmp_path / "all.ckpt", weights_only=True)["callbacks"]
    (state,) = (state for name, state in saved.items() if "GuardCallback" in name)
    assert state["keeper"]["spent"]["rollbacks"] == [30]


@needs_lightning
def test_what_cannot_be_guarded_is_told():
    module, _, trainer = train([], guarded=True, fit=False)
    module.automatic_optimization, trainer.gradient_clip_val = False, None
    with pytest.raises(ConfigError, match="manual optimization"):
        trainer.fit(module, torch.utils.data.DataLoader(batches(2), batch_size=None))


def test_without_lightning_the_extra_is_named(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(MissingExtraError, match=r"halfulp\[lightning\]"):
        halfulp.Guard(model_trained()).lightning()
