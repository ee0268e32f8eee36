from pathlib import Path

import pytest
import sweeps


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of small texts."""
    return sweeps.write_corpus(tmp_path_factory.mktemp("data") / "corpus")


@pytest.fixture
def serially(monkeypatch) -> None:
    """Runs of a sweep take place in this process, one after another."""
    monkeypatch.setattr("halfulp.sweep.run.run_tasks", sweeps.serially)
