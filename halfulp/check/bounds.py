"""Rigorous round-off bounds, one operation at a time: running error analysis in fp64.

Every function takes reference inputs with bounds of their errors (`Bounded`; `exact(x)` for none)
and gives the reference output with the bound of its error: absolute, componentwise, and true for
every input within its bounds, so results compose. `a` is the arithmetic of the operation itself,
`out` a last rounding (None: the result stays in `a`). Where something can overflow the bound is
inf. Elementary functions are taken to be correctly rounded, up to a factor `ulps` of u where that
is a parameter; constants such as eps are taken to be exact.
"""

import math

import torch
from torch import Tensor

from halfulp.check.arithmetic import Accumulator, Arithmetic, Bounded, guarded, rounded

SILU_SLOPE, GELU_SLOPE = 1.0999, 1.1291  # largest |derivative|
_GELU_SCALE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def matmul(
    a: Bounded, b: Bounded, accumulator: Accumulator, *, out: Arithmetic | None = None
) -> Bounded:
    """a [..., M, n] times b [..., n, N]."""
    n = a.value.shape[-1]
    size_a, size_b = a.value.abs(), b.value.abs()
    reach_a, reach_b = size_a + a.error, size_b + b.error
    value, mass = a.value @ b.value, reach_a @ reach_b
    error = accumulator.relative(n) * mass + accumulator.flushed(n)
    if b.error.any():
        error = error + size_a @ b.error
    if a.error.any():
        error = error + a.error @ reach_b
    fits = (mass + accumulator.flushed(n)) * accumulator.reach(n) < accumulator.x_max
    return rounded(guarded(value, error, fits), out)


def linear(
    x: Bounded,
    weight: Bounded,
    bias: Bounded | None,
    accumulator: Accumulator,
    *,
    out: Arithmetic | None = None,
) -> Bounded:
    """x [..., n] times weight [N, n] transposed, plus bias [N], added before `out` rounds."""
    y = matmul(x, Bounded(weight.value.mT, weight.error.mT), accumulator)
    return rounded(y if bias is None else add(y, bias, accumulator.arithmetic), out)


def dot_variance(a: Tensor, b: Tensor, arithmetic: Arithmetic) -> Tensor:
    """Variance of the error of a [..., M, n] @ b [..., n, N], its sums rounded one by one.

    A model, not a bound: mantissas log-uniform, addends in random order. It fails for sums of
    addends of one sign in a short accumulator, which stagnate.
    """
    a, b, n = a.double(), b.double(), a.shape[-1]
    squares = a.square() @ b.square()
    return 0.180 * arithmetic.u**2 * ((n + 1) / 6 * squares + (n + 1) / 3 * (a @ b).square())


def add(x: Bounded, y: Bounded, a: Arithmetic, *, out: Arithmetic | None = None) -> Bounded:
    """x + y: the residual stream, a bias. No underflow: both are numbers of the format."""
    value, error = x.value + y.value, x.error + y.error
    reach = value.abs() + error
    return rounded(guarded(value, error + a.u * reach, reach * (1 + a.u) < a.x_max), out)


def multiply(x: Bounded, y: Bounded, a: Arithmetic, *, out: Arithmetic | None = None) -> Bounded:
    """x · y, element by element."""
    error = x.error * (y.value.abs() + y.error) + x.value.abs() * y.error
    product = Bounded(x.value * y.value, torch.where(error.isnan(), math.inf, error))
    return rounded(rounded(product, a), out)


