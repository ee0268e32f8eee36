import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import halfulp
from halfulp.blocks import block_map
from halfulp.guard.flip_back import SAMPLE, FlipBack, codes_of
from halfulp.guard.numeric import Numeric
from halfulp.guard.probes import down_projections, probes
from halfulp.numerics.apply import apply_quantizer, scales
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.quantizer import parse_quantizer

V, T = 61, 24


def build(family="llama", attention="sdpa", **sizes):
    torch.manual_seed(0)
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.0} | sizes
        sizes |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "n_positions": 64}
    else:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64} | sizes
        sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        family, vocab_size=V, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes
    )
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).train()


@pytest.fixture
def batch():
    return torch.randint(0, V, (4, T), generator=torch.Generator().manual_seed(1))


def look(model, batch):
    """The readings of one pass by (rule, block)."""
    with probes(model, block_map(model)) as readings:
        assert readings == []
        model(input_ids=batch, use_cache=False)
        assert readings == []
    return {(r.rule, r.block): r for r in readings}


@pytest.mark.parametrize("recipe", ["fp32", "te_delayed", "nvfp4_all", "mx_ocp"])
@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gpt2", "sdpa")]
)
def test_a_pass_that_is_looked_at_gives_the_same_bits(family, attention, recipe, batch):
    def train(watched):
        model = build(family, attention)
        handle = halfulp.quantize(model, recipe)
        flips, found = FlipBack(), []
        for step in range(3):
            handle.set_step(step)
            if watched:
                with probes(model, block_map(model)) as readings, flips.look(model, step):
                    loss = model(input_ids=batch, labels=batch, use_cache=False).loss
                found += readings
            else:
                loss = model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            handle.end_step()
        gradients = [p.grad for p in model.parameters()]
        return loss.detach(), gradients, torch.get_rng_state(), found, flips.readings()

    loss, gradients, state, *_ = train(False)
    again, others, after, found, flips = train(True)
    assert torch.equal(loss, again)
    assert torch.equal(state, after)
    assert all(torch.equal(a, b) for a, b in zip(gradients, others, strict=True))
    assert len(found) >= 3 * 5
    assert all(r.value == 0 for r in flips)  # nothing has moved
    assert bool(flips) == (recipe != "fp32")


@pytest.mark.parametrize("recipe", ["fp32", "mx_ocp"])
def test_a_new_model_is_silent(recipe, batch):
    model, numeric = build(), Numeric()
    halfulp.quantize(model, recipe)
    for step in range(4):
        readings = look(model, batch).values()
        assert numeric.observe(step, readings) == []
    rules = {"swiglu", "attention_logits", "logz"}
    assert {r.rule for r in readings} == rules | (
        {"ln_clamp", "ln_bias"} if recipe != "fp32" else set()
    )


@pytest.mark.parametrize(
    ("recipe", "rule"),
    [("fp32", "swiglu"), ("te_current", "swiglu_scaled"), ("ao_rowwise", "swiglu_scaled"),
     ("mxfp8", "swiglu"), ("bf16_amp", "swiglu")],
)  # fmt: skip
def test_an_outlier_channel_is_measured_and_placed(recipe, rule, batch):
    model, seen = build(), []
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[5] *= 1000
    halfulp.quantize(model, recipe)
    down = model.model.layers[1].mlp.down_proj
    down.register_forward_hook(lambda m, args, y: seen.append(args[0].detach().clone()))
    found = look(model, batch)
    channels = seen[0].reshape(-1, 64).abs().amax(0).double()
    expected = channels.max() / channels.sort().values[31]  # the lower median of 64
    outlier = found[rule, "layers.1.ffn"]
    assert outlier.value == pytest.approx(expected.item(), rel=1e-5)
    assert 200 < outlier.value < 5000
    assert channels.argmax() == 5
    assert outlier.place == "model.layers.1.mlp.down_proj"
    assert 1 < found[rule, "layers.0.ffn"].value < 20


def test_channels_that_are_off_do_not_count(batch):
    model = build()
    before = look(model, batch)["swiglu", "layers.0.ffn"].value
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:40] = 0
    assert 1 < look(model, batch)["swiglu", "layers.0.ffn"].value < 2 * before


