"""Format tables against the standards, and names that do not exist."""

import pytest
from oracles.grids import grid, values

from halfulp.errors import FormatError
from halfulp.numerics.format import FORMATS, get_format

GENERAL = ["e4m3ieee", "e8m3", "e2m1ieee", "e5m3", "e4m4fn", "e3m3finite", "e7m8", "int12", "int2"]


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "fp32"] + GENERAL)
def test_parameters(name):
    fmt, g = get_format(name), grid(name)
    assert (fmt.mantissa_bits, fmt.smallest_exponent, fmt.overflow) == (g.m, g.e_min, g.overflow)
    assert fmt.largest == g.largest
    assert fmt.smallest_subnormal == 2.0 ** (g.e_min - g.m)


@pytest.mark.parametrize("name", [n for n in FORMATS if FORMATS[n].bits <= 16] + GENERAL)
def test_derived_sizes(name):
    fmt, grid_values = get_format(name), values(name)
    assert fmt.smallest_subnormal == grid_values[1]
    assert 2.0**fmt.largest_exponent <= fmt.largest < 2.0 ** (fmt.largest_exponent + 1)
    if not fmt.is_int:
        above_one = grid_values[grid_values > 1][0]
        assert fmt.unit_roundoff == (above_one - 1) / 2
        assert fmt.smallest_normal == grid_values[2**fmt.mantissa_bits]


@pytest.mark.parametrize(
    ("alias", "name"),
    [("e8m23", "fp32"), ("e8m10", "tf32"), ("e8m7", "bf16"), ("e5m10", "fp16"), ("e4m3fn", "e4m3")],
)
def test_aliases_are_one_format(alias, name):
    assert get_format(alias) is get_format(name)


def test_only_short_formats_saturate_by_default():
    names = ["bf16", "fp16", "tf32", "e5m7", "e5m2", "e4m3", "e2m1", "int8", "int12"]
    assert [get_format(n).saturates for n in names] == [False] * 4 + [True] * 5


@pytest.mark.parametrize(
    ("name", "near"),
    [("fp8_e4m3", "e4m3"), ("bfloat16", "bf16"), ("e1m3", "e4m3"), ("e9m3", "e4m3"),
     ("e4m23", "e4m3"), ("e8m7fn", "e8m7"), ("int17", "int8"), ("int1", "int8"), ("", "fp32")],
)  # fmt: skip
def test_unknown_name_is_answered_with_near_ones(name, near):
    with pytest.raises(FormatError, match=f"{name!r}.*{near}"):
        get_format(name)
