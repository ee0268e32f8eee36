from dataclasses import replace

import pytest

from halfulp import demo as demo_module
from halfulp.demo import RECIPES, config_of_demo, demo
from halfulp.errors import RunError
from halfulp.run import Run


@pytest.fixture
def _small(monkeypatch, corpus):
    """The quick demo in 12 steps on the corpus of these tests."""
    quick = config_of_demo(quick=True)
    small = replace(
        quick,
        data=replace(quick.data, source=(str(corpus),), length=32, val_fraction=0.1),
        train=replace(quick.train, steps=12, rows=2, eval_every=6, count_every=6, threads=1),
    )
    monkeypatch.setattr(demo_module, "config_of_demo", lambda *, quick: small)


@pytest.mark.usefixtures("_small")
def test_six_paired_runs_and_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun: list[str] = []
    first = demo(quick=True, on_run=lambda recipe, steps: begun.append(recipe))
    assert begun == list(RECIPES)
    assert str(first.path) == "runs/demo-001"
    assert [r.summary.reason for r in first.runs if r.summary] == ["finished"] * 6
    assert first.report is not None
    assert first.report.read_text().count("nvfp4_all") > 0
    losses = [next(Run.open(r.path, writer=False).events("step"))["loss_nats"] for r in first.runs]
    assert 0 < max(losses) - min(losses) < 0.05  # one model, one batch, six precisions
    monkeypatch.setattr(demo_module, "RECIPES", ("fp32",))
    assert str(demo(quick=True).path) == "runs/demo-002"
    with pytest.raises(RunError, match="is in use"):
        demo(first.path, quick=True)
    assert demo(first.path, quick=True, force=True).report == first.report


@pytest.mark.usefixtures("_small")
def test_a_run_that_breaks_down_is_a_result(tmp_path, monkeypatch):
    from halfulp.train import step

    loss = step.next_token_loss
    current = [""]

    def poisoned(model, batch_BT):
        value = loss(model, batch_BT)
        return value / 0.0 if current[0] == "te_current" else value

    monkeypatch.setattr(step, "next_token_loss", poisoned)
    result = demo(tmp_path / "demo", quick=True, on_run=lambda r, _: current.__setitem__(0, r))
    failed = {r.recipe: r.failure for r in result.runs if r.failure}
    assert list(failed) == ["te_current"]
    assert "the loss is not finite" in failed["te_current"]
    assert result.report is not None
    assert result.report.exists()
