import copy
import math
import warnings

import pytest
import torch
from torch import nn

import halfulp
from halfulp.errors import ConfigError, PolicyError
from halfulp.sharpness.ratios import Ratios

BASE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}
HEADS = BASE | {"head_dim": 8}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
MOE = HEADS | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
EXPERTS = {
    "model.layers.*.mlp.experts.gate_up_proj": "ffn:fp32",
    "model.layers.*.mlp.experts.down_proj": "ffn:fp32",
    "model.layers.*.mlp.gate.weight": "router:fp32",
}

# architecture: config, number of parameters by type under the paper's ratios, hints
ARCHITECTURES = {
    "llama": (BASE, {"emb": 1, "qk": 4, "vo": 4, "ffn": 6, "norm": 5, "head": 1}, None),
    "llama, tied": (
        BASE | {"tie_word_embeddings": True},
        {"emb": 1, "qk": 4, "vo": 4, "ffn": 6, "norm": 5},
        None,
    ),
    "gpt2": (
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32},
        {"emb": 1, "pos": 1, "norm": 5, "bias": 13, "qk+vo": 2, "vo": 2, "ffn": 4},
        None,
    ),
    "qwen2": (BASE, {"emb": 1, "qk": 4, "vo": 4, "ffn": 6, "norm": 5, "head": 1, "bias": 6}, None),
    "qwen3": (
        HEADS,
        {"emb": 1, "qk": 4, "vo": 4, "ffn": 6, "norm": 5, "head": 1, "qk_norm": 4},
        None,
    ),
    "gemma2": (HEADS, {"emb": 1, "qk": 4, "vo": 4, "ffn": 6, "norm": 9}, None),
    "gpt_neox": (
        BASE,
        {"emb": 1, "qk+vo": 2, "vo": 2, "ffn": 4, "norm": 5, "bias": 13, "head": 1},
        None,
    ),
    "falcon": (SMALL, {"emb": 1, "qk+vo": 2, "vo": 2, "ffn": 4, "norm": 3, "bias": 3}, None),
    "phi3": (
        BASE | {"pad_token_id": 0},
        {"emb": 1, "qk+vo": 2, "vo": 2, "ffn": 4, "norm": 5, "head": 1},
        None,
    ),
    "opt": (
        SMALL | {"ffn_dim": 64, "max_position_embeddings": 32},
        {"emb": 1, "pos": 1, "qk": 4, "vo": 4, "ffn": 4, "norm": 5, "bias": 17},
        None,
    ),
    "qwen3_moe": (
        MOE,
        {
            "emb": 1, "qk": 4, "vo": 4, "ffn": 4, "norm": 5, "head": 1, "qk_norm": 4, "router": 2,
        },
        EXPERTS,
    ),
}  # fmt: skip
PAPER = {"emb": 10, "pos": 10, "head": 10, "qk": 8, "ffn": 6, "vo": 4, "qk+vo": 4}  # others 1


def build(name: str) -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    config, _, _ = ARCHITECTURES[name]
    tied = {"tie_word_embeddings": name in ("llama, tied", "gpt2", "gemma2", "falcon", "opt")}
    hf = AutoConfig.for_model(
        name.partition(",")[0], **tied | config, bos_token_id=None, eos_token_id=None
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(hf).eval()  # no dropout


def some_steps(model: nn.Module, *steppers, count: int = 2) -> None:
    for i in range(count):
        ids = torch.arange(16).reshape(2, 8) + i
        logits = model(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        for stepper in steppers:
            stepper.step()
        model.zero_grad()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_parameter_is_in_one_group_at_the_rate_of_its_type(name):
    _, counts, hints = ARCHITECTURES[name]
    model = build(name)
    groups = halfulp.blockwise_param_groups(model, 1e-3, "paper", hints=hints)
    placed = [(n, p) for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)]
    named = dict(model.named_parameters())  # tied parameters once
    assert sorted(n for n, _ in placed) == sorted(named)
    assert all(p is named[n] for n, p in placed)
    assert len({g["name"] for g in groups}) == len(groups)
    found: dict[str, int] = {}
    for group in groups:
        kind = group["block"]
        found[kind] = found.get(kind, 0) + len(group["params"])
        assert group["lr_ratio"] == PAPER.get(kind, 1)
        assert group["lr"] == 1e-3 * group["lr_ratio"]
        assert {p.ndim >= 2 for p in group["params"]} == {group["weight_decay"] == 0.1}
    assert found == counts


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, halfulp.AdamW, torch.optim.NAdam])
@pytest.mark.parametrize("name", ["llama, tied", "gpt2"])
def test_an_optimizer_and_its_schedule_go_on_from_their_state(name, optimizer):
    whole, half = build(name), build(name)

    def make(model):
        opt = optimizer(halfulp.blockwise_param_groups(model, 1e-3))
        return opt, halfulp.BlockwiseSchedule(opt, 40, 2)

    some_steps(whole, *make(whole), count=4)
    opt, schedule = make(half)
    some_steps(half, opt, schedule)
    saved = copy.deepcopy((opt.state_dict(), schedule.state_dict()))
    opt, schedule = make(half)
    opt.load_state_dict(saved[0])
    schedule.load_state_dict(saved[1])
    assert [g["lr"] for g in opt.param_groups] == schedule.get_last_lr()
    for i in (2, 3):
        ids = torch.arange(16).reshape(2, 8) + i
        logits = half(input_ids=ids, use_cache=False).logits
        nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
        opt.step()
        schedule.step()
        half.zero_grad()
    for p, q in zip(whole.parameters(), half.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_block_moves_by_its_ratio():
    """Adam's first step is lr per entry, of whatever size its gradient: the ratios, measured."""
    model = build("llama")
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    groups = halfulp.blockwise_param_groups(model, 1e-3, "emb=5,qk=4,ffn=3,vo=2", weight_decay=0.0)
    some_steps(model, halfulp.AdamW(groups, betas=(0.9, 0.95), eps=1e-30), count=1)
    for group in groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            moved = (p.detach() - before[name]).abs().max().item()
            assert moved == pytest.approx(1e-3 * group["lr_ratio"], rel=1e-3), name


def test_frozen_parameters_are_in_no_group():
    model = build("llama")
    model.model.layers[0].mlp.requires_grad_(False)
    groups = halfulp.blockwise_param_groups(model, 1e-3)
    names = {n for g in groups for n in g["param_names"]}
    assert len(names) == len(list(model.parameters())) - 3
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ConfigError, match="emb, whose parameters are all frozen"):
        halfulp.blockwise_param_groups(model, 1e-3)
    model.requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter is trainable"):
        halfulp.blockwise_param_groups(model, 1e-3)