def rms_norm(
    x: Bounded, gain: Bounded, eps: float, a: Arithmetic, *, out: Arithmetic | None = None
) -> Bounded:
    """gain · x / sqrt(mean x² + eps) over the last axis, sums in any order."""
    n, size, slack = x.value.shape[-1], x.value.abs(), _rms(x.error)
    spread = _rms(x.value)
    r = (spread.square() + eps).sqrt()
    low, high = (spread - slack).clamp(min=0), spread + slack
    squares = n * high.square()
    r_low = _root_low(n * low.square() - n * a.h, n, n, eps, a)
    r_high = _root_high(squares + n * a.h, n, n, eps, a)
    over = (size + x.error) / r_low * a.up(2) - size / r
    under = size / r - (size - x.error).clamp(min=0) / r_high * a.down(2)
    # However wrong x is, the norm of what comes out is at most sqrt(n).
    limit = math.sqrt(n) * _overshoot(low, high, n, eps, a) * a.up(2) + size / r
    scaled = torch.minimum(torch.maximum(over, under), limit)
    error = gain.value.abs() * scaled
    error = error + gain.error * (size / r + scaled) + a.h * (1 + _reach(gain)) * (1 + a.u)
    largest = (size / r + scaled) * _reach(gain).clamp(min=1) + a.h * (1 + _reach(gain))
    fits = ((squares + n * a.h) * a.up(n) < a.x_max) & (largest * a.up(2) < a.x_max)
    return rounded(guarded(gain.value * x.value / r, error, fits), out)


def layer_norm(
    x: Bounded,
    gain: Bounded,
    bias: Bounded,
    eps: float,
    a: Arithmetic,
    *,
    out: Arithmetic | None = None,
) -> Bounded:
    """gain · c / sqrt(mean c² + eps) + bias, c = x − mean(x), in two passes, sums in any order."""
    n = x.value.shape[-1]
    c = x.value - x.value.mean(-1, keepdim=True)
    size, shift = c.abs(), x.error + x.error.mean(-1, keepdim=True)
    spread, slack = _rms(c), _rms(x.error)
    s = (spread.square() + eps).sqrt()
    sum_x = _reach(x).sum(-1, keepdim=True)
    wrong_mean = a.growth(n) * sum_x / n + a.h
    wrong_c = shift + wrong_mean * (1 + a.u) + a.u * (size + shift)
    squares = n * ((spread + slack).square() + wrong_mean.square()) * a.up(2)
    least = n * (spread - slack).clamp(min=0).square() * a.down(2)
    s_low = _root_low(least - n * a.h, n, n, eps, a)
    s_high = _root_high(squares + n * a.h, n, n, eps, a)
    over = (size + wrong_c) / s_low * a.up(2) - size / s
    under = size / s - (size - wrong_c).clamp(min=0) / s_high * a.down(2)
    near, far = (total / n for total in (least, squares))
    limit = math.sqrt(n) * _overshoot(near.sqrt(), far.sqrt(), n, eps, a) * a.up(2) + size / s
    scaled = torch.minimum(torch.maximum(over, under), limit)
    value = gain.value * c / s + bias.value
    flushed = a.h * (1 + _reach(gain)) * a.up(2)
    product = gain.value.abs() * scaled + gain.error * (size / s + scaled) + flushed
    error = (product + bias.error) * (1 + a.u) + a.u * value.abs()
    largest = (size / s + scaled) * _reach(gain).clamp(min=1) + flushed + _reach(bias)
    fits = (squares + n * a.h) * a.up(n) < a.x_max
    fits = fits & (sum_x * a.up(n) < a.x_max) & (largest * a.up(2) < a.x_max)
    return rounded(guarded(value, error, fits), out)


def softmax(
    x: Bounded,
    a: Arithmetic,
    *,
    shifted: bool = True,
    visible: Tensor | None = None,
    ulps: float = 1.0,
    out: Arithmetic | None = None,
) -> Bounded:
    """Softmax over the last axis; `shifted`: the largest entry is subtracted first.

    Without roundings in the sum and the division the bound is the exact supremum over all inputs
    within their bounds. Entries where `visible` is False count as −inf.
    """
    p, moved, divided, fits = _softmax_parts(x, a, shifted, visible, ulps)
    return rounded(guarded(p, moved + divided, fits), out)


def sink_bound(p: Tensor, w: Tensor) -> Tensor:
    """Bound of ‖p̂ − p‖₁ over the last axis when score j is off by at most w[j].

    2 Σ p (1 − p) w to first order: small where one entry holds nearly all the mass. The factor
    makes it true for every w.
    """
    widest = w.amax(-1).clamp(min=1e-300)
    return 2 * (p * (1 - p) * w).sum(-1) * torch.expm1(2 * widest) / (2 * widest)