def scores_of(model, batch, name):
    """The largest causal score of sequence 0 per layer, from an attention function of our own."""
    found = []

    @torch.no_grad()
    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        best = -math.inf
        for h in range(query.shape[1]):
            q, k = query[0, h].double(), key[0, h // groups].double()
            best = max(best, *(float(q[i] @ k[j]) for i in range(T) for j in range(i + 1)))
        found.append(best * (scaling or query.shape[-1] ** -0.5))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, mask, scaling=scaling, **kwargs
        )

    ALL_ATTENTION_FUNCTIONS[name] = attend
    before, model.config._attn_implementation = model.config._attn_implementation, name
    try:
        model(input_ids=batch, use_cache=False)
    finally:
        del ALL_ATTENTION_FUNCTIONS[name]
        model.config._attn_implementation = before
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager", "halfulp"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_largest_attention_logit(family, attention, batch):
    model = build(family, "sdpa" if attention == "halfulp" else attention)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "q_proj" in name or "c_attn" in name:
                p *= 30
    expected = scores_of(model, batch, "oracle")
    if attention == "halfulp":
        halfulp.quantize(model, "bf16_amp")
        assert model.config._attn_implementation == "halfulp_sdpa"
    found = look(model, batch)
    for layer, value in enumerate(expected):
        reading = found["attention_logits", f"layers.{layer}.attn"]
        rel = 0.05 if attention == "halfulp" else 1e-4  # bf16 linears before the scores
        assert reading.value == pytest.approx(value, rel=rel)
        assert reading.value > 1
        assert reading.place.endswith(
            f"{layer}.self_attn" if family == "llama" else f"{layer}.attn"
        )


def test_the_attention_interface_is_put_back(batch):
    before = dict(ALL_ATTENTION_FUNCTIONS)
    for attention in ("sdpa", "eager"):
        model = build(attention=attention)
        look(model, batch)
        assert dict(ALL_ATTENTION_FUNCTIONS) == before
        with pytest.raises(RuntimeError, match="stop"), probes(model, block_map(model)):
            raise RuntimeError("stop")
        assert dict(ALL_ATTENTION_FUNCTIONS) == before
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_another_model_inside_is_not_looked_at(batch):
    model, other = build(), build()
    with probes(model, block_map(model)) as readings:
        other(input_ids=batch, use_cache=False)
    assert readings == []


def test_log_z(batch):
    model = build()
    with torch.no_grad():
        model.lm_head.weight *= 100
    logits = model(input_ids=batch, use_cache=False).logits[0].double()
    expected = abs(logits.exp().sum(-1).log().mean().item()) - math.log(V)
    reading = look(model, batch)["logz", "head"]
    assert reading.value == pytest.approx(expected, rel=1e-4)
    assert reading.value > 5
    assert Numeric().observe(1, [reading])[0].level == "warn"


@pytest.fixture
def rounded_up(tmp_path):
    path = tmp_path / "up.toml"
    path.write_text(
        '[recipes.up]\nextends = "mxfp8"\nnorm = "e4m3@1x32:e8m0_up"\n'
        '[[rule]]\nmatch = "*"\nrecipe = "up"\n'
    )
    return path


