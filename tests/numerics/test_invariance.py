"""The same bits from C and torch, any thread count, any split, any memory layout."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from oracles.compare import assert_same, on_kernel
from oracles.grids import grid, round_array
from oracles.hashing import key_of, words_at
from oracles.inputs import data, mixture

from halfulp.errors import FormatError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.format import FORMATS
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import random_words, round_definition, round_to

KEY = Key.of(0, "invariance")
ROUNDINGS = ["nearest", "stochastic", "truncate"]
GENERAL = [
    "e8m1", "e8m3", "e8m22", "e7m22", "e7m1", "e6m9", "e5m3", "e5m2fn", "e4m4fn", "e4m3ieee",
    "e3m3finite", "e2m1ieee", "e2m22", "int2", "int12", "int16",
]  # fmt: skip
QUANTIZERS = [
    "e4m3@tensor:current", "e5m2@tensor:current:p2", "e4m3@tensor:current:margin(2)",
    "fp16@tensor:current", "int8@row:current", "e4m3@row:current:p2:margin(1)",
    "e4m3@1x128:current", "e4m3@128x128:current", "int4@3x5:current", "e4m3@1x32:e8m0_up",
    "e2m1@1x32:e8m0_floor", "e3m2@32x32:e8m0_up", "e2m1@1x16:nvfp4", "e2m1@16x16:nvfp4",
    "e4m3@tensor:static(0.3)", "e4m3@1x32:e8m0_up:hadamard(32)", "e5m3:overflow", "bf16",
]  # fmt: skip


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("saturate", [False, True])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", [*FORMATS, *GENERAL])
def test_c_equals_torch(name, rounding, saturate):
    x = torch.from_numpy(mixture(20_000, seed=11))
    results = []
    for kernel in ("c", "torch"):
        with on_kernel(kernel):
            results.append(round_to(x, name, rounding=rounding, key=KEY, saturate=saturate))
    assert_same(*results, x)


@pytest.mark.parametrize("kind", ["normal", "random_bits", "nan_inf", "subnormal"])
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("text", QUANTIZERS)
def test_c_equals_torch_with_scales(text, rounding, kind):
    q = parse_quantizer(f"{text}:{rounding}")
    # Without the zero blocks at the end, which the next test is about.
    x = torch.from_numpy(data(kind, 71, 160)[:70]).view(2, 35, 160)
    results = []
    for kernel in ("c", "torch"):
        with on_kernel(kernel):
            results.append(apply_quantizer(x, q, key=KEY))
    assert_same(*results, x)


def test_c_equals_torch_in_zero_blocks_of_a_non_finite_tensor():
    x = torch.zeros(2, 32)
    x[0, 0] = torch.inf
    results = []
    for kernel in ("c", "torch"):
        with on_kernel(kernel):
            results.append(apply_quantizer(x, parse_quantizer("e2m1@1x16:nvfp4")))
    assert_same(*results)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize(
    "text",
    ["bf16", "e4m3", "e4m3@tensor:current", "e4m3@row:current", "e4m3@1x32:e8m0_up",
     "e2m1@1x16:nvfp4", "e4m3@128x128:current"],
)  # fmt: skip
def test_one_thread_equals_two(text, rounding):
    x = torch.from_numpy(mixture(1 << 19, seed=12)).nan_to_num(1.0, 2.0, 3.0).view(512, 1024)
    q = parse_quantizer(f"{text}:{rounding}")
    results = []
    with on_kernel("c"):
        for n in (1, 2):
            with threads(n):
                results.append(apply_quantizer(x, q, key=KEY))
    assert_same(*results)


@pytest.mark.parametrize("name", ["bf16", "e4m3"])
@pytest.mark.parametrize("start", [0, 2**31 - 7, 2**32 - 100, 5 * 2**32 + 3, 2**40 - 900])
def test_a_shard_rounds_as_the_whole_does(name, start, kernel_name):
    """Element i of the logical tensor uses word i, on both sides of every multiple of 2^32."""
    x = torch.from_numpy(mixture(1000, seed=13))
    whole = round_to(x, name, rounding="stochastic", key=KEY, index=start)
    cuts = [0, 1, 99, 100, 101, 640, 1000]
    pieces = [
        round_to(x[a:b], name, rounding="stochastic", key=KEY, index=start + a)
        for a, b in pairwise(cuts)
    ]
    assert_same(torch.cat(pieces), whole)
    words = words_at(key_of(0, "invariance"), start, 1000)
    saturate = name != "bf16"
    assert_same(whole, round_array(x.numpy(), grid(name), "stochastic", saturate, words))


def test_rows_of_a_matrix_are_shards(kernel_name):
    x = torch.from_numpy(mixture(64 * 48)).view(64, 48)
    whole = round_to(x, "e5m2", rounding="stochastic", key=KEY)
    part = round_to(x[16:32], "e5m2", rounding="stochastic", key=KEY, index=16 * 48)
    assert_same(part, whole[16:32])


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_large_tensors_in_chunks(rounding, kernel_name):
    """Longer than the definition's chunk and the grain of the thread pool."""
    x = torch.from_numpy(mixture((1 << 17) + 3, seed=14))
    whole = round_to(x, "e4m3", rounding=rounding, key=KEY)
    random = random_words(x, KEY.tensor())
    q = parse_quantizer("e4m3")
    assert_same(whole, round_definition(x, q.format, rounding, True, random))


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_out_and_in_place(rounding, kernel_name):
    x = torch.from_numpy(mixture(999)).view(3, 333)
    expected = round_to(x, "e4m3", rounding=rounding, key=KEY)
    out = torch.full_like(x, 7.0)
    assert round_to(x, "e4m3", rounding=rounding, key=KEY, out=out) is out
    assert_same(out, expected)
    round_to(x, "e4m3", rounding=rounding, key=KEY, out=x)
    assert_same(x, expected)


