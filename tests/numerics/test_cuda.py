"""On a GPU: the bits of the CPU, fp32 sums where fp32 is said, and no step that the host waits for.

    python -m pytest -m gpu tests/numerics/test_cuda.py

Sums over many elements (GEMMs, energies) differ in their order; all else is equal bit by bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from oracles.compare import assert_same
from oracles.inputs import DATA_KINDS, around_grid, data, mixture
from torch import Tensor, nn

from halfulp.errors import ConfigError
from halfulp.numerics.apply import apply_quantizer, delayed_scale
from halfulp.numerics.format import FORMATS, get_format
from halfulp.numerics.gemm import encode, multiply, multiply_bf16, multiply_int8, parse_accumulation
from halfulp.numerics.hadamard import hadamard
from halfulp.numerics.quantizer import Quantizer, parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to
from halfulp.numerics.statistics import NAMES, quantizer_statistics
from halfulp.optim import AdamW
from halfulp.quantization import quantize
from halfulp.recipe import OPERANDS, QUANTIZERS
from halfulp.recipe_reader import load_recipe, recipe_names
from halfulp.site import Clock, Site, quantized_matmul
from halfulp.train.config import ModelConfig
from halfulp.train.model import build_model, next_token_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # says what it is, once
]

KEY = Key.of(0, "cuda")
ROUNDINGS = ["nearest", "stochastic", "truncate"]
GENERAL = ["e8m1", "e8m22", "e7m1", "e6m9", "e5m3", "e5m2fn", "e3m3finite", "int2", "int16"]
MORE = [
    "e5m2@tensor:current:p2", "e4m3@tensor:current:margin(2)", "fp16@tensor:current",
    "e4m3@row:current:p2:margin(1)", "int4@3x5:current", "e2m1@1x32:e8m0_floor",
    "e3m2@32x32:e8m0_up", "e2m1@16x16:nvfp4", "e4m3@tensor:static(0.3)", "e5m3:overflow",
    "e4m3@tensor:delayed(16):p2", "e2m1@1x16:nvfp4:hadamard(16)", "bf16:hadamard(128)",
]  # fmt: skip


def shipped() -> list[str]:
    """Every quantizer of every shipped recipe, whatever its rounding, and `MORE`."""
    found = set(MORE)
    for recipe in map(load_recipe, recipe_names()):
        asked = [getattr(recipe, name) for name in QUANTIZERS]
        asked += [getattr(spec, o) for spec in recipe.gemms.values() for o in OPERANDS]
        found |= {str(q) for q in asked}
    plain = {":".join(w for w in text.split(":") if w not in ROUNDINGS) for text in found}
    return sorted(text for text in plain if text != "fp32")


def batch(kind: str, seed: int = 0) -> Tensor:
    return torch.from_numpy(data(kind, 70, 256, seed)).view(2, 35, 256)


def scale_for(q: Quantizer, device: str) -> Tensor | None:
    """The scale that some history asks for; None where the tensor itself decides."""
    history = torch.tensor([0.0, 3.7, torch.inf, 0.9]).to(device)
    return delayed_scale(history, q) if q.scale == "delayed" else None


def quantized(x: Tensor, q: Quantizer, key: Key | Tensor | None = KEY) -> Tensor:
    return apply_quantizer(x, q, key=key, scale=scale_for(q, x.device.type))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Inside, an operation that makes the host wait for the GPU is an error."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*FORMATS, *GENERAL])
def test_rounding(name, rounding, saturate):
    x = mixture(50_000, seed=11)
    if get_format(name).bits <= 16:
        x = np.concatenate([x, around_grid(name)[-(1 << 17) :]])
    x, options = torch.from_numpy(x), {"rounding": rounding, "key": KEY, "saturate": saturate}
    assert_same(round_to(x.cuda(), name, **options).cpu(), round_to(x, name, **options), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_rounding_of_half_inputs_shards_and_views(rounding, dtype):
    x = torch.from_numpy(mixture(64 * 96)).view(64, 96)
    half = x.to(dtype)
    expected = round_to(half, "e4m3", rounding=rounding, key=KEY)
    assert_same(round_to(half.cuda(), "e4m3", rounding=rounding, key=KEY).cpu(), expected)
    for start in (0, 2**31 - 7, 2**32 - 100, 5 * 2**32 + 3):
        options = {"rounding": rounding, "key": KEY, "index": start}
        found = round_to(x.cuda().t(), "bf16", **options)
        assert_same(found.cpu(), round_to(x.t(), "bf16", **options))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("text", shipped())
def test_quantizers(text, rounding):
    """Every kind of data: ties, subnormals, ±0, inf, NaN, any bit pattern."""
    q = parse_quantizer(f"{text}:{rounding}")
    for kind in DATA_KINDS:
        x = batch(kind)
        assert_same(quantized(x.cuda(), q).cpu(), quantized(x, q), x if not q.hadamard else None)
    assert not torch.equal(quantized(batch("normal").cuda(), q).cpu(), batch("normal"))


@pytest.mark.parametrize("d", [2, 4, 8, 16, 32, 64, 128])
def test_hadamard(d):
    for kind in DATA_KINDS:
        x = batch(kind)
        assert_same(hadamard(x.cuda(), d).cpu(), hadamard(x, d))


TRACED = [
    "bf16:stochastic", "e4m3:stochastic", "e4m3@tensor:static(0.3):truncate",
    "e4m3@tensor:current", "e5m2@tensor:current:stochastic", "e4m3@1x128:current:p2",
    "e4m3@128x128:current", "int8@row:current:stochastic", "e4m3@1x32:e8m0_up:stochastic",
    "e2m1@1x32:e8m0_floor", "e2m1@1x16:nvfp4:stochastic", "e2m1@1x16:nvfp4:hadamard(16)",
    "e4m3@1x32:e8m0_up:hadamard(32)",
]  # fmt: skip


@pytest.mark.filterwarnings("default")  # Inductor's own
def test_compiled_quantizers():
    """One traced graph of all: a key as a tensor on the CPU, as in a traced model."""
    torch.compiler.reset()
    quantizers = [parse_quantizer(text) for text in TRACED]

    def apply_all(x: Tensor, key: Tensor) -> list[Tensor]:
        return [apply_quantizer(x, q, key=key) for q in quantizers]

    compiled, wrong = torch.compile(apply_all, fullgraph=True, dynamic=False), {}
    for kind in DATA_KINDS:
        x = batch(kind)
        for q, found in zip(quantizers, compiled(x.cuda(), KEY.tensor()), strict=True):
            try:
                assert_same(found.cpu(), quantized(x, q))
            except AssertionError as error:
                wrong[f"{q} {kind}"] = str(error)
    assert not wrong


@pytest.mark.filterwarnings("default")
def test_compiled_rounding():
    torch.compiler.reset()
    names = ["bf16", "e4m3", "e5m2", "e2m1", "int8", "e5m9"]

    def round_all(x: Tensor) -> list[Tensor]:
        return [round_to(x * 0.5, n, rounding=r, key=KEY) * 2 for n in names for r in ROUNDINGS]

    x = torch.from_numpy(mixture(5000, seed=15))
    compiled = torch.compile(round_all, fullgraph=True, dynamic=False)
    for found, expected in zip(compiled(x.cuda()), round_all(x), strict=True):
        assert_same(found.cpu(), expected, x)


@pytest.mark.parametrize("kind", ["normal", "lognormal", "nan_inf"])
@pytest.mark.parametrize("text", shipped())
def test_statistics(text, kind):
    q, x = parse_quantizer(text), batch(kind)
    found, expected = (
        quantizer_statistics(t, quantized(t, q), q, scale_for(q, t.device.type))
        for t in (x.cuda(), x)
    )
    for name, a, b in zip(NAMES, found.tolist(), expected.tolist(), strict=True):
        assert a == pytest.approx(b, rel=1e-6 if "energy" in name else 0, nan_ok=True), name


@pytest.mark.parametrize(
    "options",
    [
        {"weight": "bf16", "update_rounding": "stochastic"},
        {"weight": "bf16", "update_rounding": "nearest"},
        {"weight": "e5m7", "update_rounding": "stochastic"},
        {"weight": "fp32"},
        {"weight": "bf16", "moment_m": "e4m3@1x128", "moment_v": "bf16:stochastic"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw(options, dtype):
    if dtype is torch.bfloat16 and options["weight"] != "bf16":
        pytest.skip("bf16 parameters hold bf16 weights only")
    results = {}
    for device in ("cpu", "cuda"):
        generator = torch.Generator().manual_seed(0)
        start = [0.02 * torch.randn(s, generator=generator) for s in ((40, 128), (40,), (1,))]
        named = {str(i): nn.Parameter(t.to(dtype).to(device)) for i, t in enumerate(start)}
        optimizer = AdamW(named.items(), lr=1e-3, **options)
        for _ in range(6):
            for p in named.values():
                noise = torch.randn(p.shape, generator=generator)
                p.grad = (p.detach().cpu().float() + 0.01 * noise).to(dtype).to(device)
            optimizer.step()
        moments = [optimizer.state[p][k] for p in named.values() for k in "mv"]
        results[device] = [t.detach().float().cpu() for t in (*named.values(), *moments)]
    for found, expected in zip(results["cuda"], results["cpu"], strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize("text", ["fp32", "fast", "split", "promote(64)"])
def test_accumulation_of_exact_sums(text):
    generator = torch.manual_seed(0)
    a, b = (torch.randint(-63, 64, (r, 200), generator=generator).float() for r in (33, 20))
    accumulation = parse_accumulation(text)
    assert_same(multiply(a.cuda(), b.cuda(), accumulation).cpu(), multiply(a, b, accumulation))


@pytest.mark.parametrize("shape", [(64, 48, 512), (5, 3, 20), (1, 1, 7), (17, 8, 4096)])
@pytest.mark.parametrize("texts", [("int8@row", "int8@tensor"), ("int4@row", "int8@row")])
def test_int8_carrier_has_the_bits_of_the_cpu(texts, shape):
    """Of any shape: the GPU's own int8 GEMM takes M > 16 and multiples of 8 only."""
    (m, n, k), generator = shape, torch.manual_seed(0)
    a, b = (torch.randn(rows, k, generator=generator) for rows in (m, n))
    results = [
        multiply_int8(
            *(encode(t, parse_quantizer(q), None) for t, q in zip(pair, texts, strict=True))
        )
        for pair in ((a.cuda(), b.cuda()), (a, b))
    ]
    assert_same(results[0].cpu(), results[1])


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("k", [64, 8192])
def test_bf16_carrier_keeps_fp32_sums(k, batched):
    """Against fp64: bf16 rounds the result once. Sums kept in bf16 would be many times off."""
    q, generator = parse_quantizer("e4m3@1x32:e8m0_up"), torch.manual_seed(0)
    a, b = (apply_quantizer(torch.randn(2, 64, k, generator=generator), q).cuda() for _ in "ab")
    a, b = (a, b) if batched else (a[0], b[0])
    exact = a.double() @ b.double().mT
    found = multiply_bf16(a, b)
    assert found.shape == exact.shape
    assert torch.equal(found, found.bfloat16().float())
    differ = (found != exact.float().bfloat16().float()).double().mean().item()
    assert differ < 0.01  # sums of fp32 seldom cross a tie of bf16
    assert 1e-3 < (found - exact).norm() / exact.norm() < 2.5e-3


