"""The parts of reproduce/ that take no training, and the rule behind its verdicts."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from halfulp.policy import Policy
from halfulp.quantization import resolve
from halfulp.train.config import ModelConfig
from halfulp.train.model import build_model
from reproduce import __main__, bit_reduction, results, stochastic_rounding
from reproduce.common import (
    REFUTED,
    REPRODUCED,
    UNKNOWN,
    Interval,
    Result,
    interval,
    judge,
    judge_scores,
    judge_share,
    together,
)
from reproduce.runs import LENGTH, PRESET, Job, policy


@pytest.mark.parametrize("script", __main__.SCRIPTS, ids=lambda script: script.__name__)
def test_analytic_claims_are_reproduced(script):
    for result in script.quick():
        assert result.verdict == REPRODUCED, result


def test_biased_rounding_would_be_seen():
    for rounding in ("nearest", "truncate"):
        scores = stochastic_rounding.draw("bf16", rounding).scores
        assert judge_scores(scores)[2] == REFUTED
    biased = bit_reduction.mean_relative_error(3, "truncate")
    assert judge(biased, above=-1e-3, below=1e-3) == REFUTED


def test_verdict_needs_the_whole_interval_on_one_side():
    assert judge(Interval(0.5, 0.4, 0.6, 3), above=0.3) == REPRODUCED
    assert judge(Interval(0.5, 0.4, 0.6, 3), above=0.5) == UNKNOWN
    assert judge(Interval(0.5, 0.4, 0.6, 3), above=0.7) == REFUTED
    assert judge(Interval(0.5, 0.4, 0.6, 3), above=0.0, below=0.3) == REFUTED
    assert together(REPRODUCED, UNKNOWN) == UNKNOWN
    assert together(REFUTED, UNKNOWN, REPRODUCED) == REFUTED


def test_interval_is_that_of_student():
    x = interval([1.0, 2.0, 3.0])
    assert (x.mean, x.n) == (2.0, 3)
    assert x.high - x.mean == pytest.approx(4.303 / 3**0.5)


def test_share_of_nothing_cannot_be_told():
    assert judge_share([0.9, 0.8, 0.85], [1.0, 1.0, 1.0], 0.6)[1] == REPRODUCED
    assert judge_share([0.1, 0.2, 0.15], [1.0, 1.0, 1.0], 0.6)[1] == REFUTED
    assert judge_share([0.9, 0.8, 0.85], [1.0, -1.0, 0.1], 0.6)[1] == UNKNOWN


def jobs() -> list[Job]:
    return [
        *bit_reduction.masked("mask_e5m7", [0], tokens=bit_reduction.LARGE),
        *bit_reduction.masked("mask_e8m1_nearest", [0], head=False),
        *bit_reduction.reference([0]),
        Job("scaled", policy("fp32", head=True, lines=bit_reduction.CURRENT), 0, 1e-3),
        Job("up", policy("mx_ocp", lines=bit_reduction.MX_ROUND_UP), 0, 1e-3),
    ]


@pytest.mark.parametrize("job", jobs(), ids=lambda job: job.label)
def test_policies_resolve_and_reach_the_head_where_they_say(job, tmp_path):
    path = tmp_path / "policy.toml"
    path.write_text(job.policy, encoding="utf-8")
    model = build_model(ModelConfig(preset=PRESET), vocab=257, length=LENGTH, seed=0).model
    resolution = resolve(model, Policy.load(path))
    specs = {decision.gemm.role: decision.spec for decision in resolution.gemms}
    same = specs["head"] == specs["linear"]
    assert same == (job.label not in ("mask_e8m1_nearest, head fp32",))
    scale = resolution.recipes[0].loss_scale
    assert (scale.init if scale else None) == (2.0**-10 if "2^19" in job.label else None)


def test_page_holds_claim_measured_verdict_and_seconds():
    result = Result("a | b", "here", "+1.0", UNKNOWN)
    page = results.render([results.Section(bit_reduction, [(result, 3.2)])])
    assert "| a \\| b | here | +1.0 | **could not tell** | 3 |" in page
    assert "1 claims: 0 reproduced, 0 not reproduced, 1 could not tell." in page
    assert "python -m reproduce.bit_reduction" in page


def test_a_script_measured_again_replaces_its_own_section_only():
    def section(script, verdict):
        return results.Section(script, [(Result("a claim", "here", "1", verdict), 1.0)])

    page = results.render([section(bit_reduction, UNKNOWN), section(stochastic_rounding, REFUTED)])
    again = results.render([section(bit_reduction, REPRODUCED)], page)
    assert "2 claims: 1 reproduced, 1 not reproduced, 0 could not tell." in again
    assert again.count("python -m reproduce.bit_reduction") == 1
    assert results.render([], again) == again


def test_an_unknown_script_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        __main__._chosen(["roundof"])
    assert end.value.code == 2
    assert "roundoff" in capsys.readouterr().err


def test_a_benchmark_measured_again_replaces_its_own_section_only():
    from benchmarks.__main__ import FOLDER, merged

    page = (FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    assert merged(page, {}) == page
    again = merged(
        page, {"optimizer": "## Optimizer\n\nnothing\n\n`python benchmarks/optimizer.py`"}
    )
    assert len(again) < len(page)
    assert again.index("## Rounding") < again.index("nothing") < again.index("Training")


def test_the_gpu_benchmark_runs_only_where_it_is_named(monkeypatch):
    """Without a CUDA device it ends with code 2 and leaves the page alone."""
    from benchmarks import __main__ as benchmarks

    assert "gpu" in benchmarks.SCRIPTS
    assert "gpu" not in benchmarks.ANYWHERE
    page = (benchmarks.FOLDER / "RESULTS.md").read_text(encoding="utf-8")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("sys.argv", ["benchmarks", "gpu"])
    with pytest.raises(SystemExit) as end:
        benchmarks.main()
    assert end.value.code == 2
    assert (benchmarks.FOLDER / "RESULTS.md").read_text(encoding="utf-8") == page
