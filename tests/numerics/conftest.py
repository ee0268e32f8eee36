import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `oracles`

from oracles.compare import on_kernel  # noqa: E402


@pytest.fixture(params=["c", "torch"])
def kernel_name(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on the C kernel and once on the torch definition."""
    with on_kernel(request.param):
        yield request.param
