import pytest
import synthetic


@pytest.fixture(scope="session")
def six(tmp_path_factory):
    return synthetic.six_runs(tmp_path_factory.mktemp("runs"))