def test_all_can_decay_as_in_the_official_code():
    groups = halfulp.blockwise_param_groups(build("gpt2"), 1e-3, decay_norm=True, weight_decay=0.3)
    assert {g["weight_decay"] for g in groups} == {0.3}
    assert len({g["name"] for g in groups}) == len(groups) == 7


def test_a_wrapped_model_gives_the_groups_of_the_model_inside():
    model = build("llama")
    compiled = torch.compile(model, backend="eager")
    groups = halfulp.blockwise_param_groups(compiled, 1e-3)
    plain = halfulp.blockwise_param_groups(model, 1e-3)
    assert [g["param_names"] for g in groups] == [g["param_names"] for g in plain]


def test_a_measurement_decides_the_groups_of_its_model():
    model = build("llama")
    report = halfulp.sharpness(model, torch.arange(32).reshape(2, 16), draws=4)
    groups = halfulp.blockwise_param_groups(model, 1e-3, report)
    ratios = {g["block"]: g["lr_ratio"] for g in groups}
    assert all(1 <= r <= 10 for r in ratios.values())
    assert max(ratios.values()) > 2 * min(ratios.values())
    same = Ratios(ratios, "measured")
    again = halfulp.blockwise_param_groups(model, 1e-3, same)
    assert {g["block"]: g["lr_ratio"] for g in again} == ratios


def test_rates_that_cannot_be_used():
    model = build("llama")
    for lr in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="cannot be used"):
            halfulp.blockwise_param_groups(model, lr)
    with pytest.raises(ConfigError, match="cannot be used"):
        halfulp.blockwise_param_groups(model, 1e-3, weight_decay=-1.0)


def test_a_model_whose_blocks_cannot_be_mapped_asks_for_a_hint():
    with pytest.raises(PolicyError, match="hints="):
        halfulp.blockwise_param_groups(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 1e-3)


@pytest.mark.slow
def test_an_eight_bit_adamw_learns_at_the_rates_of_the_blocks():
    """torchao's AdamW8bit keeps rates as fp32 tensors and compiles its step: a minute."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optim = pytest.importorskip("torchao.optim", exc_type=ImportError)
        model = build("llama")
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        groups = halfulp.blockwise_param_groups(model, 1e-3, weight_decay=0.0)
        opt = optim.AdamW8bit(groups, eps=1e-30, block_size=256)
        schedule = halfulp.BlockwiseSchedule(opt, 100, 4)
        some_steps(model, opt, schedule, count=2)  # the first rate is 0
        rates = [float(g["lr"]) for g in opt.param_groups]
    assert rates == pytest.approx([2 * 1e-3 / 4] * len(groups), rel=1e-6)
    for group in opt.param_groups:
        for name, p in zip(group["param_names"], group["params"], strict=True):
            moved = (p.detach() - before[name]).abs().max().item()
            assert 0.5 * 1e-3 / 4 < moved < 2 * 1e-3 / 4, name


def test_the_trainer_of_transformers_keeps_groups_and_schedule(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("accelerate", exc_type=ImportError)
        from transformers import Trainer, TrainingArguments

        model = build("llama")
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 64
        opt = torch.optim.AdamW(halfulp.blockwise_param_groups(model, 1e-3))
        schedule = halfulp.BlockwiseSchedule(opt, 8, 1, stretch_warmup=False)
        arguments = TrainingArguments(
            str(tmp_path), max_steps=4, per_device_train_batch_size=2, report_to=[],
            save_strategy="no", disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        Trainer(model, arguments, train_dataset=rows, optimizers=(opt, schedule)).train()
    lrs = {g["block"]: g["lr"] for g in opt.param_groups}
    share = 0.5 * (1 + math.cos(math.pi * 3 / 7))
    for kind, ratio in {"emb": 10, "qk": 8, "vo": 4, "ffn": 6, "norm": 1, "head": 10}.items():
        assert lrs[kind] == pytest.approx(5e-5 + share * (1e-3 * ratio - 5e-5), rel=1e-9), kind
