"""AdamW against torch's, against a numpy oracle, and against itself: C, torch, order, resume."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from oracles.adamw import AdamWOracle
from oracles.compare import assert_same, on_kernel
from oracles.grids import grid

from halfulp.errors import ConfigError, FormatError
from halfulp.optim import AdamW

SHAPES = {"emb": (40, 16), "up": (48, 40), "norm": (40,), "one": (1,)}


def parameters(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.nn.Parameter((0.02 * torch.randn(*shape, generator=generator)).to(dtype))
        for name, shape in SHAPES.items()
    }


def set_gradients(named: dict[str, torch.nn.Parameter], step: int) -> None:
    """Gradients of a noisy quadratic: they depend on the weights and on the step."""
    for i, p in enumerate(named.values()):
        generator = torch.Generator().manual_seed(1000 * step + i)
        noise = torch.randn(p.shape, generator=generator)
        p.grad = (p.detach().float() + 0.01 * noise).to(p.dtype)


def run(
    named: dict[str, torch.nn.Parameter], opt: torch.optim.Optimizer, steps: int, first: int = 0
) -> None:
    for step in range(first, first + steps):
        set_gradients(named, step)
        opt.step()


def train(steps: int = 8, dtype: torch.dtype = torch.float32, **options: Any) -> dict[str, Any]:
    """Weights and moments after `steps`, as fp32 copies."""
    named = parameters(dtype)
    opt = AdamW(named.items(), lr=1e-3, **options)
    run(named, opt, steps)
    return tensors_of(named, opt)


def tensors_of(named: dict[str, torch.nn.Parameter], opt: AdamW) -> dict[str, torch.Tensor]:
    out = {name: p.detach().float().clone() for name, p in named.items()}
    for name, p in named.items():
        out |= {f"{name}.{k}": opt.state[p][k].float().clone() for k in ("m", "v")}
    return out


def assert_all_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    for name in a:
        assert_same(a[name], b[name])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_fp32_equals_torch(weight_decay, kernel_name):
    """50 steps to 1e-6 relative; both do the same fp32 operations in a slightly other order."""
    options = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": weight_decay}
    ours, theirs = parameters(), parameters()
    run(ours, AdamW(ours.items(), **options), 50)
    run(theirs, torch.optim.AdamW(theirs.values(), **options), 50)
    start = parameters()
    for name, p in ours.items():
        assert (p - theirs[name]).norm() <= 1e-6 * theirs[name].norm()
        assert (p - start[name]).norm() > 0.1 * start[name].norm()


@pytest.mark.parametrize(
    ("weight", "rounding"),
    [("fp32", "nearest"), ("bf16", "nearest"), ("bf16", "stochastic"), ("bf16", "truncate"),
     ("e8m3", "stochastic"), ("e5m7", "stochastic"), ("fp16", "nearest")],
)  # fmt: skip
def test_equals_the_numpy_oracle(weight, rounding, kernel_name):
    named = parameters()
    opt = AdamW(named.items(), weight=weight, update_rounding=rounding, seed=3)
    g = None if weight == "fp32" else grid(weight)
    oracles = {
        name: AdamWOracle(p.detach().numpy().copy(), name, g, rounding, seed=3)
        for name, p in named.items()
    }
    for step in range(5):
        set_gradients(named, step)
        for name, oracle in oracles.items():
            oracle.step(named[name].grad.numpy().copy())
        opt.step()
    for name, oracle in oracles.items():
        assert_same(named[name], oracle.w)
        assert_same(opt.state[named[name]]["m"], oracle.m)
        assert_same(opt.state[named[name]]["v"], oracle.v)


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16 nearest": {"weight": "bf16"},
    "bf16 stochastic": {"weight": "bf16", "update_rounding": "stochastic"},
    "bf16 truncate": {"weight": "bf16", "update_rounding": "truncate"},
    "bf16 saturating": {"weight": "bf16:saturate"},
    "tf32 stochastic": {"weight": "tf32", "update_rounding": "stochastic"},
    "fp16": {"weight": "fp16", "update_rounding": "stochastic"},
    "fp16 scaled": {"weight": "fp16@tensor:current:p2"},
    "e4m3 rows": {"weight": "e4m3@row:current", "update_rounding": "stochastic"},
    "bf16 moments": {"moment_m": "bf16", "moment_v": "bf16:stochastic"},
    "fp8 moments": {"moment_m": "e4m3@1x128:current", "moment_v": "e5m2@tensor:current"},
    "all low": {"weight": "bf16", "update_rounding": "stochastic", "moment_m": "e4m3@tensor:p2",
                "moment_v": "fp16@tensor:p2"},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_c_equals_torch(variant):
    results = []
    for kernel in ("c", "torch"):
        with on_kernel(kernel):
            results.append(train(**VARIANTS[variant]))
    assert_all_same(*results)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.startswith(("bf16", "all"))])
def test_c_equals_torch_with_real_bf16_parameters(variant):
    options = {"weight": "bf16", **VARIANTS[variant]}
    results = []
    for kernel in ("c", "torch"):
        with on_kernel(kernel):
            results.append(train(dtype=torch.bfloat16, **options))
    assert_all_same(*results)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_bf16_parameters_hold_what_fp32_carriers_hold(rounding, kernel_name):
    """The same fp32 gradients: a bf16 tensor and an fp32 tensor on the bf16 grid stay equal."""
    carried, real = parameters(), parameters(torch.bfloat16)
    options = {"weight": "bf16", "update_rounding": rounding}
    opts = AdamW(carried.items(), **options), AdamW(real.items(), **options)
    for step in range(5):
        set_gradients(real, step)
        for name, p in real.items():
            carried[name].grad = p.grad.float()
        for opt in opts:
            opt.step()
        assert_all_same({n: p.float() for n, p in real.items()}, carried)


@pytest.mark.parametrize("variant", VARIANTS)
def test_counting_does_not_change_a_bit(variant, kernel_name):
    named = parameters()
    opt = AdamW(named.items(), lr=1e-3, **VARIANTS[variant])
    opt.count(True)
    run(named, opt, 8)
    assert_all_same(tensors_of(named, opt), train(**VARIANTS[variant]))
    assert len(opt.counters()) == 8 * len(SHAPES)
    assert opt.counters() == []


@pytest.mark.parametrize("weight", ["bf16", "e8m3", "fp16", "e4m3@tensor:current"])
def test_weights_start_and_stay_on_their_grid(weight, kernel_name):
    named = parameters()
    opt = AdamW(named.items(), weight=weight, update_rounding="stochastic")
    for _ in range(3):
        run(named, opt, 1)
        if weight == "bf16":
            assert all(torch.equal(p, p.bfloat16().float()) for p in named.values())
        if weight == "e8m3":
            assert all((p.view(torch.int32) & 0xFFFFF == 0).all() for p in named.values())
        if weight == "fp16":
            assert all(torch.equal(p, p.half().float()) for p in named.values())
        if weight.startswith("e4m3"):
            assert all(len(p.unique()) <= 253 for p in named.values())
    start = parameters()
    assert any(not torch.equal(p, start[name]) for name, p in named.items())


def test_moments_are_on_their_grid(kernel_name):
    state = train(moment_m="bf16", moment_v="e5m2@tensor:current:p2", steps=3)
    assert torch.equal(state["up.m"], state["up.m"].bfloat16().float())
    assert (state["up.v"].view(torch.int32) & 0x1FFFFF == 0).all()


def test_names_not_order_decide_the_draw(kernel_name):
    """Reversed, split over groups, or alone: the same name draws the same bits."""
    options = {"lr": 1e-3, "weight": "bf16", "update_rounding": "stochastic"}
    whole = train(**{k: v for k, v in options.items() if k != "lr"})
    named = parameters()
    pairs = list(named.items())
    groups = [{"params": pairs[2:][::-1]}, {"params": pairs[:2], "block": "layers.0.ffn"}]
    opt = AdamW(groups, **options)
    run(named, opt, 8)
    assert_all_same(tensors_of(named, opt), whole)


def test_other_names_seeds_and_steps_draw_other_bits(kernel_name):
    def weights(name: str, seed: int, steps: int = 1) -> tuple[float, ...]:
        p = torch.nn.Parameter(torch.ones(200))
        opt = AdamW([(name, p)], weight="bf16", update_rounding="stochastic", seed=seed,
                    weight_decay=0.0)  # fmt: skip
        for _ in range(steps):
            p.data.fill_(1.0)
            p.grad = torch.ones(200)
            opt.step()
        return tuple(p.tolist())

    assert weights("a", 0) == weights("a", 0)
    assert len({weights("a", 0), weights("b", 0), weights("a", 1), weights("a", 0, 2)}) == 4


def test_unnamed_groups_draw_different_bits():
    pair = [torch.nn.Parameter(torch.ones(200)) for _ in range(2)]
    opt = AdamW([{"params": [p]} for p in pair], weight="bf16", update_rounding="stochastic")
    for p in pair:
        p.grad = torch.ones(200)
    opt.step()
    assert not torch.equal(*pair)


def resumed(variant: str, dtype: torch.dtype) -> tuple[dict, dict]:
    """(8 steps in one go, 5 steps + weights and state saved and loaded + 3 steps)."""
    options = {"lr": 1e-3, **VARIANTS[variant]}
    named = parameters(dtype)
    opt = AdamW(named.items(), **options)
    run(named, opt, 5)
    saved = copy.deepcopy((opt.state_dict(), {n: p.detach() for n, p in named.items()}))
    run(named, opt, 3, first=5)
    other = parameters(dtype, seed=1)
    again = AdamW(other.items(), **options)
    for name, p in other.items():
        p.data.copy_(saved[1][name])
    again.load_state_dict(saved[0])
    run(other, again, 3, first=5)
    return tensors_of(named, opt), tensors_of(other, again)


@pytest.mark.parametrize("variant", VARIANTS)
def test_state_round_trips_bit_by_bit(variant, kernel_name):
    assert_all_same(*resumed(variant, torch.float32))


@pytest.mark.parametrize("variant", ["bf16 nearest", "bf16 stochastic"])
def test_state_of_bf16_parameters_round_trips_bit_by_bit(variant):
    assert_all_same(*resumed(variant, torch.bfloat16))


def test_transposed_parameters_with_quantized_moments():
    p = torch.nn.Parameter(torch.randn(4, 6).t())
    p.grad = torch.ones_like(p)
    AdamW([p], moment_m="bf16").step()


def test_parameters_without_gradient_are_left_alone(kernel_name):
    named = parameters()
    before = copy.deepcopy(named)
    opt = AdamW(named.items())
    named["up"].grad = torch.ones_like(named["up"])
    opt.step()
    assert [n for n in named if not torch.equal(named[n], before[n])] == ["up"]


def test_closure_is_called_with_gradients_enabled():
    p = torch.nn.Parameter(torch.ones(3))
    opt = AdamW([p])

    def closure() -> torch.Tensor:
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() == 3
    assert (p < 1).all()


@pytest.mark.parametrize(
    ("options", "name"),
    [({"lr": -1.0}, "lr"), ({"betas": (1.0, 0.9)}, "betas"), ({"betas": (0.9, -0.1)}, "betas"),
     ({"eps": 0.0}, "eps"), ({"weight_decay": -0.1}, "weight_decay"),
     ({"update_rounding": "up"}, "update_rounding")],
)  # fmt: skip
def test_values_out_of_range(options, name):
    with pytest.raises(ConfigError, match=f"AdamW: {name}=.* is out of range"):
        AdamW(parameters().items(), **options)


@pytest.mark.parametrize("option", ["weight", "moment_m", "moment_v"])
def test_unknown_formats(option):
    with pytest.raises(FormatError, match="Nearest names"):
        AdamW(parameters().items(), **{option: "bf15"})


def test_bf16_parameters_need_a_bf16_weight():
    with pytest.raises(ConfigError, match="emb is bf16 and the optimizer stores weights as fp32"):
        AdamW(parameters(torch.bfloat16).items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_parameter_dtypes_are_refused(dtype):
    with pytest.raises(ConfigError):
        AdamW(parameters(dtype).items())


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"weight": "bf16:stochastic"}, r"not said here\. Give update_rounding='stochastic'"),
        ({"weight": "e4m3:hadamard(4)"}, "only operands of GEMMs are transformed"),
        ({"moment_m": "e4m3@1x32:hadamard(4)"}, "only operands of GEMMs are transformed"),
        ({"moment_v": "e4m3@tensor:delayed(4)"}, "only operands of GEMMs have delayed scales"),
    ],
)
def test_words_without_a_meaning_for_stored_tensors(options, found):
    before = parameters()
    named = parameters()
    with pytest.raises(FormatError, match=found):
        AdamW(named.items(), **options)
    assert all(torch.equal(p, before[name]) for name, p in named.items())


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_of_torch_that_are_missing_here(option):
    p = torch.nn.Parameter(torch.ones(3))
    with pytest.raises(ConfigError, match=f"AdamW has no {option}"):
        AdamW([{"params": [p], option: True}])
    AdamW([{"params": [p], option: False}])


def test_the_state_of_another_optimizer_is_refused():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    other = torch.optim.AdamW([p])
    other.step()
    opt = AdamW([p])
    with pytest.raises(ConfigError, match=r"no weight, .*it is not halfulp's AdamW"):
        opt.load_state_dict(other.state_dict())
    opt.step()


def test_a_state_that_stores_fp32_weights_does_not_fit_bf16_parameters():
    """The kernel would cut their bits off."""
    wide = AdamW([("w", torch.nn.Parameter(torch.ones(3)))])
    p = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    opt = AdamW([("w", p)], weight="bf16", update_rounding="stochastic")
    with pytest.raises(ConfigError, match="w is bf16 and the optimizer stores weights as fp32"):
        opt.load_state_dict(wide.state_dict())
    assert opt.param_groups[0]["update_rounding"] == "stochastic"


def test_sparse_gradients_are_refused():
    embedding = torch.nn.Embedding(4, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient of parameter emb is sparse.*sparse=False"):
        AdamW([("emb", embedding.weight)]).step()


def test_a_graph_from_before_the_step_is_stale(kernel_name):
    w, x = (torch.nn.Parameter(torch.randn(4)) for _ in range(2))
    opt = AdamW([w])
    loss = (w * x).sum()
    loss.backward(retain_graph=True)
    opt.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_empty_parameter_is_counted():
    p = torch.nn.Parameter(torch.empty(0))
    p.grad = torch.empty(0)
    opt = AdamW([p])
    opt.count(True)
    opt.step()
    (row,) = opt.counters()
    assert row["n"] == 0 == row["v_underflow"]


class Part(torch.nn.Parameter):
    """Looks like a DTensor of one process that is sharded along `dim`."""

    def sharded(self, dim: int) -> "Part":
        self.placements = (SimpleNamespace(dim=dim),)
        return self


@pytest.mark.parametrize(
    ("dim", "options", "found"),
    [
        (0, {"weight": "e4m3@tensor:current"}, r"stores e4m3@tensor:current"),
        (0, {"moment_m": "bf16:stochastic"}, "stores bf16:stochastic"),
        (1, {"weight": "bf16", "update_rounding": "stochastic"}, "updates stochastically"),
        (0, {"weight": "bf16", "update_rounding": "stochastic"}, None),
        (1, {"weight": "bf16"}, None),
    ],
)
def test_what_needs_whole_parameters_is_refused_for_parts(dim, options, found):
    part = Part(torch.ones(4, 8)).sharded(dim)
    if found is None:
        AdamW([("w", part)], **options)
        return
    with pytest.raises(ConfigError, match=f"parameter w is sharded along .*{found}"):
        AdamW([("w", part)], **options)


def test_a_parameter_of_one_number_is_a_row_of_one(kernel_name):
    options = {"weight": "e4m3@1x32", "moment_m": "e4m3@1x128", "moment_v": "e4m3@row"}
    number, row = (torch.nn.Parameter(torch.full(shape, 3.3)) for shape in ((), (1,)))
    for p in (number, row):
        opt = AdamW([("p", p)], **options)
        p.grad = torch.full_like(p, 0.7)
        opt.count(True)
        opt.step()
        assert opt.counters()[0]["n"] == 1
    assert number.item() == row.item() != 3.3
