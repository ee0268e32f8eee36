"""Which formats a machine multiplies: the table of hardware.toml."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from halfulp.errors import ConfigError
from halfulp.formats import format_quantizer
from halfulp.numerics.quantizer import Quantizer


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A machine and the pairs of operand classes that its matrix units multiply."""

    name: str
    summary: str
    source: str
    products: frozenset[tuple[str, str]]  # sorted pairs; ("*", "*"): all
    reasons: Mapping[str, str] = field(default_factory=dict)

    def multiplies(self, x: Quantizer, w: Quantizer) -> bool:
        """Whether a GEMM with these operands runs without conversion."""
        pair = tuple(sorted((hardware_class(x), hardware_class(w))))
        return ("*", "*") in self.products or pair in self.products

    def refuses(self, word: str) -> str:
        """Why a GEMM cannot have both operands in the format `word`; "" if it can."""
        q = format_quantizer(word)
        if self.multiplies(q, q):
            return ""
        kind = hardware_class(q)
        if kind in self.reasons:
            return f"{self.name}: {self.reasons[kind]}"
        others = sorted({o for pair in self.products if kind in pair for o in pair} - {kind})
        if others:
            return f"{self.name} multiplies {kind} only with {', '.join(others)}"
        return f"{self.name} has no {kind} products"


def hardware_class(q: Quantizer) -> str:
    """What matrix units call a quantizer: bf16, e4m3, mx-e4m3, nvfp4, …; fp32 for no rounding."""
    if q.scale == "nvfp4":
        return "nvfp4"
    if q.scale.startswith("e8m0"):
        return f"mx-{q.format}" if q.granularity == "1x32" else f"{q.format}@{q.granularity}:e8m0"
    return str(q.format)


def hardware_names() -> tuple[str, ...]:
    """The machines of the table."""
    return tuple(_table())


@cache
def load_hardware(name: str) -> Hardware:
    """The machine `name`, also by the names of its chips ("h100").

    Raises ConfigError naming the nearest ones.
    """
    table = _table()
    known = {also: key for key, entry in table.items() for also in (key, *entry.get("also", ()))}
    key = known.get(name.lower().replace("-", "_").replace(" ", "_"))
    if key is None:
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4) or list(table)
        raise ConfigError(
            f"hardware {name!r} is unknown. Nearest: {', '.join(near)}. "
            f"The table has {', '.join(table)}; 'any' allows every format."
        )
    entry = table[key]
    pairs = (product.split(" x ") for product in entry["products"])
    return Hardware(
        name=key,
        summary=entry["summary"],
        source=entry["source"],
        products=frozenset((min(pair), max(pair)) for pair in pairs),
        reasons=entry.get("refuses", {}),
    )


@cache
def _table() -> dict[str, dict]:
    file = resources.files("halfulp.check") / "hardware.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