@pytest.mark.parametrize("text", QUANTIZERS)
def test_out_and_in_place_with_scales(text, kernel_name):
    x = torch.from_numpy(data("normal", 48, 96))
    q = parse_quantizer(text)
    expected = apply_quantizer(x, q)
    out = torch.full_like(x, 7.0)
    assert apply_quantizer(x, q, out=out) is out
    assert_same(out, expected)
    assert apply_quantizer(x, q, out=x) is x
    assert_same(x, expected)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    "view",
    [lambda x: x.t(), lambda x: x[::2, 1::3], lambda x: x.unflatten(0, (4, -1)).transpose(0, 2),
     lambda x: x[:, :1].expand(-1, 9)],
    ids=["transpose", "strided", "permuted", "expanded"],
)  # fmt: skip
def test_memory_layout_does_not_matter(view, rounding, kernel_name):
    x = view(torch.from_numpy(mixture(64 * 96)).view(64, 96))
    assert not x.is_contiguous()
    for text in ("e4m3", "bf16"):
        y = round_to(x, text, rounding=rounding, key=KEY)
        assert y.shape == x.shape
        assert_same(y, round_to(x.contiguous(), text, rounding=rounding, key=KEY))
    q = parse_quantizer(f"e4m3@1x32:e8m0_up:{rounding}")
    assert_same(apply_quantizer(x, q, key=KEY), apply_quantizer(x.contiguous(), q, key=KEY))


@pytest.mark.parametrize("text", QUANTIZERS)
@pytest.mark.parametrize("shape", [(0,), (0, 32), (3, 0), (2, 0, 5)])
def test_empty_tensors(shape, text, kernel_name):
    x = torch.empty(shape)
    assert round_to(x, "e4m3").shape == shape
    q = parse_quantizer(text)
    if not q.hadamard:
        assert apply_quantizer(x, q).shape == shape


