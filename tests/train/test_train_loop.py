import json
import math
import os
import signal
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from halfulp.errors import NonFiniteError, PolicyError, RunError
from halfulp.run import Run
from halfulp.train import step as step_module
from halfulp.train.loop import config_of, train
from halfulp.train.model import build_model, next_token_loss


def weights(run, step: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/step-{step:08d}/model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_and_records_what_happened(make_config):
    config = make_config(policy={"recipe": "te_delayed"})
    seen: list[str] = []
    summary = train(config, on_event=lambda event: seen.append(event["event"]))
    run = Run.open(summary.path, writer=False)
    steps = list(run.events("step"))
    assert [e["step"] for e in steps] == list(range(1, 13))
    assert [e["tokens"] for e in steps] == [64 * k for k in range(1, 13)]
    assert all(e["seconds"] > 0 and e["grad_norm"] > 0 for e in steps)
    assert [e["step"] for e in run.events("eval")] == [4, 8, 12]
    assert [e["step"] for e in run.events("checkpoint")] == [4, 8, 12]
    assert [e["step"] for e in run.events("counters")] == [6, 12]
    assert [e["event"] for e in run.events()] == seen
    assert next(run.events("end"))["reason"] == summary.reason == "finished"
    losses = [e["loss_nats"] for e in run.events("eval")]
    assert losses[0] > losses[-1] == summary.loss_nats
    assert 2 < losses[-1] < 5.3
    assert not summary.diverged
    facts = run.summary()
    assert facts["recipe"] == "te_delayed"
    assert facts["parameters"] == sum(t.numel() for t in weights(summary.path, 12).values())
    assert facts["data"]["digest"]
    assert facts["policy"][0][0] == "*"


def test_the_same_configuration_gives_the_same_bits_and_another_seed_does_not(make_config):
    recipe = {"recipe": "bf16_weights_sr"}
    runs = [
        train(make_config(name, policy=recipe, train={"seed": seed})).path
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    a, b, c = (weights(run, 12) for run in runs)
    assert equal(a, b)
    assert not any(torch.equal(a[name], c[name]) for name in a if a[name].ndim > 1)


def test_the_global_random_state_is_left_alone(make_config):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(make_config(train={"steps": 1}))
    assert torch.equal(torch.get_rng_state(), before)


def test_two_micro_batches_are_one_of_twice_the_size(make_config):
    whole = train(make_config("whole", train={"rows": 4}))
    split = train(make_config("split", train={"rows": 2, "accumulate": 2}))
    a, b = (weights(run.path, 12) for run in (whole, split))
    apart = max((a[n] - b[n]).abs().max().item() for n in a)
    # Only the order of fp32 sums differs; Adam turns a relative error in g into the same in dw.
    assert apart < 1e-3
    assert whole.tokens == split.tokens


def test_evaluation_is_also_in_fp32(make_config):
    plain = train(make_config("plain"))
    assert plain.loss_nats == plain.loss_nats_fp32
    coarse = train(make_config("coarse", policy={"recipe": "nvfp4_all"}))
    assert 0 < abs(coarse.loss_nats - coarse.loss_nats_fp32) < 0.5
    model = from_pretrained(coarse.path, 12)
    data = open_data(config_of(coarse.path))
    batches = [data.batch("val", i, rows=2, length=32, seed=0) for i in range(2)]
    with torch.no_grad():
        loss = sum(next_token_loss(model, batch).item() for batch in batches) / 2
    assert loss == pytest.approx(coarse.loss_nats_fp32, rel=1e-6)


@pytest.mark.parametrize("preset", ["gpt2-tiny", "qwen3-tiny"])
def test_checkpoints_of_tied_models_load_in_transformers_and_start_a_run(make_config, preset):
    model = {"preset": preset, "hidden": 0}
    first = train(make_config("first", model=model, train={"steps": 2}))
    loaded = from_pretrained(first.path, 2)
    saved = weights(first.path, 2)
    assert {n for n, _ in loaded.named_parameters()} == set(saved)
    assert all(torch.equal(p, saved[n]) for n, p in loaded.named_parameters())
    folder = first.path / "checkpoints/step-00000002"
    again = make_config("again", model={"preset": str(folder), "hidden": 0}, train={"steps": 1})
    built = build_model(again.model, vocab=257, length=32, seed=9)
    assert built.origin == f"weights loaded from {folder}"
    assert all(torch.equal(p, saved[n]) for n, p in built.model.named_parameters())
    assert train(again).loss_nats < first.loss_nats + 0.5


def test_counters_are_counts_out_of_their_total(make_config):
    config = make_config(policy={"recipe": "fp8_unscaled"}, train={"count_every": 12})
    event = next(Run.open(train(config).path, writer=False).events("counters"))
    rows = {(r["gemm"], r["operand"]): r for r in event["gemms"]}
    assert all(isinstance(r[k], int) for r in rows.values() for k in ("n", "saturated"))
    # The gradient of a mean over 64 tokens lies below an unscaled e5m2, the weights in e4m3.
    gradient = rows["layers.1.qk.q_proj", "dgrad.g"]
    weight = rows["layers.1.qk.q_proj", "fprop.w"]
    assert (gradient["n"], weight["n"]) == (2 * 32 * 32, 32 * 32)
    assert 0.8 < gradient["underflow"] / gradient["n"] <= 1
    assert 0 < weight["underflow"] / weight["n"] < 0.05
    bf16 = make_config("bf16", policy={"recipe": "bf16_weights"}, train={"lr": 1e-5})
    event = next(Run.open(train(bf16).path, writer=False).events("counters"))
    shares = [r["lost_updates"] / r["asked"] for r in event["optimizer"] if r["block"] == "emb"]
    assert 0.2 < shares[0] <= 1


def test_staged_precision_changes_policy_and_keeps_the_moments(make_config):
    stages = [{"until": 0.5, "recipe": "bf16_weights_sr"}]
    staged = train(make_config("staged", policy={"recipe": "te_current", "schedule": stages}))
    plain = train(make_config("plain", policy={"recipe": "bf16_weights_sr"}))
    run = Run.open(staged.path, writer=False)
    said = [(e["step"], e["recipe"]) for e in run.events("schedule")]
    assert said == [(1, "bf16_weights_sr"), (7, "te_current")]
    losses = [[e["loss_nats"] for e in Run.open(s.path).events("step")] for s in (staged, plain)]
    assert losses[0][:6] == losses[1][:6]
    assert losses[0][7:] != losses[1][7:]
    moments = load_file(staged.path / "checkpoints/step-00000012/optimizer.safetensors")
    assert {int(t) for name, t in moments.items() if name.endswith("/step")} == {12}


def poisoned(monkeypatch, module: str, at: int, kind: str) -> None:
    """From step `at` on, `module` gives a non-finite output or weight gradient."""
    calls = [0]

    def loss(model, batch_BT):
        if model.training and torch.is_grad_enabled():
            calls[0] += 1
        target = model.get_submodule(module)
        if calls[0] < at or not model.training:
            return next_token_loss(model, batch_BT)
        if kind == "loss":
            hook = target.register_forward_hook(lambda m, i, o: o * math.inf, prepend=True)
        else:
            hook = target.weight.register_hook(lambda g: g * math.nan)
        try:
            return next_token_loss(model, batch_BT)
        finally:
            hook.remove() if kind == "loss" else None

    monkeypatch.setattr(step_module, "next_token_loss", loss)


@pytest.mark.parametrize(
    ("kind", "module", "block"),
    [
        ("gradient", "model.layers.1.mlp.down_proj", "layers.1.ffn"),
        ("gradient", "model.layers.0.self_attn.q_proj", "layers.0.qk"),
        ("loss", "model.layers.0.mlp.up_proj", "layers.0.ffn"),
    ],
)
def test_a_non_finite_step_stops_the_run_before_the_update(
    make_config, monkeypatch, kind, module, block
):
    clean = train(make_config("clean", train={"steps": 12, "keep": 9}))
    poisoned(monkeypatch, module, 7, kind)
    config = make_config("run", guard={"on": False})
    with pytest.raises(NonFiniteError) as error:
        train(config)
    said = str(error.value)
    assert f"step 7: the {kind} is not finite; first in {block}" in said
    assert "Last good checkpoint: step 4" in said
    assert "checkpoints/step-00000004" in said
    run = Run.open(config.run.out, writer=False)
    *_, bad, end = run.events()
    assert (bad["event"], bad["step"], bad["what"], bad["block"]) == ("nonfinite", 7, kind, block)
    assert (end["event"], end["reason"], end["step"]) == ("end", "nonfinite", 6)
    assert [p.name for p in run.checkpoints()] == ["step-00000004"]
    assert equal(weights(run.path, 4), weights(clean.path, 4))
    assert run.summary()["diverged"] is True


def test_a_loss_scale_skips_and_backs_off_and_gives_up_in_the_end(make_config, monkeypatch):
    poisoned(monkeypatch, "model.layers.0.mlp.up_proj", 3, "gradient")
    options = {"steps": 60, "checkpoint_every": 0, "eval_every": 0, "count_every": 0}
    config = make_config(policy={"recipe": "fp16_amp"}, train=options, guard={"on": False})
    with pytest.raises(NonFiniteError, match=r"step 43: the gradient is not finite"):
        train(config)
    events = list(Run.open(config.run.out, writer=False).events("loss_scale"))
    assert [e["step"] for e in events] == list(range(3, 43))
    assert all(e["skipped"] for e in events)
    assert all(b["scale"] == a["scale"] / 2 for a, b in pairwise(events))
    assert events[0]["scale"] == 32768


def test_a_non_finite_weight_is_never_written(make_config, monkeypatch):
    from halfulp.optim import AdamW

    update = AdamW.step

    def overflow(self, closure=None):
        update(self, closure)
        self.param_groups[-1]["params"][0].data.view(-1)[0] = math.inf

    monkeypatch.setattr(AdamW, "step", overflow)
    config = make_config(train={"steps": 1})
    with pytest.raises(NonFiniteError, match="is not finite after the update, so no checkpoint"):
        train(config)
    run = Run.open(config.run.out, writer=False)
    assert run.checkpoints() == []
    assert next(run.events("end"))["reason"] == "nonfinite"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_finishes_the_step_and_the_resumed_run_is_the_same(make_config, number):
    policy = {"recipe": "te_delayed"}
    whole = train(make_config("whole", policy=policy))
    config = make_config("cut", policy=policy)
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(event):
        if event["event"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), number)

    cut = train(config, on_event=interrupt)
    assert (cut.reason, cut.steps) == ("interrupted", 6)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = train(config_of(cut.path), resume=cut.path)
    assert resumed.reason == "finished"
    assert equal(weights(cut.path, 12), weights(whole.path, 12))
    assert (resumed.loss_nats, resumed.tokens) == (whole.loss_nats, whole.tokens)
    assert train(config_of(cut.path), resume=cut.path) == resumed


def test_a_resumed_run_keeps_its_configuration(make_config):
    path = train(make_config(train={"steps": 4})).path
    with pytest.raises(RunError, match="another configuration"):
        train(make_config(train={"steps": 5}), resume=path)
    with pytest.raises(RunError, match=r"no checkpoint of step 3. It has: 4"):
        train(config_of(path), resume=path, from_step=3)


def test_a_policy_that_changed_is_refused_and_the_run_left_as_it_was(make_config, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text('[[rule]]\nmatch = "*"\nrecipe = "te_current"\n')
    config = make_config(policy={"file": str(policy)}, train={"checkpoint_every": 2})
    path = train(config).path
    before = (path / "events.jsonl").read_bytes()
    policy.write_text('[[rule]]\nmatch = "*"\nrecipe = "nvfp4_all"\n')
    with pytest.raises(RunError, match="written with another policy"):
        train(config_of(path), resume=path, from_step=10)
    assert (path / "events.jsonl").read_bytes() == before


def test_a_finished_run_is_not_lengthened_in_silence(make_config):
    path = train(make_config()).path
    file = path / "config.toml"
    before = file.read_text()
    file.write_text(before.replace("steps = 12", "steps = 20"))
    with pytest.raises(RunError, match=r"its 12 steps.*asks for 20.*--model .*-00000012"):
        train(config_of(path), resume=path)
    file.write_text(before)
    assert train(config_of(path), resume=path).steps == 12


def test_a_run_without_its_events_is_not_continued(make_config):
    path = train(make_config(train={"checkpoint_every": 6})).path
    (path / "summary.json").unlink()
    events = (path / "events.jsonl").rename(path / "elsewhere")
    with pytest.raises(RunError, match=r"events.jsonl is gone or empty.*--model .*-00000006"):
        train(config_of(path), resume=path, from_step=6)
    assert not (path / "events.jsonl").exists() or not (path / "events.jsonl").read_bytes()
    events.rename(path / "events.jsonl")
    assert train(config_of(path), resume=path, from_step=6).steps == 12


def test_a_checkpoint_of_another_version_is_an_answer(make_config):
    path = train(make_config()).path
    file = path / "checkpoints/step-00000012/state.json"
    state = json.loads(file.read_text())
    del state["cursor"], state["faults"]
    file.write_text(json.dumps(state))
    with pytest.raises(RunError, match="step 12 says nothing of cursor, faults: another version"):
        train(config_of(path), resume=path, from_step=12)


def test_going_back_to_a_checkpoint_repeats_the_run(make_config):
    path = train(make_config(train={"keep": 3})).path
    before = weights(path, 12)
    train(config_of(path), resume=path, from_step=4)
    assert equal(weights(path, 12), before)
    assert [e["step"] for e in Run.open(path).events("step")] == list(range(1, 13))
    assert sorted(p.name for p in (path / "checkpoints/dropped").iterdir()) == [
        "step-00000008",
        "step-00000012",
    ]


def test_nothing_is_written_for_a_policy_that_does_not_fit(make_config):
    config = make_config(policy={"recipe": "no_such_recipe"})
    with pytest.raises(PolicyError, match="no_such_recipe"):
        train(config)
    assert not os.path.exists(config.run.out)


def test_an_existing_run_is_replaced_only_by_force(make_config):
    config = make_config(train={"steps": 1})
    train(config)
    with pytest.raises(RunError, match="not empty"):
        train(config)
    assert train(config, force=True).steps == 1


def test_activation_checkpointing_changes_memory_and_not_bits(make_config):
    policy = {"recipe": "nvfp4_all"}
    plain = train(make_config("plain", policy=policy))
    spared = train(make_config("spared", policy=policy, train={"activation_checkpointing": True}))
    assert equal(weights(plain.path, 12), weights(spared.path, 12))


def from_pretrained(path, step: int) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    folder = path / f"checkpoints/step-{step:08d}"
    return AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()


def open_data(config):
    from halfulp.data import open_data
    from halfulp.numerics.kernel import cache_directory

    return open_data(config.data.corpus(), cache_directory() / "data")
