"""`halfulp formats`: the number formats."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

from halfulp.cli.show import print_table

if TYPE_CHECKING:
    from halfulp.numerics.format import Format

_COLUMNS = (
    "format",
    "bits",
    "exponent",
    "mantissa",
    "u",
    "largest",
    "smallest normal",
    "smallest subnormal",
    "overflow",
)


def formats(
    name: Annotated[
        str | None, typer.Argument(help="One format, such as e4m3, e5m7 or nvfp4.")
    ] = None,
) -> None:
    """List the number formats, or show one.

    Bits, unit roundoff u, range, and what a too large value becomes. Words for a format with its
    block scales: the quantizer that they stand for.
    """
    from halfulp.formats import NAMED
    from halfulp.numerics.format import FORMATS, get_format

    if name is None:
        print_table(_COLUMNS, [_row(get_format(n)) for n in FORMATS])
        print()
        _print_scaled(NAMED)
    elif name in NAMED or "@" in name or ":" in name:
        _print_scaled([name])
    else:
        print_table(_COLUMNS, [_row(get_format(name))])


def _print_scaled(words: Iterable[str]) -> None:
    from halfulp.formats import format_bits, format_quantizer

    rows = [(word, format_quantizer(word), f"{format_bits(word):g}") for word in words]
    print_table(("scaled", "quantizer", "bits, block scales included"), rows)


def _row(f: "Format") -> tuple[object, ...]:
    u = "" if f.is_int else _power(f.unit_roundoff)
    range_ = (f"{f.largest:.5g}", _power(f.smallest_normal), _power(f.smallest_subnormal))
    return (f.name, f.bits, f.exponent_bits, f.mantissa_bits, u, *range_, f.overflow)


def _power(value: float) -> str:
    """A power of two as such, exactly."""
    return f"2^{math.frexp(value)[1] - 1}"
