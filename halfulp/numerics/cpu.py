"""Which narrow numbers this machine's CPU multiplies faster than fp32.

Without instructions of its own torch multiplies bf16 and int8 matrices 10 to 20 times slower than
fp32 ones (benchmarks/training.py on a processor with AVX2 only).
"""

from functools import cache

import torch

_INSTRUCTIONS = {
    "bf16": ("avx512_bf16", "amx_bf16"),
    "int8": ("avx512_vnni", "amx_int8"),
}


@cache
def multiplies(name: str) -> bool:
    """Whether the CPU has instructions for GEMMs of "bf16" or "int8"."""
    found = torch.cpu.get_capabilities()
    return any(found.get(instruction, False) for instruction in _INSTRUCTIONS[name])


def narrow_gemms() -> str:
    """What the CPU multiplies faster than fp32; exact carriers use fp32 GEMMs for the rest."""
    names = [name for name in _INSTRUCTIONS if multiplies(name)]
    return ", ".join(names) or "none"
