"""What the processor multiplies decides the arithmetic of exact carriers, and is said."""

import pytest
import torch

from halfulp.numerics import cpu


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ({"avx512_bf16": True, "avx512_vnni": True}, "bf16, int8"),
        ({"amx_bf16": True, "avx512_vnni": False}, "bf16"),
        ({"avx512_vnni": True, "avx512_bf16": False}, "int8"),
        ({"avx2": True}, "none"),
    ],
)
def test_instructions_decide(capabilities, said, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    cpu.multiplies.cache_clear()
    try:
        assert cpu.narrow_gemms() == said
    finally:
        monkeypatch.undo()
        cpu.multiplies.cache_clear()