def attention(
    q: Bounded,
    k: Bounded,
    v: Bounded,
    accumulator: Accumulator,
    *,
    scores: Arithmetic | None = None,
    probabilities: Arithmetic | None = None,
    softmax_in: Arithmetic | None = None,
    visible: Tensor | None = None,
    scale: float | None = None,
    ulps: float = 1.0,
    out: Arithmetic | None = None,
) -> Bounded:
    """softmax(q kᵀ · scale) v; q [..., T, d], k and v [..., S, d]; `visible` [..., T, S].

    `scores`, `probabilities`: what the scores (the product, and the product times the scale) and
    the probabilities are stored in; None: they stay in the accumulator's arithmetic. The part that
    the softmax lets through is centered: it has no factor S.
    """
    a = softmax_in or accumulator.arithmetic
    factor = q.value.shape[-1] ** -0.5 if scale is None else scale
    s = matmul(q, Bounded(k.value.mT, k.error.mT), accumulator, out=scores)
    s = Bounded(s.value * factor, s.error * factor)
    s = rounded(rounded(s, accumulator.arithmetic), scores)
    p, moved, divided, fits = _softmax_parts(s, a, True, visible, ulps)
    stored_p = rounded(Bounded(p, moved + divided), probabilities)
    loose = stored_p.error - moved  # what does not add up to 0 over a row
    if visible is not None:
        loose = torch.where(visible, loose, 0.0)
    value, reach_v, mass = p @ v.value, _reach(v), p + moved + loose
    error = _centered(moved, v.value, value) + mass @ v.error + loose @ v.value.abs()
    terms, n = mass @ reach_v, p.shape[-1]
    error = error + accumulator.relative(n) * terms + accumulator.flushed(n)
    fits_sum = (terms + accumulator.flushed(n)) * accumulator.reach(n) < accumulator.x_max
    return rounded(guarded(value, error, fits.all(-1, keepdim=True) & fits_sum), out)


def rope(
    x: Bounded, cos: Bounded, sin: Bounded, a: Arithmetic, *, out: Arithmetic | None = None
) -> Bounded:
    """x [..., T, d] turned: x · cos + (−x₂, x₁) · sin, halves as in Llama; tables [T, d]."""
    products = multiply(x, cos, a), multiply(_turned(x), sin, a)
    return add(*products, a, out=out)


def rope_angle_error(positions: Tensor, inv_freq: Tensor, a: Arithmetic) -> Tensor:
    """Bound [T, F] of |error| of positions [T] × inv_freq [F], both and their product in `a`.

    cos and sin are off by at most as much. Integer positions up to 1/u are exact.
    """
    t, f = positions.double()[:, None], inv_freq.double()[None, :]
    wrong_t = torch.where(t.abs() <= 1 / a.u, 0.0, a.u * t.abs()).expand(len(t), f.shape[1])
    wrong_f = (a.u * f.abs()).clamp(min=a.h).expand_as(wrong_t)
    return multiply(Bounded(t.expand_as(wrong_t), wrong_t), Bounded(f, wrong_f), a).error


def silu(x: Bounded, a: Arithmetic, *, ulps: float = 1.0, out: Arithmetic | None = None) -> Bounded:
    """x / (1 + exp(−x))."""
    value = x.value * torch.sigmoid(x.value)
    left, u = x.value - x.error, a.u * ulps
    z = torch.exp((-left).clamp(max=700.0))  # largest exp(−x) within reach
    share = (z * u + a.h) / (1 + z)  # how wrong 1 + exp(−x) can be
    relative = (1 + a.u) / ((1 - share).clamp(min=0) * (1 - a.u)) - 1
    moved = SILU_SLOPE * x.error
    error = moved + (value.abs() + moved) * relative + 2 * a.h
    limit = value.abs() + _reach(x) * (1 + a.u) / (1 - a.u) + a.h
    # Where exp(−x) overflows or saturates, all that is left is x over something huge.
    vanished = value.abs() + moved + _reach(x) / a.x_max * a.up(3) + a.h
    fits = (1 + z * (1 + u) + a.h) * (1 + a.u) < a.x_max
    error = torch.where(fits, torch.minimum(error, limit), vanished)
    return rounded(guarded(value, error, error.isfinite()), out)


