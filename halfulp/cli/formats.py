"""`halfulp formats`: the number formats."""

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
    name: Annotated[str | None, typer.Argument(help="One format, such as e4m3 or e5m7.")] = None,
) -> None:
    """List the number formats, or show one.

    Bits, unit roundoff u, range, and what a too large value becomes.
    """
    from halfulp.numerics.format import FORMATS, get_format

    shown = list(FORMATS) if name is None else [name]
    print_table(_COLUMNS, [_row(get_format(n)) for n in shown])


def _row(f: "Format") -> tuple[object, ...]:
    reals = (f.unit_roundoff, f.largest, f.smallest_normal, f.smallest_subnormal)
    u, *rest = (f"{value:.6g}" for value in reals)
    return (f.name, f.bits, f.exponent_bits, f.mantissa_bits, u, *rest, f.overflow)