def test_scalars(kernel_name):
    assert round_to(torch.tensor(1.03), "e4m3").item() == 1.0
    assert apply_quantizer(torch.tensor(3.0), parse_quantizer("int8@tensor")).item() == 3.0


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1", "int8"])
def test_half_inputs_round_once_and_keep_their_dtype(name, dtype, rounding, kernel_name):
    x = torch.from_numpy(mixture(5000)).to(dtype)
    y = round_to(x, name, rounding=rounding, key=KEY)
    assert y.dtype is dtype
    assert_same(y, round_to(x.float(), name, rounding=rounding, key=KEY))


@pytest.mark.parametrize("name", ["e5m9finite", "e5m2fn"])
def test_formats_beyond_fp16_are_refused(name):
    """65504 would round to 65536, which fp16 does not hold."""
    with pytest.raises(FormatError, match=r"does not fit in torch\.float16"):
        round_to(torch.tensor([65504.0], dtype=torch.float16), name)


def test_key_as_a_tensor_gives_the_same_bits(kernel_name):
    x = torch.from_numpy(data("normal", 32, 64))
    for text in ("bf16:stochastic", "e2m1@1x16:nvfp4:stochastic"):
        q = parse_quantizer(text)
        expected = apply_quantizer(x, q, key=KEY)
        assert_same(apply_quantizer(x, q, key=KEY.tensor()), expected)


def test_gradients_do_not_flow_and_do_not_break(kernel_name):
    x = torch.randn(8, 8, generator=torch.manual_seed(0), requires_grad=True)
    assert not round_to(x, "e4m3").requires_grad
    assert not round_to(torch.nn.Parameter(x.detach()), "e4m3").requires_grad


def test_the_global_generator_is_left_alone(kernel_name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    round_to(torch.randn(10), "e4m3")
    torch.manual_seed(5)
    round_to(torch.ones(10), "e4m3", rounding="stochastic", key=KEY)
    apply_quantizer(torch.ones(4, 32), parse_quantizer("e4m3@1x32:stochastic"), key=KEY)
    assert torch.equal(torch.get_rng_state(), before)


TRACED = ["bf16:stochastic", "e4m3@tensor:static(0.5)", "e2m1@1x16:nvfp4:stochastic:hadamard(16)"]


@pytest.mark.parametrize("text", TRACED)
def test_traced_equals_eager(text, kernel_name):
    torch.compiler.reset()
    q, x = parse_quantizer(text), torch.from_numpy(data("lognormal", 64, 128))
    expected = apply_quantizer(x, q, key=KEY)
    traced = torch.compile(
        lambda x, key: apply_quantizer(x, q, key=key), fullgraph=True, backend="aot_eager"
    )
    assert_same(traced(x, KEY.tensor()), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("default::DeprecationWarning")  # Inductor imports torch.jit
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["bf16", "e4m3", "e2m1"])
def test_definition_fused_by_the_compiler_equals_eager(name, rounding):
    """(a + c) − c survives Inductor's code, also next to other operations."""
    torch.compiler.reset()
    x, fmt = torch.from_numpy(mixture(5000, seed=15)), parse_quantizer(name).format

    def scaled(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return round_definition(x * 0.5, fmt, rounding, True, random_words(x, key)) * 2

    expected = scaled(x, KEY.tensor())
    assert_same(torch.compile(scaled, fullgraph=True)(x, KEY.tensor()), expected, x)


def test_mixture_covers_what_it_should():
    """The inputs of this file contain NaN, inf, zero-bound and subnormal values."""
    x = mixture(20_000, seed=11)
    assert np.isnan(x).any()
    assert (np.abs(x) < 2.0**-126).any()
    assert (np.abs(x) > 2.0**100).any()


@pytest.mark.parametrize("text", ["e4m3", "bf16:stochastic", "e4m3@1x8:e8m0_up", "e4m3@tensor"])
def test_transforms_of_torch_func(text, kernel_name):
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    quantize = partial(apply_quantizer, q=parse_quantizer(text), key=Key.of(0, "x"))
    each = torch.stack([quantize(part) for part in x])
    assert torch.equal(torch.func.vmap(quantize)(x), each)
    assert torch.equal(torch.func.functionalize(quantize)(x), quantize(x))