def relative_error(a: Tensor, b: Tensor) -> float:
    exact = a.double() @ b.double().mT
    return float((multiply(a, b) - exact).norm() / exact.norm())


def test_simulated_gemms_multiply_in_fp32():
    """Two-sided: TF32 would be 1000 times worse, this test sees it, and a simulation refuses it."""
    q, generator = parse_quantizer("e4m3@tensor:current"), torch.manual_seed(0)
    a, b = (apply_quantizer(torch.randn(512, 1024, generator=generator).cuda(), q) for _ in "ab")
    assert 1e-9 < relative_error(a, b) < 2e-6
    site = site_of("te_current")
    x, w = (torch.randn(32, 64, device="cuda") for _ in "xw")
    quantized_matmul(x, w, None, site, True)
    torch.set_float32_matmul_precision("high")
    try:
        assert relative_error(a, b) > 2e-5
        with pytest.raises(ConfigError, match=r"on cuda in tf32\. Call torch\.set_float32_matmul"):
            quantized_matmul(x, w, None, site, True)
    finally:
        torch.set_float32_matmul_precision("highest")


def site_of(recipe: str, carrier: str = "fp32") -> Site:
    return Site(
        "layers.0.ffn", "layers.0.ffn", load_recipe(recipe).gemms["linear"], 0, Clock(), carrier
    )


