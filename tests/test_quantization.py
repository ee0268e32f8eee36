"""The quantized GEMMs compute what their policy says: not less, not more, and reversibly."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import halfulp
from halfulp.errors import ConfigError, FormatError, PolicyError
from halfulp.policy import Policy
from halfulp.quantization import quantize, unquantize
from halfulp.quantized_modules import QuantizedLinear

GEMMS = {
    "fprop": ("fprop_x", "fprop_w"),
    "dgrad": ("dgrad_g", "dgrad_w"),
    "wgrad": ("wgrad_g", "wgrad_x"),
}


def policy(**linear: str) -> Policy:
    """fp32 but for the operands of the linears named here."""
    recipe = {"extends": "fp32", "linear": linear}
    return Policy.from_table(
        {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
    )


def both(gemm: str, quantizer: str) -> Policy:
    return policy(**dict.fromkeys(GEMMS[gemm], quantizer))


def everywhere(quantizer: str) -> Policy:
    return policy(**{operand: quantizer for pair in GEMMS.values() for operand in pair})


class Linear(nn.Module):
    """One linear that the block map places in ffn."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.ffn = nn.Linear(256, 256, bias=bias)
        with torch.no_grad():
            self.ffn.weight.copy_(torch.randn(256, 256, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.ffn(x)


HINTS = {"ffn*": "ffn"}


def products(model: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """y, dx and dw of the linear on fixed Gaussian data."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(128, 256, generator=generator).to(dtype).requires_grad_()
    g = torch.randn(128, 256, generator=generator).to(dtype)
    y = model(x)
    y.backward(g)
    dw = model.ffn.weight.grad.clone()
    model.zero_grad()
    return {"fprop": y.detach(), "dgrad": x.grad, "wgrad": dw}


@pytest.fixture(scope="module")
def exact() -> dict[str, torch.Tensor]:
    return products(Linear().double(), torch.float64)


def error(measured: torch.Tensor, exact: torch.Tensor) -> float:
    return ((measured.double() - exact).norm() / exact.norm()).item()


# Two-sided: at or below the lower bound nothing was quantized, above the upper one it is wrong.
EXPECTED = {
    "tf32": (2e-4, 4e-4),
    "bf16": (1.5e-3, 3e-3),
    "fp16": (2e-4, 4e-4),
    "bf16:stochastic": (2.5e-3, 5e-3),
    "bf16:truncate": (3e-3, 7e-3),
    "int8@row:current": (5e-3, 1.2e-2),
    "e4m3@tensor:current": (3e-2, 4.5e-2),
    "e4m3@row:current": (3e-2, 4.5e-2),
    "e5m2@tensor:current": (6e-2, 9e-2),
    "e4m3@1x32:e8m0_up": (3e-2, 4.5e-2),
    "e4m3@1x32:e8m0_floor": (3e-2, 5.5e-2),
    "e4m3@128x128:current": (3e-2, 4.5e-2),
    "e4m3@tensor:current:stochastic": (5e-2, 8e-2),
    "e2m1@1x16:nvfp4": (0.10, 0.16),
    "e2m1@1x16:nvfp4:hadamard(16)": (0.10, 0.16),
    "int4@1x32:current": (0.08, 0.16),
}


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("quantizer", EXPECTED)
def test_each_gemm_has_the_error_of_its_format_and_only_it(
    gemm: str, quantizer: str, exact: dict[str, torch.Tensor]
) -> None:
    model = Linear()
    quantize(model, both(gemm, quantizer), hints=HINTS)
    measured = products(model)
    low, high = EXPECTED[quantizer]
    for name, value in measured.items():
        found = error(value, exact[name])
        assert (low < found < high) if name == gemm else found < 1e-6, name


@pytest.mark.parametrize("rows", ["split", "promote(64)", "fast"])
def test_short_accumulators_cost_about_their_thirteen_bits(
    rows: str, exact: dict[str, torch.Tensor]
) -> None:
    model = Linear()
    quantize(model, policy(fprop_accumulate=rows), hints=HINTS)
    found = error(products(model)["fprop"], exact["fprop"])
    assert 1e-5 < found < (1e-3 if rows == "fast" else 3e-4)


@pytest.mark.parametrize(
    ("quantizer", "out"),
    [
        ("int8@row:current", "fp32"),
        ("int4@tensor:current", "fp32"),
        ("int8@tensor:current:stochastic", "fp32"),
        ("e4m3@tensor:current:p2", "bf16"),
        ("e4m3@1x32:e8m0_up", "bf16"),
        ("e5m2", "bf16"),
    ],
)
def test_the_exact_carrier_computes_the_same(quantizer: str, out: str) -> None:
    rules = {operand: quantizer for pair in GEMMS.values() for operand in pair}
    rules |= {f"{gemm}_out": out for gemm in GEMMS}
    results = {}
    for carrier in ("fp32", "exact"):
        model = Linear()
        handle = quantize(model, policy(**rules), hints=HINTS, carrier=carrier)
        results[carrier] = products(model)
        (site,) = handle.sites.values()
        assert (site.gemms["fprop"][0] == "fp32") == (carrier == "fp32")
    for name in GEMMS:
        # The order of an fp32 sum differs; with a bf16 result a last bit may flip where it ties.
        allowed = 1e-6 if out == "fp32" else 2e-4
        assert error(results["exact"][name], results["fp32"][name].double()) < allowed


def test_a_bias_is_added_before_the_result_is_rounded() -> None:
    model = Linear(bias=True)
    quantize(model, policy(fprop_out="bf16"), hints=HINTS)
    x = torch.randn(8, 256, generator=torch.Generator().manual_seed(3))
    y = model(x)
    assert torch.equal(y, (x @ model.ffn.weight.T + model.ffn.bias).bfloat16().float())
    y.sum().backward()
    assert torch.allclose(model.ffn.bias.grad, torch.full((256,), 8.0))


def test_low_precision_modules_keep_their_dtype_and_autocast_does_not_leak_in() -> None:
    model = Linear().bfloat16()
    quantize(model, everywhere("e4m3@tensor:current"), hints=HINTS)
    x = torch.randn(16, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    plain = model(x)
    assert plain.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(x), plain)


def tiny_llama(layers: int = 2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def tiny_gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def tokens() -> torch.Tensor:
    return torch.randint(0, 97, (2, 32), generator=torch.Generator().manual_seed(5))


def loss_and_gradient(model: nn.Module) -> tuple[float, torch.Tensor]:
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), gradient


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("recipe", ["bf16_amp", "te_current", "mxfp8", "nvfp4_all", "mx_ocp"])
def test_undo_leaves_no_trace(make, recipe: str) -> None:
    model = make()
    before = loss_and_gradient(model)
    names, classes = list(model.state_dict()), [type(m) for m in model.modules()]
    quantize(model, recipe)
    assert list(model.state_dict()) == names
    changed = loss_and_gradient(model)
    assert changed[0] != before[0]
    unquantize(model)
    assert [type(m) for m in model.modules()] == classes
    after = loss_and_gradient(model)
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_off_is_the_model_itself(make) -> None:
    model = make()
    plain = loss_and_gradient(model)
    handle = quantize(model, everywhere("e4m3@tensor:current"))
    with handle.off():
        loss, gradient = loss_and_gradient(model)
    assert loss == plain[0]
    assert torch.equal(gradient, plain[1])
    assert loss_and_gradient(model)[0] != plain[0]


def test_quantized_attention_without_rounding_is_attention() -> None:
    """QK and PV routed through our attention agree with the model's own to fp32 accuracy."""
    for make in (tiny_llama, tiny_gpt2):
        model = make()
        loss, gradient = loss_and_gradient(model)
        tiny = dict.fromkeys(("fprop_x", "fprop_w"), "e8m22")
        recipe = {"extends": "fp32", "attn_qk": tiny, "attn_pv": tiny}
        table = {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
        handle = quantize(model, Policy.from_table(table))
        assert len(handle.sites) == 4
        ours = loss_and_gradient(model)
        assert ours[0] == pytest.approx(loss, rel=1e-5)
        assert torch.allclose(ours[1], gradient, atol=1e-5)
        unquantize(model)


def test_every_attention_of_an_encoder_decoder_is_rounded() -> None:
    """Encoder and decoder have configs of their own; T5 adds a bias for each position."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    plain = loss_and_gradient(model)
    for quantizer, low, high in (("e8m22", 0, 1e-6), ("e4m3@tensor:current", 1e-3, 1e-1)):
        attention = {"operands": quantizer}
        recipe = {"extends": "fp32", "attn_qk": attention, "attn_pv": attention}
        table = {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
        handle = quantize(model, Policy.from_table(table))
        assert len(handle.sites) == 6
        rounded = loss_and_gradient(model)
        assert all(site.used for site in handle.sites.values())
        assert low < error(rounded[1], plain[1].double()) < high
        unquantize(model)
    assert model.encoder.config._attn_implementation == "sdpa"
    assert torch.equal(loss_and_gradient(model)[1], plain[1])


def test_models_that_share_a_config_are_quantized_each_for_itself() -> None:
    first = tiny_llama()
    second = LlamaForCausalLM(first.config)
    plain = loss_and_gradient(second)[0]
    for model in (first, second):
        quantize(model, "mx_ocp")
    rounded = loss_and_gradient(second)[0]
    unquantize(first)
    assert loss_and_gradient(second)[0] == rounded
    second.set_attn_implementation("eager")
    assert loss_and_gradient(second)[0] == rounded
    second.set_attn_implementation("sdpa")
    unquantize(second)
    assert loss_and_gradient(second)[0] == plain


class Bypassing(nn.Module):
    """Hands the weight of a linear to a function, as fused kernels do; experts may be idle."""

    def __init__(self) -> None:
        super().__init__()
        mlp = {"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8), "up_proj": nn.Linear(8, 8)}
        self.layers = nn.ModuleList([nn.ModuleDict(mlp)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mlp = self.layers[0]
        return nn.functional.linear(mlp["fc1"](x), mlp["fc2"].weight)


def test_a_gemm_that_goes_past_its_module_is_an_error_with_its_cure() -> None:
    model, x = Bypassing(), torch.randn(4, 8)
    quantize(model, everywhere("e4m3@tensor:current"))
    with pytest.raises(PolicyError, match=r"layers\.\*\.ffn\.fc2, but Bypassing") as raised:
        model(x)
    assert "fc1" not in str(raised.value)
    assert "up_proj" not in str(raised.value)
    unquantize(model)
    hints = {"layers.*.fc2": "ffn:fp32"}
    assert str(hints) in str(raised.value)
    quantize(model, everywhere("e4m3@tensor:current"), hints=hints)
    model(x).sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_parts_do_not_look_as_if_they_went_past_the_sites() -> None:
    torch._dynamo.reset()
    policy, x = everywhere("e4m3@tensor:current"), torch.randn(4, 256)
    plain, layer, function = Linear(), Linear(), Linear()
    layer.ffn.compile(backend="eager")
    function.forward = torch.compile(function.forward, backend="aot_eager")
    for model in (plain, layer, function):
        handle = quantize(model, policy, hints=HINTS)
        assert torch.equal(model(x), plain(x))
        assert all(site.used == (model is plain) for site in handle.sites.values())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torch_encoder_layers_stay_quantized_in_inference() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    hints = {"*.in_proj_weight": "qk+vo:fp32", "*.out_proj.weight": "vo:fp32"}
    x = torch.randn(2, 8, 32)
    with torch.no_grad():
        plain = model(x)
        quantize(model, everywhere("e4m3@tensor:current"), hints=hints)
        assert 3e-3 < error(model(x), plain.double()) < 5e-2
        unquantize(model)
        assert torch.equal(model(x), plain)


def test_embedding_and_norm_are_rounded_when_the_recipe_says_so() -> None:
    model = tiny_llama()
    recipe = {"extends": "fp32", "embed": "e2m1@1x16:current", "norm": "e4m3@1x32:e8m0_floor"}
    table = {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
    quantize(model, Policy.from_table(table))
    table_used, table_kept = model.model.embed_tokens.weight, dict(model.named_parameters())
    assert 0.05 < error(table_used, table_kept["model.embed_tokens.weight"].double()) < 0.2
    _, gradient = loss_and_gradient(model)
    assert gradient.norm() > 0
    unquantize(model)
    assert model.model.embed_tokens.weight is table_kept["model.embed_tokens.weight"]


class Gain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, 256))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


def test_a_norm_is_rounded_whatever_its_parameters_are_called() -> None:
    model = Linear()
    model.norm = Gain()
    recipe = {"extends": "fp32", "norm": "e4m3"}
    table = {"recipes": {"own": recipe}, "rule": [{"match": "*", "recipe": "own"}]}
    quantize(model, Policy.from_table(table), hints=HINTS)
    gain = model.norm._parameters["gamma"]
    assert 0.01 < error(model.norm(torch.ones(256)), gain.double()) < 0.04
    unquantize(model)
    assert model.norm.gamma is gain


STOCHASTIC = "e5m2@tensor:current:stochastic"


def test_the_random_bits_follow_seed_step_micro_and_nothing_else() -> None:
    def run(seed: int, step: int, micro: int) -> torch.Tensor:
        model = tiny_llama()
        handle = quantize(model, both("dgrad", STOCHASTIC), seed=seed)
        handle.set_step(step, micro)
        return loss_and_gradient(model)[1]

    first = run(0, 1, 0)
    assert torch.equal(first, run(0, 1, 0))
    for other in ((1, 1, 0), (0, 2, 0), (0, 1, 1)):
        assert not torch.equal(first, run(*other)), other


def test_without_set_step_every_training_forward_is_a_step() -> None:
    model = tiny_llama()
    handle = quantize(model, both("fprop", STOCHASTIC))
    losses = [loss_and_gradient(model)[0] for _ in range(2)]
    assert losses[0] != losses[1]
    assert handle.clock.step == 2
    model.eval()
    with torch.no_grad():
        assert len({model(input_ids=tokens(), labels=tokens()).loss.item() for _ in range(2)}) == 1


def test_threads_do_not_change_a_bit() -> None:
    def run(threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x = torch.randn(600, 512, generator=torch.Generator().manual_seed(0))
            key = halfulp.Key.of(0, "x")
            return torch.stack(
                [
                    halfulp.apply_quantizer(x, halfulp.parse_quantizer(q), key=key)
                    for q in (STOCHASTIC, "e2m1@1x16:nvfp4:stochastic", "e4m3@128x128:stochastic")
                ]
            )
        finally:
            torch.set_num_threads(before)

    assert torch.equal(run(1), run(2))


def test_activation_checkpointing_recomputes_the_same_rounding() -> None:
    plain, recomputed = tiny_llama(), tiny_llama()
    for model in (plain, recomputed):
        quantize(model, everywhere(STOCHASTIC))
    for layer in recomputed.model.layers:
        forward = layer.forward
        layer.forward = lambda *a, _f=forward, **k: checkpoint(_f, *a, use_reentrant=False, **k)
    expected, found = loss_and_gradient(plain), loss_and_gradient(recomputed)
    assert found[0] == expected[0]
    assert torch.equal(found[1], expected[1])


def test_checkpointed_passes_of_one_loss_are_of_one_time() -> None:
    """Repeated after the next pass a pass would draw anew; at one time it draws what it drew."""
    gradients = []
    for repeated in (False, True):
        model = tiny_llama(layers=1)
        handle = quantize(model, everywhere(STOCHASTIC))
        if repeated:
            layer, forward = model.model.layers[0], model.model.layers[0].forward
            layer.forward = lambda *a, _f=forward, **k: checkpoint(_f, *a, use_reentrant=False, **k)
        batches = tokens(), tokens().flip(0)

        def loss(model=model, batches=batches) -> torch.Tensor:
            return sum(model(input_ids=b, labels=b).loss for b in batches)

        if repeated:
            with pytest.raises(ConfigError, match=r"pass of step, micro-batch \(1, 0\) after"):
                loss().backward()
            model.zero_grad()
            for batch in batches:  # one after the other
                model(input_ids=batch, labels=batch).loss.backward()
            model.zero_grad()
        handle.set_step(7)
        loss().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


def test_delayed_scales_follow_the_amax_of_the_steps_before() -> None:
    model = Linear()
    delayed = "e4m3@tensor:delayed(2)"
    handle = quantize(model, both("fprop", delayed), hints=HINTS)
    history = next(iter(handle.sites.values())).histories["fprop_x"]
    scales = []
    for step, size in enumerate((1.0, 4.0, 2.0, 1.0), 1):
        handle.set_step(step)
        model(torch.full((1, 256), size))
        handle.end_step()
        scales.append(history.scale.item())
    assert scales == [448.0, 112.0, 112.0, 224.0]
    saved = handle.state_dict()
    fresh = Linear()
    other = quantize(fresh, both("fprop", delayed), hints=HINTS)
    other.load_state_dict(saved)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(fresh.eval()(x), model.eval()(x))
    with pytest.raises(PolicyError, match="do not fit this policy"):
        other.load_state_dict({})


def test_counters_name_what_happened_where() -> None:
    model = Linear()
    quantizers = {"fprop_x": "e4m3", "wgrad_g": "e5m2", "fprop_w": "e4m3@tensor:delayed(4)"}
    handle = quantize(model, policy(**quantizers), hints=HINTS)
    handle.set_step(1)
    handle.count(True)
    x = torch.full((64, 256), 1e-4)
    x[0, :128] = 1e4
    (model(x) * 1e-6).sum().backward()
    handle.end_step()
    rows = {row["operand"]: row for row in handle.counters()}
    assert rows["fprop.x"]["saturated"] == pytest.approx(128 / x.numel())
    assert rows["fprop.x"]["underflow"] == pytest.approx(1 - 128 / x.numel())
    assert rows["fprop.x"]["underflow_energy"] < 1e-9
    assert rows["wgrad.g"]["underflow"] == 1.0
    assert rows["wgrad.g"]["amax"] == pytest.approx(1e-6)
    assert rows["fprop.w"]["stale"] == pytest.approx(rows["fprop.w"]["amax"] / 448)
    assert rows["fprop.x"]["block"] == "layers.0.ffn"
    handle.count(False)
    model(x)
    assert handle.counters() == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it traces
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "recipe", ["te_current", "fp4_all", pytest.param("te_delayed", marks=pytest.mark.slow)]
)
def test_a_traced_graph_computes_the_same(recipe: str) -> None:
    """Eager and traced agree in the loss to the bit; gradients up to the order of fp32 sums."""
    torch._dynamo.reset()
    results = []
    for traced in (False, True):
        model = tiny_llama(layers=1)
        handle = quantize(model, recipe, seed=3)
        run = torch.compile(model, backend="aot_eager") if traced else model
        values = []
        for step in (1, 2):
            handle.set_step(step)
            loss = run(input_ids=tokens(), labels=tokens()).loss
            loss.backward()
            values += [loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])]
            model.zero_grad()
            handle.end_step()
        results.append(values)
    (eager_loss, eager, later_loss, later), traced = results
    assert traced[0] == eager_loss
    assert torch.allclose(traced[1], eager, atol=1e-5, rtol=1e-4)
    assert traced[2] == pytest.approx(later_loss, rel=1e-6)
    assert torch.allclose(traced[3], later, atol=1e-4, rtol=1e-3)


def test_switch_changes_the_policy_in_place() -> None:
    from halfulp.quantization import resolve

    model = tiny_llama()
    plain = loss_and_gradient(model)
    handle = quantize(model, "te_current")
    handle.switch(resolve(model, "fp32"))
    assert handle.sites == {}
    assert loss_and_gradient(model)[0] == pytest.approx(plain[0], rel=1e-6)
    handle.switch(resolve(model, "nvfp4_all"))
    assert loss_and_gradient(model)[0] != plain[0]
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantizedLinear)
    unquantize(model)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_mistakes_are_answered() -> None:
    model = tiny_llama()
    with pytest.raises(PolicyError, match="not quantized"):
        unquantize(model)
    with pytest.raises(PolicyError, match="te_current"):
        quantize(model, "te_curent")
    with pytest.raises(PolicyError, match="allow_partial"):
        quantize(model, "coat")
    with pytest.raises(FormatError, match="carrier 'fp8'"):
        quantize(model, "te_current", carrier="fp8")
    assert not model._forward_pre_hooks
    quantize(model, "te_current")
    with pytest.raises(PolicyError, match="already"):
        quantize(model, "te_current")
    plain = Attention()
    with pytest.raises(PolicyError, match="attention interface") as refused:
        quantize(plain, "te_current")
    # Nothing was touched, and the cure that the error shows is one.
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    assert 'match = "layers.*.attn", recipe = "fp32"' in str(refused.value)
    rules = [{"match": "layers.*.attn", "recipe": "fp32"}, {"match": "*", "recipe": "te_current"}]
    assert len(quantize(plain, Policy.from_table({"rule": rules})).sites) == 4


class Attention(nn.Module):
    """A plain module whose attention does not go through transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"self_attn": PlainAttention()})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0]["self_attn"](x)


class PlainAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(8, 8, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.o_proj(self.v_proj(x))


@pytest.mark.parametrize("optimizer", ["torch", "halfulp"])
def test_weights_that_no_optimizer_stores_are_an_error(optimizer: str) -> None:
    results = []
    for allowed in (False, True):
        model = tiny_llama(layers=1)
        handle = quantize(model, "bf16_pure_sr", allow_partial=allowed)
        groups = halfulp.param_groups(model, handle.resolution)
        made = halfulp.AdamW(groups) if optimizer == "halfulp" else None
        update = made or torch.optim.AdamW(model.parameters())
        for _ in range(2):  # two micro-batches
            model(input_ids=tokens(), labels=tokens()).loss.backward()
        update.step()
        if made:  # damage to one weight is for the guard to find
            with torch.no_grad():
                model.model.norm.weight.mul_(1.001)
        try:
            loss_and_gradient(model)
            results.append("")
        except PolicyError as error:
            results.append(str(error))
    assert results[1] == ""
    if optimizer == "halfulp":
        assert results[0] == ""
    else:
        assert "'bf16_pure_sr' stores weights as bf16, and the optimizer has left" in results[0]
        assert "allow_partial=True" in results[0]
