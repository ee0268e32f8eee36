"""GPUs that can be rented: peak throughput, memory and list prices, from hardware.toml."""

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

from halfulp.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU: dense TFLOP/s by precision, memory in GB (1e9 bytes), dollars per GPU-hour."""

    key: str
    name: str
    architecture: str  # of halfulp/check/hardware.toml
    memory_gb: float
    peak_tflops: Mapping[str, float]
    source: str
    price_usd: tuple[float, float] | None = None  # cheapest and dearest listing
    price_source: str = ""
    price_date: str = ""

    @property
    def price_middle_usd(self) -> float:
        """The middle of the listed prices, in dollars per GPU-hour.

        Raises ConfigError where no price is listed.
        """
        if self.price_usd is None:
            raise ConfigError(
                f"no price is listed for {self.key}. Give yours in dollars per GPU-hour: --price."
            )
        return sum(self.price_usd) / 2

    def peak_flops(self, precision: str = "bf16") -> float:
        """Dense FLOP/s in `precision`.

        Raises ConfigError for one that the matrix units do not multiply.
        """
        if precision not in self.peak_tflops:
            known = ", ".join(self.peak_tflops)
            raise ConfigError(
                f"{self.name} does not multiply {precision}: its matrix units have {known}. "
                "Give one of those, or another GPU."
            )
        return self.peak_tflops[precision] * 1e12


def gpu_names() -> tuple[str, ...]:
    """The GPUs of the table."""
    return tuple(_table())


@cache
def load_gpu(name: str) -> Gpu:
    """The GPU `name`, in any spelling of case; ConfigError naming the nearest ones."""
    table, key = _table(), name.lower().strip()
    if key not in table:
        near = difflib.get_close_matches(key, table, n=3, cutoff=0.4) or list(table)
        raise ConfigError(
            f"GPU {name!r} is unknown. Nearest: {', '.join(near)}. "
            f"The table has {', '.join(table)}."
        )
    entry = dict(table[key])
    if "price_usd" in entry:
        low, high = entry.pop("price_usd")
        entry["price_usd"] = (low, high)
    return Gpu(key=key, **entry)


@cache
def _table() -> dict[str, dict]:
    file = resources.files("halfulp") / "hardware.toml"
    return tomllib.loads(file.read_text(encoding="utf-8"))