def gelu_tanh(
    x: Bounded, a: Arithmetic, *, ulps: float = 1.0, out: Arithmetic | None = None
) -> Bounded:
    """x/2 · (1 + tanh(z)), z = sqrt(2/π) (x + 0.044715 x³), in this order of operations.

    For x far below 0 the control is absolute: 1 + tanh cancels.
    """
    reach = _reach(x)
    cubic, line = _GELU_SCALE * _GELU_CUBIC * reach**3, _GELU_SCALE * reach
    value, least = _gelu(x.value), (x.value.abs() - x.error).clamp(min=0)
    z_error = a.growth(5) * cubic + a.growth(2) * line + 8 * a.h * _GELU_SCALE
    slope = 1 / torch.cosh((_gelu_argument(least) - z_error).clamp(0, 300)) ** 2
    t_error = z_error * slope + a.u * ulps + a.h
    factor = 1 + torch.tanh(_gelu_argument(x.value + x.error))
    own = (t_error + a.u * (factor + t_error)) * a.up(2) + a.growth(2) * factor
    error = GELU_SLOPE * x.error + 0.5 * reach * own + 2 * a.h
    error = torch.minimum(error, value.abs() + reach * a.up(3) + 2 * a.h)
    fits = reach**3 * a.up(2) < a.x_max
    fits = fits & ((line + cubic + z_error) < a.x_max)
    return rounded(guarded(value, error, fits), out)


def swiglu(
    gate: Bounded, up: Bounded, a: Arithmetic, *, ulps: float = 1.0, out: Arithmetic | None = None
) -> Bounded:
    """silu(gate) · up, both roundings in `a`. The product is where fp16 overflows first."""
    return multiply(silu(gate, a, ulps=ulps), up, a, out=out)


def condition_rms(x: Tensor) -> Tensor:
    """Condition number of each entry of RMSNorm (eps = 0): 2 (1 − x̂²), x̂ = x/‖x‖₂. Never > 2."""
    x = x.double()
    return 2 * (1 - x.square() / x.square().sum(-1, keepdim=True))


def condition_layer(x: Tensor) -> Tensor:
    """Bound of the condition number of each entry of LayerNorm (eps = 0, no affine), O(n)."""
    x = x.double()
    c = x - x.mean(-1, keepdim=True)
    shared = (c * x).abs().sum(-1, keepdim=True) / c.square().sum(-1, keepdim=True)
    return (x.abs() + x.abs().mean(-1, keepdim=True)) / c.abs() + shared


def distribution_bounds(half_range: float) -> tuple[float, float]:
    """(total variation, KL in nats) that logit errors within ± half_range can cause at most.

    tanh(ε/2) and ε²/2; both are attained, the second as ε → 0.
    """
    return math.tanh(half_range / 2), half_range**2 / 2


def certain_top1(logits: Bounded) -> Tensor:
    """Whether no error within the bounds can change the largest logit; shape without the last."""
    top = logits.value.argmax(-1, keepdim=True)
    reach = (logits.value + logits.error).scatter(-1, top, -math.inf)
    return (logits.value - logits.error).gather(-1, top)[..., 0] > reach.amax(-1)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean(-1, keepdim=True).sqrt()


def _reach(x: Bounded) -> Tensor:
    return x.value.abs() + x.error


def _root_high(total: Tensor, adds: int, n: int, eps: float, a: Arithmetic) -> Tensor:
    """Largest computed sqrt(total/n + eps) when `adds` roundings reach each term of the total."""
    return (((total * a.up(adds + 1) / n + a.h) + eps) * (1 + a.u) + _eps_h(eps, a)).sqrt() * (
        1 + a.u
    )


def _root_low(total: Tensor, adds: int, n: int, eps: float, a: Arithmetic) -> Tensor:
    """Smallest computed root; 0 where nothing can be promised."""
    mean = (total * a.down(adds + 1) / n - a.h).clamp(min=0)
    return ((mean + eps) * (1 - a.u) - _eps_h(eps, a)).clamp(min=0).sqrt() * (1 - a.u)


