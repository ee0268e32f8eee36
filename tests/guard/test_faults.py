import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from halfulp.errors import ConfigError
from halfulp.guard.faults import (
    BadBatch,
    Fault,
    FlippedBit,
    LostMoment,
    NanBatch,
    NoisyGemm,
    RateJump,
    ScaledWeight,
    StaleScale,
)
from halfulp.optim import AdamW
from halfulp.quantization import quantize, resolve

DOWN = "model.layers.1.mlp.down_proj"
GEMM = "layers.1.ffn.down_proj"


class Scene:
    """A small quantized model that trains, as a loop with faults would have it."""

    def __init__(self, recipe: str = "te_delayed") -> None:
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16,
        )  # fmt: skip
        self.model = LlamaForCausalLM(shape)
        self.handle = quantize(self.model, recipe)
        named = self.model.named_parameters()
        self.optimizer = AdamW([{"params": list(named), "block": ""}], lr=1e-3)
        self.optimizer.param_groups[0]["param_names"] = [
            n for n, _ in self.model.named_parameters()
        ]
        self.batch = torch.randint(32, (4, 16))

    def before(self, fault: Fault, step: int) -> None:
        self.optimizer.param_groups[0]["lr"] = 1e-3
        fault.before(step, self.model, self.handle, self.optimizer)

    def loss(self, fault: Fault | None = None, position: int = 0) -> torch.Tensor:
        batch = fault.tokens(position, self.batch) if fault else self.batch
        return self.model(input_ids=batch, labels=batch).loss

    def step(self, fault: Fault, step: int) -> float:
        self.handle.set_step(step)
        self.before(fault, step)
        loss = self.loss(fault, step - 1)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.handle.end_step()
        return loss.item()

    def weights(self) -> dict[str, torch.Tensor]:
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_damage_is_done_once_whatever_is_replayed():
    scene, fault = Scene("fp32"), ScaledWeight(3, parameter=f"{DOWN}.weight", factor=8.0)
    old = scene.weights()
    for step in (1, 2):
        scene.before(fault, step)
    assert not changed(old, scene.weights())
    for step in (3, 3, 2, 3, 4):
        scene.before(fault, step)
    new = scene.weights()
    assert changed(old, new) == {f"{DOWN}.weight"}
    assert torch.equal(new[f"{DOWN}.weight"], 8 * old[f"{DOWN}.weight"])


def test_a_bad_batch_is_the_same_noise_whenever_it_is_read():
    batch, fault = torch.full((4, 16), 7), BadBatch(5, vocab=32)
    assert fault.tokens(3, batch) is batch
    assert fault.tokens(5, batch) is batch
    noise = fault.tokens(4, batch)
    assert torch.equal(noise, fault.tokens(4, batch))
    assert noise.shape == batch.shape
    assert 0 <= noise.min() < 4
    assert 27 < noise.max() < 32  # 64 draws miss the last 4 of 32 with probability 2e-4


