from pathlib import Path

import pytest
import sweeps


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of small texts."""
    return sweeps.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture(scope="session")
def whole(corpus, tmp_path_factory):
    """A sweep that nothing disturbed, in this process; its directory is not to be changed."""
    from halfulp.sweep.run import run_design

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
        return run_design(sweeps.design_of(corpus), tmp_path_factory.mktemp("whole") / "sweep")


@pytest.fixture
def serially(monkeypatch) -> None:
    """Runs of a sweep take place in this process, one after another."""
    monkeypatch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
