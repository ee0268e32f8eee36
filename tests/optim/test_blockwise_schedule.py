import math

import pytest
import torch
from torch import nn

from halfulp import BlockwiseSchedule
from halfulp.errors import ConfigError

RATIOS = {"norm": 1.0, "vo": 4.0, "ffn": 6.0, "qk": 8.0, "emb": 10.0}


def optimizer(base: float = 6e-4, ratios=RATIOS) -> torch.optim.Optimizer:
    groups = [
        {"params": [nn.Parameter(torch.zeros(1))], "lr": base * r, "name": kind, "lr_ratio": r}
        for kind, r in ratios.items()
    ]
    return torch.optim.SGD(groups)


def official_cosine(step, base, ratio, warmup, total, floor, stretch):
    """Rise and fall with the ratio in the peak and, where stretched, in the warm-up."""
    peak, rise = base * ratio, warmup * (ratio if stretch else 1)
    if step <= rise:
        return peak * step / rise
    return floor + (1 + math.cos(math.pi * (step - rise) / (total - rise))) / 2 * (peak - floor)


def official_wsd(step, base, ratio, warmup, total, floor):
    """Thirds: at the peak, from the peak to the base rate, from the base rate to the floor."""
    first, second = int(total / 3), int(total * 2 / 3)
    if step <= warmup * ratio:
        return base * ratio * step / (warmup * ratio)
    if step <= first:
        return base * ratio
    if step <= second:
        return base * ratio - base * (ratio - 1) * (step - first) / (second - first)
    return base - (base - floor) * (step - second) / (total - second)


def run(schedule, opt, steps):
    for step in range(steps + 1):
        yield step, {g["name"]: g["lr"] for g in opt.param_groups}
        opt.step()
        schedule.step()


@pytest.mark.parametrize("stretch", [True, False])
def test_cosine_is_the_official_formula(stretch):
    opt = optimizer()
    schedule = BlockwiseSchedule(opt, 1000, 20, stretch_warmup=stretch)
    for step, lrs in run(schedule, opt, 1000):
        for kind, lr in lrs.items():
            wanted = official_cosine(step, 6e-4, RATIOS[kind], 20, 1000, 6e-4 / 20, stretch)
            assert lr == pytest.approx(wanted, rel=1e-12, abs=1e-18)
    assert len(set(lrs.values())) == 1
    assert lrs["emb"] == pytest.approx(3e-5, rel=1e-12)


def test_wsd_is_the_official_formula():
    opt = optimizer()
    schedule = BlockwiseSchedule(opt, 1000, 20, kind="wsd", min_lr=0.1)
    for step, lrs in run(schedule, opt, 1000):
        for kind, lr in lrs.items():
            wanted = official_wsd(step, 6e-4, RATIOS[kind], 20, 1000, 6e-5)
            assert lr == pytest.approx(wanted, rel=1e-12, abs=1e-18)
        if step >= 666:
            assert max(lrs.values()) == pytest.approx(min(lrs.values()), rel=1e-12)


def test_a_scaled_floor_keeps_the_ratios_and_a_constant_schedule_its_peak():
    opt = optimizer()
    *_, (_, lrs) = run(BlockwiseSchedule(opt, 100, 2, floor="scaled"), opt, 100)
    assert lrs["emb"] == pytest.approx(10 * lrs["norm"])
    assert lrs["norm"] == pytest.approx(3e-5)
    opt = optimizer()
    *_, (_, lrs) = run(BlockwiseSchedule(opt, 100, 2, kind="constant"), opt, 100)
    assert lrs == {kind: pytest.approx(6e-4 * r) for kind, r in RATIOS.items()}


def test_a_schedule_goes_on_from_its_state():
    opt, other = optimizer(), optimizer()
    whole, half = (BlockwiseSchedule(o, 100, 2) for o in (opt, other))
    rates = [lrs for _, lrs in run(whole, opt, 99)]
    list(run(half, other, 49))
    again = optimizer()
    again.load_state_dict(other.state_dict())
    resumed = BlockwiseSchedule(again, 100, 2)
    resumed.load_state_dict(half.state_dict())
    for group, lr in zip(again.param_groups, resumed.get_last_lr(), strict=True):
        group["lr"] = lr
    assert [lrs for _, lrs in run(resumed, again, 49)] == rates[50:]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"kind": "cosin"}, "cosine"),
        ({"floor": "share"}, "shared"),
        ({"warmup": 11}, "the warm-up of emb takes 110 steps"),
        ({"warmup": 4, "kind": "wsd"}, "the warm-up of emb takes 40 steps"),
        ({"warmup": 100, "stretch_warmup": False}, "shorter than the run"),
        ({"min_lr": 2.0}, "min_lr = 2"),
        ({"anneal": (0.7, 0.6)}, "anneal"),
    ],
)
def test_options_that_cannot_be_used(options, told):
    with pytest.raises(ConfigError, match=told):
        BlockwiseSchedule(optimizer(), 100, **({"warmup": 2} | options))


def test_an_optimizer_that_ignores_groups_is_refused():
    class Flat(torch.optim.SGD):
        """Flattens what it is given into one group."""

        def __init__(self, params):
            super().__init__([p for group in params for p in group["params"]], lr=0.1)

    flat = Flat(optimizer().param_groups)
    with pytest.raises(ConfigError, match=r"group 0 of Flat has no 'lr_ratio'.*one rate"):
        BlockwiseSchedule(flat, 100, 2)


def test_rates_that_do_not_fit_their_ratios_are_refused():
    opt = optimizer()
    opt.param_groups[2]["lr"] *= 2
    with pytest.raises(ConfigError, match=r"is 0\.0006 for norm and 0\.0012 for ffn"):
        BlockwiseSchedule(opt, 100, 2)
