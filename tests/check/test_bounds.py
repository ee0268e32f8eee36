"""Bounds of halfulp.check.bounds against programs that round every operation, and their slack."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import simulated as sim
from adversary import climb, ratios

from halfulp.check import bounds
from halfulp.check.arithmetic import EXACT, Accumulator, Arithmetic, Bounded, exact, stored
from halfulp.errors import FormatError

FAMILIES = ("gaussian", "positive", "heavy", "shifted", "outlier")
EPS = 1e-5
TOLERANCE = 1 + 1e-9


def family(name, rows, n, generator):
    z = torch.randn(rows, n, generator=generator, dtype=torch.float64)
    if name == "heavy":
        return z * torch.exp(1.5 * torch.randn(z.shape, generator=generator, dtype=torch.float64))
    if name == "outlier":
        z[:, 0] *= 100
    return {"positive": z.abs(), "shifted": z + 4}.get(name, z)


def cases(x, w, gain, bias, name):
    """Operation → (computed with every operation rounded, bound)."""
    fl, a = sim.GRIDS[name], Arithmetic.of(name)
    product = bounds.matmul(exact(x[:, None, :]), exact(w[:, :, None]), Accumulator(arithmetic=a))
    X, G, B = exact(x), exact(gain), exact(bias)
    return {
        "dot": (sim.dot(x, w, fl)[:, None], Bounded(product.value[..., 0], product.error[..., 0])),
        "rms_norm": (sim.rms_norm(x, gain, EPS, fl), bounds.rms_norm(X, G, EPS, a)),
        "layer_norm": (
            sim.layer_norm(x, gain, bias, EPS, fl),
            bounds.layer_norm(X, G, B, EPS, a),
        ),
        "softmax": (sim.softmax(x, fl, shifted=True), bounds.softmax(X, a)),
        "softmax unshifted": (
            sim.softmax(x, fl, shifted=False),
            bounds.softmax(X, a, shifted=False),
        ),
        "silu": (sim.silu(x, fl), bounds.silu(X, a)),
        "gelu_tanh": (sim.gelu_tanh(x, fl), bounds.gelu_tanh(X, a)),
        "swiglu": (fl(sim.silu(x, fl) * w), bounds.swiglu(X, exact(w), a)),
        "add": (fl(x + w), bounds.add(X, exact(w), a)),
    }


@pytest.mark.parametrize("n", [16, 128, 512])
@pytest.mark.parametrize("name", sim.GRIDS)
def test_no_error_exceeds_its_bound(name, n):
    fl, generator = sim.GRIDS[name], torch.Generator().manual_seed(n)
    for kind in FAMILIES:
        x = fl(family(kind, 12, n, generator)).clamp(-fl.largest, fl.largest)
        w, gain, bias = (fl(family("gaussian", 12, n, generator)) for _ in range(3))
        for op, case in cases(x, w, 1 + gain[0] / 8, bias[0] / 8, name).items():
            worst = ratios(case).max()
            assert worst <= TOLERANCE, (op, kind)
            finite = case[1].error.isfinite()
            if name in ("fp32", "bf16") and op != "softmax unshifted":  # exp(±300) fits in none
                assert finite.all(), (op, kind)
                assert worst > 0, (op, kind)  # a program without roundings proves nothing


def climbers(fl, a):
    zero = torch.zeros(5, dtype=torch.float64)
    line = torch.linspace(-8, 8, 4001, dtype=torch.float64)[None]
    return {
        "rms_norm": lambda x: (
            sim.rms_norm(x[:, :5], x[:, 5:], 0.0, fl),
            bounds.rms_norm(exact(x[:, :5]), exact(x[:, 5:]), 0.0, a),
        ),
        "layer_norm": lambda x: (
            sim.layer_norm(x[:, :5], x[:, 5:], zero, 0.0, fl),
            bounds.layer_norm(exact(x[:, :5]), exact(x[:, 5:]), exact(zero), 0.0, a),
        ),
        "softmax": lambda x: (
            sim.softmax(x, fl, shifted=True),
            bounds.softmax(exact(x), a),
        ),
        "softmax unshifted": lambda x: (
            sim.softmax(x, fl, shifted=False),
            bounds.softmax(exact(x), a, shifted=False),
        ),
        "silu": lambda _: (sim.silu(fl(line), fl), bounds.silu(exact(fl(line)), a)),
    }


def climbed(name, op, steps):
    fl, generator = sim.GRIDS[name], torch.Generator().manual_seed(1)
    columns = 4 if op.startswith("softmax") else 10
    start = torch.randn(64, columns, generator=generator, dtype=torch.float64)
    steps = 1 if op == "silu" else steps
    evaluate = climbers(fl, Arithmetic.of(name))[op]
    return climb(evaluate, start, fl, steps=steps, generator=generator)


GATES = {"rms_norm": 0.55, "layer_norm": 0.35, "softmax": 0.75, "silu": 0.85}


@pytest.mark.parametrize("op", GATES)
def test_bounds_are_not_vacuous(op):
    assert GATES[op] <= climbed("bf16", op, 400) <= TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("op", [*GATES, "softmax unshifted"])
@pytest.mark.parametrize("name", sim.GRIDS)
def test_no_adversary_breaks_a_bound(name, op):
    assert 0.05 < climbed(name, op, 1500) <= TOLERANCE


def test_bound_without_underflow_terms_is_broken():
    fl, a = sim.GRIDS["fp16"], Arithmetic.of("fp16")
    x = fl(torch.full((1, 16), 3e-4, dtype=torch.float64))  # x² is below the smallest subnormal/2
    one = torch.ones(16, dtype=torch.float64)
    computed = sim.rms_norm(x, one, 0.0, fl)
    blind = Arithmetic(name="blind", u=a.u, h=0.0, x_max=a.x_max)
    assert ratios((computed, bounds.rms_norm(exact(x), exact(one), 0.0, blind))).max() > 10
    assert ratios((computed, bounds.rms_norm(exact(x), exact(one), 0.0, a))).max() <= 1
    tiny = exact(x / 10)
    assert bounds.rms_norm(tiny, exact(one), 0.0, a).error.isinf().all()  # 0 divided by 0


def test_softmax_that_can_divide_by_zero_has_no_bound():
    x = torch.full((1, 8), -20.0, dtype=torch.float64)
    assert sim.softmax(x, sim.GRIDS["e4m3"], shifted=False).isnan().all()
    a = Arithmetic.of("e4m3")
    assert bounds.softmax(exact(x), a, shifted=False).error.isinf().all()
    assert bounds.softmax(exact(x), a).error.isfinite().all()


def test_overflow_is_answered_with_inf():
    a, big = Arithmetic.of("fp16"), torch.full((1, 64), 300.0, dtype=torch.float64)
    one = torch.ones(64, dtype=torch.float64)
    assert bounds.rms_norm(exact(big), exact(one), 0.0, a).error.isinf().all()
    assert (
        bounds.rms_norm(exact(big), exact(one), 0.0, Arithmetic.of("bf16")).error.isfinite().all()
    )
    gate, up = exact(torch.tensor([256.0, 200.0])), exact(torch.tensor([262.0, 262.0]))
    assert bounds.multiply(gate, up, a).error.isinf().tolist() == [True, False]
    assert bounds.softmax(exact(big), a, shifted=False).error.isinf().all()


def moved(x, e, generator, draws=400):
    """Inputs within ± e of x: random ones and corners."""
    t = 2 * torch.rand(draws, *x.shape, generator=generator, dtype=torch.float64) - 1
    t[draws // 2 :] = t[draws // 2 :].sign()
    return x + t * e


@pytest.mark.parametrize("size", [1e-3, 0.3])
def test_bounds_hold_for_all_inputs_within_theirs(size):
    generator = torch.Generator().manual_seed(0)
    x = family("shifted", 1, 24, generator)[0] - 3
    e = size * torch.rand(24, generator=generator, dtype=torch.float64)
    one, zero = exact(torch.ones(24)), exact(torch.zeros(24))
    inputs = Bounded(x, e)
    functions = {
        "rms_norm": lambda b: bounds.rms_norm(b, one, EPS, EXACT),
        "layer_norm": lambda b: bounds.layer_norm(b, one, zero, EPS, EXACT),
        "softmax": lambda b: bounds.softmax(b, EXACT),
        "silu": lambda b: bounds.silu(b, EXACT),
        "gelu_tanh": lambda b: bounds.gelu_tanh(b, EXACT),
        "swiglu": lambda b: bounds.swiglu(b, b, EXACT),
    }
    for op, f in functions.items():
        y = f(inputs)
        off = (f(exact(moved(x, e, generator))).value - y.value).abs().amax(0)
        ratio = (off / y.error).max()
        assert 0.2 < ratio <= TOLERANCE, op


def test_softmax_bound_is_the_supremum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, generator=generator, dtype=torch.float64)
    w = torch.rand(7, generator=generator, dtype=torch.float64)
    bound = bounds.softmax(Bounded(x, w), EXACT)
    signs = 2 * torch.eye(7, dtype=torch.float64) - 1
    corners = torch.cat([x + w * signs, x - w * signs])
    off = (corners.softmax(-1) - x.softmax(-1)).abs().amax(0)
    assert off == pytest.approx(bound.error, rel=1e-12)


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_attention_and_rotation(name):
    fl, a, generator = sim.GRIDS[name], Arithmetic.of(name), torch.Generator().manual_seed(3)
    q, k, v = (fl(torch.randn(20, 16, generator=generator, dtype=torch.float64)) for _ in range(3))
    visible = torch.ones(20, 20, dtype=torch.bool).tril()
    accumulator = Accumulator(arithmetic=a)
    bound = bounds.attention(exact(q), exact(k), exact(v), accumulator, visible=visible)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert bound.value == pytest.approx(expected, abs=1e-12)
    worst = ratios((sim.attention(q, k, v, fl, visible), bound)).max()
    assert 0.005 < worst <= TOLERANCE
    angle = torch.arange(20)[:, None] * 0.1 ** torch.arange(8)[None, :]
    cos, sin = (torch.cat((t, t), -1).double() for t in (angle.cos(), angle.sin()))
    turned = bounds.rope(exact(q), stored(cos, a), stored(sin, a), a)
    half = torch.cat((-q[:, 8:], q[:, :8]), -1)
    computed = fl(fl(q * fl(cos)) + fl(half * fl(sin)))
    assert 0.2 < ratios((computed, turned)).max() <= TOLERANCE


def test_attention_with_moved_inputs():
    generator = torch.Generator().manual_seed(4)
    qkv = torch.randn(3, 10, 8, generator=generator, dtype=torch.float64)
    e = 0.02 * torch.rand(qkv.shape, generator=generator, dtype=torch.float64)
    visible = torch.ones(10, 10, dtype=torch.bool).tril()
    nothing = Accumulator(arithmetic=EXACT)
    inputs = [Bounded(x, d) for x, d in zip(qkv, e, strict=True)]
    y = bounds.attention(*inputs, nothing, visible=visible)
    q, k, v = moved(qkv, e, generator).unbind(1)
    got = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
    assert 0.1 < ((got - y.value).abs().amax(0) / y.error).max() <= TOLERANCE


@pytest.mark.parametrize("order", ["pairwise", "blocked"])
def test_shorter_sums_have_smaller_bounds_that_hold(order):
    fl, a, generator = sim.GRIDS["bf16"], Arithmetic.of("bf16"), torch.Generator().manual_seed(5)
    x = fl(family("positive", 64, 64, generator))
    p = fl(x * x)
    if order == "pairwise":
        accumulator = Accumulator(arithmetic=a, order=order)
        while p.shape[-1] > 1:
            p = fl(p[:, ::2] + p[:, 1::2])
        computed = p[:, 0]
    else:
        wide = Arithmetic.of("fp32")
        accumulator = Accumulator(arithmetic=a, order=order, block=8, between=wide)
        computed = sim.total(sim.total(p.view(64, 8, 8), fl), sim.GRIDS["fp32"])
    bound = bounds.matmul(exact(x[:, None, :]), exact(x[:, :, None]), accumulator)
    assert 0.05 < ratios((computed[:, None], Bounded(*(t[..., 0] for t in bound)))).max() <= 1
    assert accumulator.relative(64) < Accumulator(arithmetic=a).relative(64) / 5


def test_variance_of_a_dot_product():
    generator = torch.Generator().manual_seed(6)
    for name in ("bf16", "fp16"):
        fl, a = sim.GRIDS[name], Arithmetic.of(name)
        x, w = (fl(torch.randn(4000, 256, generator=generator).double()) for _ in range(2))
        off = sim.dot(x, w, fl) - (x * w).sum(-1)
        predicted = bounds.dot_variance(x[:, None, :], w[:, :, None], a).mean()
        assert (off.square().mean() / predicted).sqrt() == pytest.approx(1, abs=0.1)
    off = sim.dot(x.abs(), x.abs(), sim.GRIDS["e4m3"]) - (x * x).sum(-1)  # it stagnates
    positive = bounds.dot_variance(x[:, None, :], x[:, :, None], Arithmetic.of("e4m3")).mean()
    assert (off.square().mean() / positive).sqrt() > 2


def test_condition_numbers():
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(9, generator=generator, dtype=torch.float64) + 1

    def condition(f):
        jacobian = torch.autograd.functional.jacobian(f, x)
        return (jacobian * x).abs().sum(-1) / f(x).abs()

    rms = condition(lambda t: t / t.square().mean().sqrt())
    assert bounds.condition_rms(x) == pytest.approx(rms, rel=1e-12)
    assert bounds.condition_rms(x).max() <= 2
    layer = condition(lambda t: (t - t.mean()) / t.var(correction=0).sqrt())
    slack = bounds.condition_layer(x) / layer
    assert slack.min() >= 1
    assert slack.median() < 2


def test_distribution_bounds_are_attained():
    p = torch.linspace(1e-3, 1 - 1e-3, 4001, dtype=torch.float64)
    for half in (0.02, 0.5, 3.0):
        tv, kl = bounds.distribution_bounds(half)
        z = p * math.exp(half) + (1 - p) * math.exp(-half)
        far = ((p * math.exp(half) / z) - p).abs().max().item() / tv
        nats = (z.log() - half * (2 * p - 1)).max().item() / kl
        assert 0.999 <= far <= TOLERANCE
        assert nats <= TOLERANCE
        assert nats >= 0.999 or half > 0.1


@pytest.mark.parametrize(("sink", "slack"), [(0, 4.0), (8, 1.1), (12, 1.1)])
def test_sink_bound(sink, slack):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(128, generator=generator, dtype=torch.float64)
    x[0] = sink
    p, w = x.softmax(0), torch.full((128,), 0.01, dtype=torch.float64)
    order = p.argsort(descending=True)
    worst = 0.0
    for cut in range(1, 128):  # the worst signs separate the entries in two sets
        sign = -torch.ones(128, dtype=torch.float64)
        sign[order[:cut]] = 1
        worst = max(worst, ((x + w * sign).softmax(0) - p).abs().sum().item())
    assert 1 <= bounds.sink_bound(p, w).item() / worst <= slack


def test_top1_is_certain_only_where_no_error_can_change_it():
    logits = Bounded(torch.tensor([[3.0, 2.0, 0.0]] * 2), torch.tensor([[0.4] * 3, [0.6] * 3]))
    assert bounds.certain_top1(logits).tolist() == [True, False]


def test_rotation_angles():
    positions, inv_freq = torch.arange(1024), torch.tensor([1.0, 0.7, 0.1])
    for name, low, high in (("bf16", 0.25, 16.0), ("fp32", 1e-6, 3e-4)):
        bound = bounds.rope_angle_error(positions, inv_freq, Arithmetic.of(name))
        fl = sim.GRIDS[name]
        computed = fl(fl(positions.double())[:, None] * fl(inv_freq.double())[None, :])
        off = (computed - positions.double()[:, None] * inv_freq.double()[None, :]).abs()
        assert (off <= bound * TOLERANCE).all()
        assert low < off.max() <= bound.max() < high


def test_integers_have_no_unit_roundoff():
    with pytest.raises(FormatError, match="int8"):
        Arithmetic.of("int8")
    with pytest.raises(FormatError, match="blocks belong to"):
        Accumulator(arithmetic=EXACT, block=8)
