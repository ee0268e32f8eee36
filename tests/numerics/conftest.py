import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `oracles`

from oracles.compare import on_kernel


@pytest.fixture(params=["c", "torch"])
def kernel_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the C kernel and once on the torch definition."""
    with on_kernel(request.param):
        yield request.param


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tensors are small here: a second thread would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