def _eps_h(eps: float, a: Arithmetic) -> float:
    """A sum with a constant that is not on the grid can underflow."""
    return a.h if eps else 0.0


def _overshoot(low: Tensor, high: Tensor, n: int, eps: float, a: Arithmetic) -> Tensor:
    """Bound of r / computed r over rms values in [low, high]; inf if it can be 0 / 0."""
    vanishing = a.h + a.h / a.down(n + 1)  # a mean square that underflow can wipe out
    ratios = []
    for rms in (low, high):
        square = rms.square().clamp(min=vanishing)
        mean = ((square - a.h) * a.down(n + 1) - a.h).clamp(min=0)
        least = ((mean + eps) * (1 - a.u) - _eps_h(eps, a)).clamp(min=0).sqrt() * (1 - a.u)
        ratios.append((square + eps).sqrt() / least)
    return torch.maximum(*ratios).nan_to_num(nan=math.inf, posinf=math.inf)


def _softmax_parts(
    x: Bounded, a: Arithmetic, shifted: bool, visible: Tensor | None, ulps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(p, error that adds up to 0 over a row, error of sum and division, whether all fits)."""
    hidden = x.value == -math.inf if visible is None else ~visible | (x.value == -math.inf)
    scores = x.value.masked_fill(hidden, -math.inf)
    e = x.error.masked_fill(hidden, 0.0)
    n, top, widest = scores.shape[-1], scores.amax(-1, keepdim=True), e.amax(-1, keepdim=True)
    below = (top - scores).masked_fill(hidden, 0.0)
    w = e + math.log1p(a.u * ulps)
    if shifted:
        w = w + a.u * (below + e + widest)
    z = torch.exp(scores - top).sum(-1, keepdim=True)
    p = torch.exp(scores - top) / z
    # An exponential that underflows is off by h, whatever it is; relative to their sum:
    flushed = a.h / z * torch.exp(widest if shifted else widest - top)
    flushed = torch.where(hidden, 0.0, flushed)
    high = p * torch.exp(w) + flushed
    low = (p * torch.exp(-w) - flushed).clamp(min=0)
    sum_high, sum_low = high.sum(-1, keepdim=True), low.sum(-1, keepdim=True)
    most = (high / (high + (sum_low - low).clamp(min=0))).nan_to_num(nan=1.0)
    least = (low / (low + sum_high - high)).nan_to_num(nan=0.0)
    moved = torch.maximum(most - p, p - least).masked_fill(hidden, 0.0)
    over, under = (1 + a.u) / a.down(n - 1) - 1, 1 - (1 - a.u) / a.up(n - 1)
    divided = (max(over, under) * most + a.h).masked_fill(hidden, 0.0)
    if shifted:
        fits = n * a.up(n) < a.x_max
        fits = ((below + e + widest) * (1 + a.u) < a.x_max) & fits
    else:
        total = torch.exp(top + widest + z.log()) * (1 + a.u * ulps) + n * a.h
        # A sum that can be 0 divides 0 by 0.
        fits = (total * a.up(n) < a.x_max) & ((sum_low > 0) | hidden)
    return p, moved, divided, fits


def _centered(moved: Tensor, v: Tensor, o: Tensor) -> Tensor:
    """Σ_j moved[t, j] |v[j, c] − o[t, c]|, one channel at a time."""
    columns = [
        (moved * (v[..., None, :, c] - o[..., :, None, c]).abs()).sum(-1)
        for c in range(v.shape[-1])
    ]
    return torch.stack(columns, -1)


def _turned(x: Bounded) -> Bounded:
    def turn(t: Tensor, sign: int) -> Tensor:
        first, second = t.chunk(2, -1)
        return torch.cat((sign * second, first), -1)

    return Bounded(turn(x.value, -1), turn(x.error, 1))


def _gelu_argument(x: Tensor) -> Tensor:
    return _GELU_SCALE * (x + _GELU_CUBIC * x**3)


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1 + torch.tanh(_gelu_argument(x)))
