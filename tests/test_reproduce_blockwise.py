"""Sharpness and blockwise learning rates in reproduce/: the models, the courses, the pure parts."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from halfulp.pieces import pieces
from reproduce import blockwise_lr, courses, models, sharpness
from reproduce.common import REFUTED, REPRODUCED, UNKNOWN


def found(**values: float) -> courses.Measured:
    return courses.Measured(values, dict.fromkeys(values, 0.01), "uniform")


ORDERED = found(emb=1.0, qk=2.0, ffn=3.0, vo=4.0, norm=5.0)
LATE = found(emb=1.0, qk=2.0, ffn=3.0, vo=4.0, norm=3.5)


@pytest.mark.parametrize("style", models.STYLES)
def test_decoders_lie_in_the_blocks_of_the_paper_and_see_no_future(style):
    model = models.build(style, 50, 0)
    kinds = {piece.kind for piece in pieces(model)}
    own = {"gpt2": "pos", "llama": "head"}[style]
    assert kinds == {"emb", "qk", "vo", "ffn", "norm", own}
    ids = torch.arange(2 * models.LENGTH).view(2, -1) % 50
    logits = model(ids)
    ids[:, 40:] = 7
    assert torch.equal(model(ids)[:, :40], logits[:, :40])
    assert not torch.equal(model(ids)[:, 40:], logits[:, 40:])
    assert torch.equal(models.build(style, 50, 0)(ids), model(ids))


def test_rotary_scores_depend_on_the_distance():
    angles = models.rotary_angles()
    one = torch.randn(angles.shape[1], generator=torch.Generator().manual_seed(0))
    x = models.rotated(one.expand_as(angles), angles.cos(), angles.sin())
    scores = x @ x.T
    assert torch.allclose(scores.diagonal(3)[:-1], scores.diagonal(3)[1:], atol=1e-4)
    assert not torch.allclose(scores.diagonal(3)[:1], scores.diagonal(9)[:1], atol=1e-2)


def test_order_emerges_where_it_stays():
    assert sharpness.emergence({0: ORDERED, 1: LATE, 2: ORDERED, 3: ORDERED}) == 2
    assert sharpness.emergence({0: ORDERED, 1: ORDERED}) == 0
    assert sharpness.emergence({0: ORDERED, 1: LATE}) == float("inf")


def test_order_of_the_seeds_decides_the_verdict():
    def seeds(*norms: float) -> list[sharpness.Found]:
        return [{0: found(vo=1.0, norm=norm)} for norm in norms]

    assert sharpness._ordered(seeds(2.0, 2.1, 2.2), [("vo", "norm")], 0)[1] == REPRODUCED
    assert sharpness._ordered(seeds(0.5, 0.45, 0.4), [("vo", "norm")], 0)[1] == REFUTED
    assert sharpness._ordered(seeds(0.5, 1.0, 2.0), [("vo", "norm")], 0)[1] == UNKNOWN


def test_published_ratios_follow_from_the_published_sharpness():
    assert sharpness._published_claim().verdict == REPRODUCED
    power = 2 / 3
    inverse = {kind: ratio ** (-1 / power) for kind, ratio in sharpness.PUBLISHED.items()}
    assert sharpness.fitted_power({**inverse, "norm": 1.0}) == pytest.approx(power)


def test_speed_up_counts_steps():
    assert blockwise_lr.complete_speedup(3.0, 3.0, 2.8) == 1.0
    assert blockwise_lr.complete_speedup(2.8, 3.0, 2.8) == 2.0
    assert blockwise_lr.complete_speedup(3.1, 3.0, 2.8) < 1.0
    curve = {300: 4.0, 500: 3.0, 600: 2.0}
    assert blockwise_lr.steps_to(curve, 2.5) == 550
    assert blockwise_lr.steps_to(curve, 5.0) == 300
    assert blockwise_lr.steps_to(curve, 1.0) == 600


def test_grid_goes_on_at_its_edge_until_it_is_full():
    assert blockwise_lr.extended([1.0, 2.0, 4.0], 1) == [1.0, 2.0, 4.0]
    assert blockwise_lr.extended([1.0, 2.0, 4.0], 0) == [0.5, 1.0, 2.0, 4.0]
    assert blockwise_lr.extended([1.0, 2.0, 4.0], 2) == [1.0, 2.0, 4.0, 8.0]
    assert blockwise_lr.extended([1.0, 2.0, 4.0, 8.0, 16.0], 4) == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_course_trains_measures_and_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(courses, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(courses, "EVALUATION", 1)
    threads = torch.get_num_threads()
    course = courses.Course(
        "short", 0, 600, 3e-3, vocab=courses.BYTES, ratios="paper", until=12,
        evaluated=(0,), measured=((0, 2), (12, 2)),
    )  # fmt: skip
    try:
        first = courses.outcome(course)
    finally:
        torch.set_num_threads(threads)
    assert first.losses[12] < first.losses[0] - 0.1
    assert 5.0 < first.losses[0] < 5.7  # of 5.55 by chance; a tied head favors repetition
    assert first.measured[0].sharpness != first.measured[12].sharpness
    monkeypatch.setattr(courses, "train", None)
    assert courses.outcome(course) == first
