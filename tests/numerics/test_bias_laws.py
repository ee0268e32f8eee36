"""Known laws of rounding errors, which a wrong rounding or scale would break on either side."""

import pytest
import torch

from halfulp.numerics.apply import apply_quantizer
from halfulp.numerics.gemm import multiply
from halfulp.numerics.quantizer import parse_quantizer
from halfulp.numerics.rounding import round_to


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_relative_error(k: int, rounding: str) -> float:
    x = normal(1 << 20)
    return ((round_to(x, f"e8m{k}", rounding=rounding) - x) / x).double().mean().item()


@pytest.mark.parametrize("k", [3, 4, 5, 7])
def test_truncation_to_k_bits_shrinks_by_the_law(k):
    """−2^-(k+1) E[1 / significand] = −2^-(k+1) / (2 ln 2), of a log-uniform significand."""
    expected = -0.7213 * 2.0 ** -(k + 1)
    assert mean_relative_error(k, "truncate") == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("k", [3, 4, 5, 7])
def test_nearest_does_not_shrink(k):
    assert abs(mean_relative_error(k, "nearest")) <= 1e-3


@pytest.mark.parametrize(
    ("rounding", "low", "high"), [("truncate", 0.905, 0.925), ("nearest", 0.997, 1.003)]
)
def test_gain_of_a_gemm_with_three_bits(rounding, low, high):
    """<C_q, C> / <C, C>: truncating both operands loses (1 − 0.7213/16)² of the product."""
    a, b = normal(128, 512), normal(128, 512, seed=1)
    exact = multiply(a, b).double()
    quantized = multiply(*(round_to(t, "e8m3", rounding=rounding) for t in (a, b))).double()
    assert low < float((quantized * exact).sum() / exact.square().sum()) < high


def layer_norm_weight() -> torch.Tensor:
    """Trained LayerNorm weights cluster: 0.97 ± 0.01. One block of 23 holds a value above 1."""
    return 0.97 + 0.01 * normal(4096, 32)


@pytest.mark.parametrize(
    ("rule", "clamped", "bias"),
    [("e8m0_floor", (0.95, 1.0), (-0.12, -0.08)), ("e8m0_up", (0.0, 0.0), (-0.01, 0.01))],
)
def test_mx_floor_clamps_clustered_weights(rule, clamped, bias):
    """2506.20752: OCP's scale puts 0.97 at 496 > 448; rounding the scale up does not."""
    gamma = layer_norm_weight()
    y = apply_quantizer(gamma, parse_quantizer(f"e4m3@1x32:{rule}"))
    top = (y == 0.875).float().mean().item()  # 448 / 512
    assert clamped[0] <= top <= clamped[1]
    assert bias[0] <= ((y - gamma) / gamma).mean().item() <= bias[1]
