"""`apply_quantizer` as one node of a traced graph on the CPU.

torch.compile sees `halfulp::quantize` as opaque, so compiled and eager graphs run the same kernel:
same bits, short compile times, and no dependence on how Inductor splits loops over tiles. Graphs on
other devices trace the torch definition instead and fuse it with its neighbors.
"""

import torch
from torch import Tensor

from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.random import Key

_LIBRARY = torch.library.Library("halfulp", "FRAGMENT")
_LIBRARY.define("quantize(Tensor x, str quantizer, Tensor? key, Tensor? scale) -> Tensor")


def _quantize(x: Tensor, quantizer: str, key: Tensor | None, scale: Tensor | None) -> Tensor:
    from halfulp.numerics.apply import apply_quantizer

    numbers = None if key is None else Key(*(word & 0xFFFFFFFF for word in key.tolist()))
    return apply_quantizer(x, parse_quantizer(quantizer), key=numbers, scale=scale)


def _fake(x: Tensor, quantizer: str, key: Tensor | None, scale: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_LIBRARY.impl("quantize", _quantize, "CPU")
torch.library.register_fake("halfulp::quantize", _fake)
