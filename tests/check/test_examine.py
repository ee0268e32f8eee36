"""The whole check on trained toys, plain modules and models that cannot be judged."""

import json
import math
import tomllib

import pytest
import torch
from torch import nn

import halfulp
from halfulp.check.report import grade
from halfulp.errors import CheckError, ConfigError, FormatError
from halfulp.policy import Policy
from tests.check.toys import trained as toy

FORMATS = ("bf16", "e4m3", "e2m1")


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def report(request):
    t = toy(request.param)
    before = {n: p.clone() for n, p in t.model.named_parameters()}
    made = halfulp.check(
        t.model, t.batch(4), held_out=t.batch(4, index=1), formats=FORMATS, target="bf16", lr=1e-4
    )
    assert all(torch.equal(before[n], p) for n, p in t.model.named_parameters())
    assert not t.model.training
    return made


def test_predictions_meet_measurements(report):
    """The self-test of the product: predicted over measured near 1, and neither of them zero."""
    assert 0.5 < report.asked.ratio < 2
    for row in report.uniform + report.operands:
        assert row.measured_kl > 0
        assert row.why or 0.5 < row.ratio < 2


def test_formats_are_ordered_by_what_they_cost(report):
    for rows in (report.uniform, report.operands):
        kls = [row.measured_kl for row in rows]
        assert kls == sorted(kls)
        assert kls[-1] > 50 * kls[0]
    assert all(
        o.measured_kl < u.measured_kl for o, u in zip(report.operands, report.uniform, strict=True)
    )


def test_the_verdict_is_the_measured_one(report):
    assert (report.verdict.status, report.exit_code) == ("pass", 0)
    assert f"{report.asked.measured_kl:.2g}" in report.verdict.sentence


def test_the_plan_fits_where_it_was_measured_and_trains(report):
    plan = report.plan
    assert plan.measured_kl <= report.budget
    assert plan.held_out_kl < 3 * report.budget
    assert 4 < plan.average_bits < 32
    assert set(plan.formats.values()) <= {*FORMATS, "fp32"}
    policy = Policy.from_table(tomllib.loads(plan.policy))
    model = toy("gpt2").model if "GPT2" in report.model else toy("llama").model
    halfulp.quantize(model, policy)
    halfulp.unquantize(model)


def test_sites_are_ranked_and_explained(report):
    kls = [site.kl for site in report.sites]
    assert kls == sorted(kls, reverse=True)
    assert all(site.reason for site in report.sites)
    detail = report.site(report.sites[0].name)
    assert detail.kl[report.focus] == report.sites[0].kl
    with pytest.raises(ConfigError, match="Nearest"):
        report.site("nonsense")


def test_the_heat_map_adds_up_to_the_uniform_prediction(report):
    for row in report.uniform:
        total = math.fsum(cells[row.name] for cells in report.heat.values())
        assert row.why or total == pytest.approx(row.predicted_kl, rel=1e-6)


def test_training_is_priced_too(report):
    assert {row.which for row in report.backward} == {"dgrad", "wgrad"}
    whole = report.updates.weight("all", "bf16")
    assert 0.01 < whole.lost_updates < 1
    assert whole.lost_decay > 0.9


def test_json_has_the_agreed_keys_and_no_nan(report):
    content = json.loads(report.to_json())
    assert content["schema"] == 1
    for word in FORMATS:
        assert {"predicted_kl", "measured_kl", "ratio"} <= content["uniform"][word].keys()
    assert content["asked"]["measured_kl"] == report.asked.measured_kl
    assert content["plan"]["policy"] == report.plan.policy


def test_the_same_seed_gives_the_same_report():
    t = toy("llama")
    first, second = (
        halfulp.check(t.model, t.batch(2), formats=("bf16",), profile=False) for _ in range(2)
    )
    assert first.uniform == second.uniform
    assert first.sites == second.sites


def test_a_target_over_the_budget_fails():
    t = toy("llama")
    made = halfulp.check(
        t.model, t.batch(2), formats=("bf16",), target="te_current", budget=1e-7, profile=False
    )
    assert (made.verdict.status, made.exit_code) == ("fail", 2)
    assert any("short accumulators" in note for note in made.notes)


def test_a_recipe_without_short_accumulators_is_predicted():
    t = toy("llama")
    made = halfulp.check(t.model, t.batch(4), formats=("bf16",), target="mxfp8", profile=False)
    assert not made.asked.why
    assert 0.5 < made.asked.ratio < 2


