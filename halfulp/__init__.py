"""halfulp: how low can you go? Low-precision training with every error sized, placed and priced."""

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "AdamW": "halfulp.optim",
    "BlockwiseSchedule": "halfulp.optim.blockwise",
    "Budget": "halfulp.guard.budget",
    "Guard": "halfulp.guard.loop",
    "HalfulpError": "halfulp.errors",
    "Key": "halfulp.numerics.random",
    "Policy": "halfulp.policy",
    "Quantized": "halfulp.quantization",
    "SharpnessMonitor": "halfulp.sharpness.noise",
    "apply_quantizer": "halfulp.numerics.apply",
    "block_map": "halfulp.blocks",
    "blockwise_param_groups": "halfulp.optim.blockwise",
    "get_format": "halfulp.numerics.format",
    "load_recipe": "halfulp.policy",
    "param_groups": "halfulp.optim",
    "parse_quantizer": "halfulp.numerics.quantizer",
    "quantize": "halfulp.quantization",
    "round_to": "halfulp.numerics.rounding",
    "unquantize": "halfulp.quantization",
    "write_report": "halfulp.report",
}


_ROOMS = ("check", "plan", "sharpness", "sweep")  # packages that can be called


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"halfulp.{name}")
    if name not in _EXPORTS:
        raise AttributeError(f"module 'halfulp' has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*_EXPORTS, *_ROOMS, "__version__"])
