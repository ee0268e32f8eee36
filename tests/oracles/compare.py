"""Comparison bit by bit, and the choice of the kernel under test."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from torch import Tensor

from halfulp.numerics import kernel

Array = Tensor | np.ndarray


def fp32(x: Array) -> np.ndarray:
    """`x` as a flat fp32 array; float64 values must be fp32 numbers already."""
    x = x.detach().float().numpy() if isinstance(x, Tensor) else x
    with np.errstate(all="ignore"):
        return np.ascontiguousarray(x, np.float32).reshape(-1)


def assert_same(actual: Array, expected: Array, inputs: Array | None = None) -> None:
    """Equal bit by bit, the sign of zero included; any NaN equals any NaN."""
    a, b = fp32(actual), fp32(expected)
    assert a.shape == b.shape
    differ = (a.view(np.uint32) != b.view(np.uint32)) & ~(np.isnan(a) & np.isnan(b))
    if differ.any():
        i = int(differ.argmax())
        source = "" if inputs is None else f" of {fp32(inputs).view(np.uint32)[i]:08x}"
        raise AssertionError(
            f"{differ.sum()} of {len(a)} differ; first at {i}{source}: {a[i]!r}, expected {b[i]!r}"
        )


@contextmanager
def on_kernel(name: str) -> Iterator[None]:
    """Run the body with HALFULP_KERNEL=`name`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HALFULP_KERNEL", name)
        kernel.status.cache_clear()
        try:
            yield
        finally:
            kernel.status.cache_clear()
