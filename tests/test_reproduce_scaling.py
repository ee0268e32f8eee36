"""The parts of reproduce/scaling.py that take no training and no corpus."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from halfulp.plan.runs_table import Runs
from reproduce import isoflop, local_text, published_laws, scaling
from reproduce.common import REFUTED, REPRODUCED

REFUTED_CLAIMS = ("whatever law", "by the rounded coefficients")


def test_published_laws_give_what_the_papers_print():
    for result in published_laws.published():
        known = any(words in result.claim for words in REFUTED_CLAIMS)
        assert result.verdict == (REFUTED if known else REPRODUCED), result


def test_the_set_spends_its_budgets_and_reads_less_than_an_epoch():
    for point in [*isoflop.fitted(), *isoflop.held_out(), *isoflop.shallow()]:
        config = isoflop.config_of(point)
        tokens = config["train"]["steps"] * isoflop.TOKENS
        spent = 6 * isoflop.parameters(point.hidden, point.layers) * tokens
        assert spent == pytest.approx(point.flops, rel=1e-3)
        assert 4e5 < tokens < 1.1e7


def test_the_held_out_runs_are_larger_in_compute_and_in_size():
    small, large = isoflop.fitted(), isoflop.held_out()
    assert min(p.flops for p in large) >= 5 * max(p.flops for p in small)
    sizes = [isoflop.parameters(p.hidden, p.layers) for p in small]
    assert all(isoflop.parameters(p.hidden, p.layers) > max(sizes) for p in large)
    assert len({isoflop.run_directory(p) for p in [*small, *large]}) == len(small) + len(large)


def test_runs_of_one_place_are_found_together():
    runs = Runs(
        parameters=np.array([1.0, 2.0, 1.0]), tokens=np.array([5.0, 5.0, 5.0]),
        loss_nats=np.ones(3),
    )  # fmt: skip
    first, second = scaling._by_place(runs)
    assert (first.tolist(), second.tolist()) == ([True, False, True], [False, True, False])


def test_the_corpus_is_of_different_files_in_an_order_that_says_nothing():
    files = local_text.python_files(3_000_000)
    contents = {f.path.read_bytes() for f in files}
    assert len(contents) == len(files) > 20
    assert 2_000_000 < sum(map(len, contents)) <= 3_000_000
    names = [f.path.as_posix() for f in files]
    assert names != sorted(names)