@pytest.mark.parametrize(
    ("gain", "scale", "clamped", "bias"),
    [
        (0.97, "floor", (0.9, 1.0), (0.08, 0.12)),
        (0.97, "up", (0.0, 0.0), (0.0, 0.01)),
        (1.05, "floor", (0.0, 0.0), (0.03, 0.06)),  # both round to 1: the grid's step is 1/8
        (1.05, "up", (0.0, 0.0), (0.03, 0.06)),
    ],
)
def test_clustered_gains_of_a_norm(gain, scale, clamped, bias, rounded_up, batch):
    model, place = build(), "model.layers.0.input_layernorm"
    noise = 0.01 * torch.randn(32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        model.get_submodule(place).weight.copy_(gain + noise)
    halfulp.quantize(model, rounded_up if scale == "up" else "mx_ocp")
    with probes(model, block_map(model)) as readings:
        model(input_ids=batch, use_cache=False)
    norms = [r for r in readings if r.rule.startswith("ln_")]
    found = {r.rule: r.value for r in norms if r.place == place}
    assert clamped[0] <= found["ln_clamp"] <= clamped[1]
    assert bias[0] <= found["ln_bias"] <= bias[1]
    others = [r.value for r in norms if r.place != place]
    assert len(others) == 2 * 4
    assert set(others) == {0.0}  # gains of 1


def names(model):
    return [gemm.module.rpartition(".")[2] for gemm in down_projections(model, block_map(model))]


def test_down_projections_lead_back_to_the_width_of_the_model():
    assert names(build()) == ["down_proj"] * 2
    assert names(build(intermediate_size=32)) == ["down_proj"] * 2  # no width tells them apart
    assert names(build("gpt2")) == ["c_proj"] * 2


def flip_back(model, changes):
    """The readings after each step; `changes` are applied to the weights before it."""
    flips, found = FlipBack(), []
    for step, change in enumerate(changes):
        with torch.no_grad():
            change(model)
        with flips.look(model, step):
            model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        found.append({r.block: r.value for r in flips.readings()})
    return found


@pytest.mark.parametrize("recipe", ["te_current", "mxfp8", "nvfp4_all", "int8_mixed"])
def test_the_share_of_codes_that_leave_and_come_back(recipe, batch):
    def run(*changes):
        model = build()
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[:, ::8] = 0.1  # every group keeps its amax
            w = model.model.layers[0].mlp.up_proj.weight
            w[:, 1:8] = 0.025
        halfulp.quantize(model, recipe)
        return flip_back(model, changes)

    def move(factor):
        def change(model):
            model.model.layers[0].mlp.up_proj.weight[:16, 1:3] *= factor

        return change

    stay, away, back = (lambda model: None), move(3.0), move(1 / 3.0)
    share = 16 * 2 / (64 * 32)
    assert run(stay, away, back)[:2] == [{}, {}]
    block = "layers.0.ffn"
    assert run(stay, away, back)[2][block] == pytest.approx(share)
    assert run(stay, away, stay)[2][block] == 0
    assert run(stay, stay, away)[2][block] == 0
    four = run(stay, away, back, away)
    assert four[3][block] == pytest.approx(share)  # of the last three
    assert set(four[3].values()) == {share, 0.0}


def test_finer_and_random_grids_are_not_sampled():
    stay = lambda model: None  # noqa: E731
    for recipe in ("bf16_amp", "fp32"):
        model = build()
        halfulp.quantize(model, recipe)
        assert flip_back(model, [stay] * 3) == [{}, {}, {}]


def test_a_gap_between_looks_starts_anew():
    model, flips = build(), FlipBack()
    halfulp.quantize(model, "te_current")
    for step in (0, 1, 3, 4):
        with flips.look(model, step):
            model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
        assert flips.readings() == []
    copy = FlipBack()
    copy.load_state_dict(flips.state_dict())
    with copy.look(model, 5):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), use_cache=False)
    assert {r.block for r in copy.readings()} >= {"layers.0.qk", "layers.1.ffn"}
    assert all(r.value == 0 for r in copy.readings())


@pytest.mark.parametrize(
    "text",
    ["e4m3", "e4m3@tensor:current", "e4m3@tensor:current:p2", "e4m3@tensor:static(4)",
     "e4m3@row:current", "int8@row:current", "e4m3@1x32:e8m0_up", "e4m3@1x128:current",
     "e2m1@1x16:nvfp4", "e2m1@16x16:nvfp4", "e4m3@128x128:current:p2",
     "e4m3@1x32:e8m0_up:hadamard(32)"],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(200, 160), (12, 32), (40, 5000)])
def test_codes_are_those_of_the_quantized_weight(text, shape):
    q = parse_quantizer(text)
    if q.hadamard and shape[1] % q.hadamard:
        return
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    y = apply_quantizer(w, q)
    s = (
        torch.ones(())
        if q.scale == "none"
        else scales(hadamard(w, q.hadamard) if q.hadamard else w, q)[0]
    )
    codes = codes_of(w, q)
    rows, columns = (q.tile[0] or 1), (q.tile[1] or (1 if q.tile[0] == 0 else shape[1]))
    wide = min(shape[1], columns * max(1, SAMPLE // (rows * columns)))
    expected = (y * s).expand(shape)[:, :wide].flatten()[: codes.numel()]
    assert 0 < codes.numel() <= SAMPLE
    assert codes.unique().numel() > 8
    torch.testing.assert_close(codes, expected, rtol=1e-5, atol=1e-6)
