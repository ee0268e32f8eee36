"""The C kernel bound to one quantizer: all that can be decided before a call is decided once.

Between two GEMMs little of the interpreter stays in the processor's caches, and a line of Python
costs several times what it does in a loop: this path is short on purpose.
"""

from collections.abc import Callable
from functools import cache

from torch import Tensor

from halfulp.numerics import kernel
from halfulp.numerics.quantizer import Quantizer

Launch = Callable[[Tensor, Tensor, int, int], None]


@cache
def launcher(q: Quantizer) -> Launch:
    """Writes `x` as `q` has it to `y`, given x, y and the two words of the key.

    Both are contiguous fp32 CPU tensors of fewer than 2^31 elements, and `kernel.status()` has the
    C library. Only for `q.is_one_pass`.
    """
    status = kernel.status()
    assert status.library is not None
    rule = "p2" if q.power_of_two else q.scale
    saturate = q.saturate or q.scale != "none"
    plan = kernel.plan(q.format, q.rounding, saturate, rule, q.margin, q.tile)
    if q.granularity == "tensor":
        return _flat(status.library.halfulp_tensor, status.parallel, plan, (0,))
    if q.granularity == "element":
        return _flat(status.library.halfulp_round, status.parallel, plan, (0, None))
    return _matrix(status.library.halfulp_tiles, status.parallel, plan)


def _flat(function: Callable, parallel: object, plan: object, rest: tuple) -> Launch:
    def launch(x: Tensor, y: Tensor, k0: int, k1: int) -> None:
        function(parallel, x.data_ptr(), y.data_ptr(), x.numel(), plan, k0, k1, *rest)

    return launch


def _matrix(function: Callable, parallel: object, plan: object) -> Launch:
    def launch(x: Tensor, y: Tensor, k0: int, k1: int) -> None:
        columns = x.shape[-1]
        rows = x.numel() // columns
        function(parallel, x.data_ptr(), y.data_ptr(), rows, columns, plan, k0, k1, 0)

    return launch
