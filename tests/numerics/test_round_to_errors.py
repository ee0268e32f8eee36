"""What round_to and apply_quantizer refuse, and what they say."""

import pytest
import torch

from halfulp.errors import FormatError
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key
from halfulp.numerics.rounding import round_to

X = torch.ones(4, 32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.float8_e5m2])
def test_other_dtypes_are_refused(dtype, kernel_name):
    with pytest.raises(FormatError, match=f"fp32, bf16 or fp16 .*found {dtype}.*Convert"):
        round_to(X.to(dtype), "e4m3")
    with pytest.raises(FormatError, match=f"fp32 tensors; found {dtype}.*Convert"):
        apply_quantizer(X.to(dtype), parse_quantizer("e4m3"))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp16", torch.bfloat16), ("bf16", torch.float16), ("tf32", torch.bfloat16),
     ("e8m3", torch.float16), ("e6m2", torch.float16), ("int9", torch.bfloat16),
     ("int12", torch.float16)],
)  # fmt: skip
def test_formats_wider_than_the_tensor_are_refused(name, dtype):
    with pytest.raises(FormatError, match=f"{name} does not fit in {dtype}.*x.float"):
        round_to(X.to(dtype), name)


def test_unknown_rounding_lists_the_known():
    with pytest.raises(FormatError, match=r"'up' is unknown\. Use one of nearest, stoch"):
        round_to(X, "e4m3", rounding="up")


def test_stochastic_needs_a_key(kernel_name):
    with pytest.raises(FormatError, match=r"needs a key: pass key=Key\.of"):
        round_to(X, "e4m3", rounding="stochastic")
    with pytest.raises(FormatError, match="needs a key"):
        apply_quantizer(X, parse_quantizer("e4m3@row:stochastic"))


@pytest.mark.parametrize(
    "out",
    [torch.empty(32, 4), torch.empty(4, 32).double(), torch.empty(32, 4).t()],
    ids=["shape", "dtype", "layout"],
)
def test_out_must_fit(out, kernel_name):
    with pytest.raises(FormatError, match=r"out= needs contiguous fp32 \(4, 32\); found"):
        round_to(X, "e4m3", out=out)
    with pytest.raises(FormatError, match=r"out= needs contiguous fp32 \(4, 32\); found"):
        apply_quantizer(X, parse_quantizer("e4m3@row"), out=out)


def test_scale_belongs_to_delayed_scaling_only():
    for text, scale in (("e4m3@tensor:delayed(2)", None), ("e4m3@tensor", torch.tensor(1.0))):
        with pytest.raises(FormatError, match="scale= belongs to delayed scaling"):
            apply_quantizer(X, parse_quantizer(text), scale=scale)


def test_hadamard_needs_a_multiple():
    q = parse_quantizer("e2m1@1x16:nvfp4:hadamard(16)")
    with pytest.raises(FormatError, match="multiple of 16; found 40"):
        apply_quantizer(torch.ones(2, 40), q, key=Key(0, 0))


@pytest.mark.parametrize("scale", [torch.tensor(2.0).double(), torch.ones(2)])
def test_scale_must_be_one_fp32_number(scale, kernel_name):
    q = parse_quantizer("e4m3@tensor:delayed(2)")
    with pytest.raises(FormatError, match="must be one fp32 number; found"):
        apply_quantizer(X, q, scale=scale)


def test_sparse_tensors_are_answered():
    with pytest.raises(FormatError, match="dense"):
        round_to(torch.zeros(2, 2).to_sparse(), "e4m3")


def test_out_is_x_or_apart_from_it(kernel_name):
    memory = torch.randn(200_001)
    for start, stop in ((0, 1), (1, 0)):
        x, out = memory[start : 200_000 + start], memory[stop : 200_000 + stop]
        with pytest.raises(FormatError, match=r"shares part of its memory with x\. Give x itself"):
            round_to(x, "e4m3", out=out)
        with pytest.raises(FormatError, match="shares part of its memory"):
            apply_quantizer(x, parse_quantizer("e4m3@1x32:e8m0_up"), out=out)
    halves = memory[:100_000], memory[100_000:200_000]
    expected = round_to(halves[0], "e4m3")
    assert torch.equal(round_to(halves[0], "e4m3", out=halves[1]), expected)


def test_autograd_notices_what_is_written_to_out(kernel_name):
    for write in (
        lambda t: round_to(t, "e2m1", out=t),
        lambda t: apply_quantizer(t, parse_quantizer("e2m1@row"), out=t),
        lambda t: apply_quantizer(t, parse_quantizer("e2m1@tensor:static(2)"), out=t),
    ):
        w = torch.randn(4, 8, requires_grad=True)
        saved = w.exp()
        loss = saved.sum()
        with torch.no_grad():
            write(saved)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_negative_index_is_refused(kernel_name):
    key = Key.of(0, "w")
    with pytest.raises(FormatError, match="index= counts elements from 0; found -1"):
        round_to(X, "e4m3", rounding="stochastic", key=key, index=-1)
