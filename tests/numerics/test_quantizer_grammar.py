"""Quantizer strings: what parses, what is refused, and that str() gives the meaning back."""

import pytest
import torch

from halfulp.errors import FormatError
from halfulp.formats import format_quantizer
from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.format import get_format
from halfulp.numerics.quantizer import parse_quantizer

EXAMPLES = [
    "fp32", "bf16", "e8m3:truncate", "e5m7:saturate", "e4m3:overflow", "bf16:stochastic",
    "fp16@tensor:current", "e4m3@tensor:current", "e4m3@row:current:p2", "int8@row:current",
    "e4m3@tensor:current:p2:margin(2)", "e5m2@tensor:delayed(1024)", "e4m3@tensor:static(0.5)",
    "e4m3@tensor:static(1)", "e4m3@tensor:static(1e-05)",
    "e4m3@tensor:delayed(16):p2:margin(1):stochastic", "e4m3@128x128:current", "e4m3@1x128:current",
    "e4m3@1x32:e8m0_up", "e2m3@1x32:e8m0_floor:truncate", "e2m1@16x16:nvfp4",
    "e2m1@1x16:nvfp4:stochastic:hadamard(16)", "bf16:hadamard(32)",
]  # fmt: skip


@pytest.mark.parametrize("text", EXAMPLES)
def test_canonical_spelling_round_trips(text):
    assert str(parse_quantizer(text)) == text
    assert parse_quantizer(str(parse_quantizer(text))) == parse_quantizer(text)


def test_defaults():
    q = parse_quantizer("e4m3@tensor")
    assert (q.scale, q.rounding, q.saturate, q.hadamard, q.margin) == (
        "current", "nearest", True, 0, 0,
    )  # fmt: skip
    assert str(q) == "e4m3@tensor:current"
    assert parse_quantizer("fp16").saturate is False
    assert parse_quantizer(" e4m3fn @ 1x32 : e8m0_up ") == parse_quantizer("e4m3@1x32:e8m0_up")


@pytest.mark.parametrize(
    ("text", "tile", "one_copy"),
    [("bf16", (0, 0), True), ("e4m3@tensor", (0, 0), True), ("e4m3@row", (1, 0), False),
     ("e4m3@1x32:e8m0_up", (1, 32), False), ("e4m3@128x128", (128, 128), True),
     ("e2m1@16x16:nvfp4:hadamard(16)", (16, 16), False)],
)  # fmt: skip
def test_who_shares_a_scale(text, tile, one_copy):
    q = parse_quantizer(text)
    assert q.tile == tile
    assert q.one_copy is one_copy


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("e4m3:current", "needs a granularity"),
        ("e4m3:p2", "p2 and margin"),
        ("e4m3@tensor:static(1):p2", "p2 and margin"),
        ("e4m3@1x32:e8m0_up:margin(1)", "p2 and margin"),
        ("e4m3@row:delayed(4)", "per tensor"),
        ("e4m3@row:static(2)", "per tensor"),
        ("e4m3@tensor:delayed(0)", "H >= 1"),
        ("e4m3@tensor:static(0)", "static(S) needs 2^-126"),
        ("e4m3@tensor:static(1e-50)", "static(S) needs 2^-126"),
        ("e4m3@tensor:static(1e39)", "static(S) needs 2^-126"),
        ("e4m3@1x16:nvfp4", "nvfp4 is e2m1"),
        ("e2m1@1x32:nvfp4", "nvfp4 is e2m1"),
        ("e4m3@tensor:e8m0_up", "e8m0 scales"),
        ("e4m3@row:e8m0_floor", "e8m0 scales"),
        ("e4m3@tensor:overflow", "saturates"),
        ("bf16@tensor", "8-bit exponents"),
        ("e4m3@tensor:hadamard(12)", "power of two"),
        ("e4m3@tensor:hadamard(256)", "power of two"),
        ("e4m3@0x32", "'0x32'"),
        ("e4m3@column", "'column'"),
        ("e4m3@tensor:delayed", "'delayed'"),
        ("e4m3@tensor:p2(1)", "'p2"),
        ("e4m3@tensor:margin(-1)", "margin"),
        ("e4m3@tensor:margin(1.5)", "'margin(1.5)'"),
        ("e4m3@tensor:margin(1_0)", "'margin(1_0)'"),
        ("e4m3@tensor:static(1.2.3)", "'static(1.2.3)'"),
        ("e4m3@tensor:static(nan)", "'static(nan)'"),
        ("e4m3@tensor:static(inf)", "'static(inf)'"),
        ("e4m3@tensor:nearest:stochastic", "'stochastic'"),
        ("e4m3@tensor:delayed(4):current", "'current'"),
        ("e4m3@tensor:static(2):static(3)", "'static(3)'"),
        ("e4m3@tensor:round_up", "'round_up'"),
        ("e4m3@tensor:", "''"),
    ],
)
def test_refused_with_the_grammar(text, said):
    with pytest.raises(FormatError) as error:
        parse_quantizer(text)
    assert said in str(error.value)
    assert "Grammar: FORMAT[@GRANULARITY]" in str(error.value)


def test_apply_quantizer_reads_the_text_too():
    x = torch.randn(3, 32)
    text = "e2m1@1x16:nvfp4"
    assert torch.equal(apply_quantizer(x, text), apply_quantizer(x, parse_quantizer(text)))
    assert not torch.equal(apply_quantizer(x, text), x)
    with pytest.raises(FormatError, match="Grammar"):
        apply_quantizer(x, "e2m1@1x16:nvfp")


@pytest.mark.parametrize(("word", "meant"), [("fp8", "e4m3, e5m2"), ("fp4", "e2m1")])
def test_a_size_is_answered_with_the_formats_of_it(word, meant):
    for read in (get_format, format_quantizer):
        with pytest.raises(FormatError, match=rf"Nearest(?: names)?: {meant}\."):
            read(word)


def test_a_quantizer_is_no_format():
    with pytest.raises(FormatError, match="apply_quantizer"):
        get_format("e4m3@tensor:current")


def test_unknown_format_names_the_nearest():
    with pytest.raises(FormatError, match="Nearest names: e4m3"):
        parse_quantizer("e4m3x@tensor")


@pytest.mark.parametrize("value", ["0.00001", "0.123456789", "65536", "1e20", "3."])
def test_static_scale_round_trips(value):
    q = parse_quantizer(f"e4m3@tensor:static({value})")
    assert parse_quantizer(str(q)) == q