def rounds_linears(recipe: str) -> bool:
    spec = load_recipe(recipe).gemms["linear"]
    return not all(getattr(spec, operand).is_identity for operand in OPERANDS)


def products(site: Site, device: str, run=quantized_matmul) -> list[Tensor]:
    """y, dx, dw and dbias of one step."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((64, 128), (96, 128), (96,))
    leaves = [torch.randn(s, generator=generator).to(device).requires_grad_() for s in shapes]
    y = run(*leaves, site, True)
    y.backward(torch.randn(y.shape, generator=generator).to(device))
    return [y.detach(), *(t.grad for t in leaves if t.grad is not None)]


def difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x.cpu() - y.cpu()).norm() / y.norm()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("carrier", ["fp32", "exact"])
@pytest.mark.parametrize("recipe", [n for n in recipe_names() if rounds_linears(n)])
def test_quantized_gemms(recipe, carrier):
    """As on the CPU up to the order of sums: a bf16 step of the result here and there at most."""
    site = site_of(recipe, carrier)
    cpu, cuda = products(site, "cpu"), products(site, "cuda")
    plain = products(site_of("fp32"), "cpu")
    assert difference(cuda, cpu) < 1e-3
    assert difference(cuda, plain) > 2 * difference(cuda, cpu)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("recipe", ["te_current", "mxfp8"])
def test_compiled_gemms_draw_the_same_bits(recipe):
    torch.compiler.reset()
    site = site_of(recipe)
    eager = products(site, "cuda")
    compiled = products(site, "cuda", torch.compile(quantized_matmul, fullgraph=True))
    assert difference(compiled, eager) < 1e-3
    if site.stochastic:  # two-sided: another step draws other bits
        site.clock.set(1, 0)
        assert difference(products(site, "cuda"), eager) > 1e-2


@pytest.mark.parametrize("counting", [False, True])
@pytest.mark.parametrize("carrier", ["fp32", "exact"])
@pytest.mark.parametrize("recipe", recipe_names())
def test_the_host_does_not_wait(recipe, carrier, counting):
    """From the second call on: the first puts constants and delayed scales on the GPU."""
    site = site_of(recipe, carrier)
    site.clock.counting = counting
    x, w, g = (torch.randn(64, 64, device="cuda", requires_grad=True) for _ in "xwg")
    quantized_matmul(x, w, None, site, True).backward(g.detach())
    with no_waiting():
        quantized_matmul(x, w, None, site, True).backward(g.detach())


def test_waiting_would_be_noticed():
    x = torch.ones(3, device="cuda")
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


def test_a_step_of_delayed_scaling_waits_once():
    """Histories roll on the CPU; the scales go back to the GPU together."""
    losses = {}
    for device in ("cpu", "cuda"):
        built = build_model(ModelConfig(preset="llama-tiny"), vocab=64, length=32, seed=0)
        model = built.model.to(device)
        handle = quantize(model, "te_delayed")
        ids = torch.randint(0, 64, (4, 33), generator=torch.manual_seed(0)).to(device)
        losses[device] = []
        for step in range(3):
            handle.set_step(step)
            loss = next_token_loss(model, ids)
            loss.backward()
            handle.end_step()
            losses[device].append(loss.item())
        histories = [h for site in handle.sites.values() for h in site.histories.values()]
        seen = [h for h in histories if h.amaxes[0] > 0]
        assert {h.scale_on(loss.device).device.type for h in seen} == {device}
        assert all(h.copy is not None for h in seen) == (device == "cuda")
        assert {h.amaxes.device.type for h in histories} == {"cpu"}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=1e-3)
    assert losses["cpu"][0] != losses["cpu"][2]  # the scales have moved
