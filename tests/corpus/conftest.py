from collections.abc import Iterator

import pytest

from halfulp.corpus import native


@pytest.fixture(params=["c", "torch"])
def counting_kernel(request: pytest.FixtureRequest, monkeypatch) -> Iterator[str]:
    """Runs the test once with the C kernel and once with NumPy, the definition."""
    monkeypatch.setenv("HALFULP_KERNEL", request.param)
    native.status.cache_clear()
    yield request.param
    native.status.cache_clear()