class Plain(nn.Module):
    """A model that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 16)
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        self.head = nn.Linear(16, 50)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


HINTS = {"embed.*": "emb", "up.*": "ffn", "down.*": "ffn", "head.*": "head"}
IDS = torch.randint(0, 50, (4, 64), generator=torch.Generator().manual_seed(1))


def test_any_module_that_returns_logits():
    made = halfulp.check(Plain(), IDS, formats=FORMATS, hints=HINTS, profile=False)
    assert 0.5 < made.row("bf16").ratio < 2
    assert made.plan.measured_kl <= made.budget


def test_half_precision_is_judged_against_its_fp32_copy():
    model = Plain().to(torch.bfloat16)
    made = halfulp.check(model, IDS, formats=("bf16", "e4m3"), hints=HINTS, profile=False)
    assert model.up.weight.dtype is torch.bfloat16
    assert any("fp32 copy" in note for note in made.notes)
    assert made.site("weight:up.weight").kl["bf16"] == 0
    assert made.site("weight:up.weight").kl["e4m3"] > 0


class Noisy(Plain):
    def forward(self, ids):
        return super().forward(ids) + 0.01 * torch.randn(50)


def test_a_reference_that_is_not_reproducible_cannot_be_judged():
    with pytest.raises(CheckError, match="differ"):
        halfulp.check(Noisy(), IDS, formats=("bf16",), hints=HINTS, profile=False)


def test_an_unknown_format_is_answered_before_anything_runs():
    said: list[str] = []
    with pytest.raises(FormatError, match="e4m3, e5m2"):
        halfulp.check(Plain(), IDS, hints=HINTS, formats=("bf16", "fp8"), progress=said.append)
    assert said == []


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"budget": -1.0}, ConfigError, "budget"),
        ({"formats": ("bf17",)}, FormatError, "Nearest"),
        ({"target": "te_curent"}, ConfigError, "te_current"),
        ({"hardware": "hoper"}, ConfigError, "hopper"),
        ({"pins": {"zzz": "free"}}, ConfigError, "matches no group"),
    ],
)
def test_wrong_options_are_answered(options, error, said):
    with pytest.raises(error, match=said):
        halfulp.check(Plain(), IDS, hints=HINTS, profile=False, **{"formats": ("bf16",)} | options)


def test_grades():
    words = [grade(kl) for kl in (1e-7, 1e-5, 5e-4, 5e-3, 3e-2, 1.0, math.inf)]
    assert words == ["exact", "negligible", "small", "visible", "large", "broken", "broken"]


def test_less_text_when_memory_runs_out(monkeypatch):
    from halfulp.check import examine

    tried, price = [], examine.price

    def short_of_memory(model, batch, **options):
        tried.append(len(batch))
        if len(batch) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return price(model, batch, **options)

    monkeypatch.setattr(examine, "price", short_of_memory)
    made = halfulp.check(Plain(), IDS, formats=("bf16",), hints=HINTS, profile=False)
    assert tried == [4, 2, 1]
    assert made.tokens == 64
    assert "only 1 sequences" in made.notes[-1]


def test_a_recipe_that_only_stores_weights_is_judged_too():
    t = toy("llama")
    made = halfulp.check(
        t.model, t.batch(4), formats=("bf16",), target="bf16_weights", profile=False
    )
    assert made.asked.measured_kl > 1e-8
    assert 0.5 < made.asked.ratio < 2


@pytest.mark.parametrize(
    ("batch", "options"),
    [
        (IDS, {"formats": ()}),
        (IDS, {"formats": "bf16"}),
        (IDS, {"probes": 0}),
        (IDS, {"rows": 0}),
        (IDS, {"attention": "flash"}),
        (IDS, {"seed": "a"}),
        (IDS, {"budget": True}),
        (IDS + 50, {}),
        (IDS.float(), {}),
        (IDS[:0], {}),
        (IDS[:1, :1], {}),
        (None, {}),
        ({"ids": IDS, "nonsense": 1}, {}),
    ],
)
def test_no_raw_error_for_wrong_input(batch, options):
    with pytest.raises(halfulp.HalfulpError):
        halfulp.check(
            Plain(), batch, hints=HINTS, profile=False, **{"formats": ("bf16",)} | options
        )


def test_gradients_are_needed():
    with torch.inference_mode(), pytest.raises(CheckError, match="inference_mode"):
        halfulp.check(Plain(), IDS, formats=("bf16",), hints=HINTS, profile=False)
    frozen = Plain().requires_grad_(False)
    with pytest.raises(CheckError, match="requires"):
        halfulp.check(frozen, IDS, formats=("bf16",), hints=HINTS, profile=False, lr=1e-3)