def test_the_embeddings_of_a_nan_batch_are_nan_and_no_others():
    scene, fault = Scene(), NanBatch(2)
    scene.before(fault, 1)
    scene.before(fault, 1)
    assert math.isfinite(scene.loss(fault, 0).item())
    assert math.isnan(scene.loss(fault, 1).item())
    assert math.isfinite(scene.loss().item())  # an evaluation right after it
    assert math.isnan(scene.loss(fault, 1).item())
    assert math.isfinite(scene.loss(fault, 2).item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flipped_bit_makes_one_weight_large_and_finite(dtype):
    places = set()
    for seed in range(5):
        scene, fault = Scene("fp32"), FlippedBit(1, parameter=f"{DOWN}.weight", seed=seed)
        scene.model.to(dtype)
        old = scene.weights()
        scene.before(fault, 1)
        new = scene.weights()
        assert changed(old, new) == {f"{DOWN}.weight"}
        (place,) = (old[f"{DOWN}.weight"] != new[f"{DOWN}.weight"]).nonzero().tolist()
        was, now = (w[f"{DOWN}.weight"][tuple(place)].double().item() for w in (old, new))
        assert math.isfinite(now)
        assert now == was * 2.0**128
        places.add(tuple(place))
    assert len(places) > 1  # five equal ones out of 2048 have probability below 1e-13


def test_a_stale_scale_saturates_the_share_asked_and_stays_until_the_recipe_changes():
    scene, fault = Scene(), StaleScale(3, gemm=GEMM, share=0.15)
    row = {}
    for step in range(1, 8):
        scene.handle.count(step in (2, 3, 7))
        scene.step(fault, step)
        rows = {(r["gemm"], r["operand"]): r for r in scene.handle.counters()}
        row[step] = rows.get((GEMM, "fprop.x"))
    assert row[2]["saturated"] < 0.01
    assert 0.14 < row[3]["saturated"] <= 0.15
    assert 0.10 < row[7]["saturated"] < 0.25
    assert row[2]["stale"] < 1.5 < 2 < row[3]["stale"]
    stale = {(r["gemm"], r["operand"]): r["stale"] for r in scene.handle.stale()}
    assert stale[GEMM, "fprop.x"] == pytest.approx(row[7]["stale"], rel=1e-5)
    assert max(v for place, v in stale.items() if place != (GEMM, "fprop.x")) < 2
    scene.handle.load_state_dict(scene.handle.state_dict())  # a rollback
    scene.step(fault, 3)
    stale = {(r["gemm"], r["operand"]): r["stale"] for r in scene.handle.stale()}
    assert stale[GEMM, "fprop.x"] > 2
    scene.handle.switch(resolve(scene.model, "te_current"))
    scene.handle.switch(resolve(scene.model, "te_delayed"))
    for step in (8, 9, 10):
        scene.step(fault, step)
    assert max(r["stale"] for r in scene.handle.stale()) < 2


def test_a_stale_scale_needs_a_delayed_one():
    scene = Scene("te_current")
    with pytest.raises(ConfigError, match="needs a delayed one"):
        scene.before(StaleScale(1, gemm=GEMM), 1)


def test_a_rate_jump_lasts_its_steps_and_ends_with_a_rollback():
    scene, fault = Scene("fp32"), RateJump(4, steps=3, factor=30.0)
    found = []
    for step in (3, 4, 5, 5, 6, 7):
        scene.before(fault, step)
        found.append(round(scene.optimizer.param_groups[0]["lr"] / 1e-3))
    assert found == [1, 30, 30, 30, 30, 1]
    fault = RateJump(4, steps=3)
    for step in (4, 5, 2, 3, 4, 5):
        scene.before(fault, step)
    assert scene.optimizer.param_groups[0]["lr"] == 1e-3


def test_lost_moments_make_the_updates_of_their_weights_larger():
    sizes = []
    for at in (6, 99):
        scene, fault = Scene("fp32"), LostMoment(at, parameters=(f"{DOWN}.weight",))
        for step in range(1, 6):
            scene.step(fault, step)
        old = scene.weights()
        scene.step(fault, 6)
        new = scene.weights()
        sizes.append({n: (new[n] - old[n]).norm().item() for n in old})
    hit, healthy = sizes
    assert hit[f"{DOWN}.weight"] > 2 * healthy[f"{DOWN}.weight"]
    assert all(hit[n] == healthy[n] for n in hit if n != f"{DOWN}.weight")


def test_a_noisy_gemm_errs_once_or_from_then_on_differently():
    scene = Scene()
    scene.handle.set_step(1)
    true = scene.loss().item()
    once = NoisyGemm(2, module=DOWN)
    scene.before(once, 1)
    assert scene.loss().item() == true
    scene.before(once, 2)
    assert [scene.loss().item() == true for _ in range(3)] == [False, True, True]
    scene.before(NoisyGemm(2, module=DOWN, lasting=True), 2)
    assert len({scene.loss().item() for _ in range(4)} | {true}) == 5
