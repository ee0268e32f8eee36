"""What truncation costs by its bias, and what the lost bits cost by themselves.

Truncation toward zero shrinks every operand: of a format with k mantissa bits by 0.72 · 2^−(k+1)
on average, where rounding to nearest leaves the mean alone. Where a sweep holds a truncating
recipe and the same recipe with rounding to nearest (mask_e8m2 and mask_e8m2_nearest), its gap to
the reference splits into the bias (truncate − nearest) and the resolution (nearest − reference).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from halfulp.sweep.interval import Interval


@dataclass(frozen=True, kw_only=True)
class Split:
    """The two parts of the gap of `truncate` in nats, paired by seed at the learning rate `lr`.

    `total` is the gap itself; the parts add up to it where all three have the same seeds.
    """

    data: str
    truncate: str
    nearest: str
    lr: float
    bias: Interval
    resolution: Interval
    total: Interval

    @property
    def bias_share(self) -> float | None:
        """Bias over the whole gap; None where the gap cannot be told from 0."""
        return self.bias.value / self.total.value if self.total.low > 0 else None


def rounding_pairs(recipes: Sequence[str]) -> list[tuple[str, str]]:
    """(truncating recipe, the same one with rounding to nearest) among shipped `recipes`."""
    from halfulp.recipe import recipe_to_table
    from halfulp.recipe_reader import is_shipped, load_recipe

    tables = {name: recipe_to_table(load_recipe(name)) for name in recipes if is_shipped(name)}
    rounded = {name: _to_nearest(table) for name, table in tables.items()}
    return [
        (a, b)
        for a in tables
        for b in tables
        if _numbers(rounded[a]) == _numbers(tables[b]) != _numbers(tables[a])
    ]


def _to_nearest(value: Any) -> Any:
    """`value` with ":truncate" taken out of every quantizer: the canonical spelling of nearest."""
    if isinstance(value, dict):
        return {key: _to_nearest(item) for key, item in value.items()}
    return value.replace(":truncate", "") if isinstance(value, str) else value


def _numbers(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in ("summary", "source")}
